// Prefill attention on Hopper's warpgroup instructions: out = softmax(q K^T scale) V for tiles of
// 128 query rows, with the arithmetic of attention.cuh, so the same bits as attention_prefill.cu.
//
// q, out: [T, heads, d]; K, V: [block][kv head][slot][d]; d is 64 or 128, cache and q of one type.
// A work is one head of one item; a CTA a multiprocessor does several, one after the other.
// Warpgroups 0 and 1 compute 64 rows each; of the third, one warp brings K and V and one q, and
// both are ahead with the next work while the last is still computed. Tiles of 64 tokens come by
// TMA, in boxes of 16, 32 or 64 slots, into two rings in shared memory, one of K and one of V, as
// [token / 8][d / 64][8][64] with the 128-byte swizzle.
// The products take q and P from registers; the row sums of P are mma.sync products with ones.
// While the tensor cores do q K^T of tile i + 1 and P V of tile i for one warpgroup, the other one
// is at its softmax: they take turns. A CTA reads 32 KB a tile (d = 128), mostly from L2, for
// 4 * 128 * 64 * 128 operations; tensor cores and exponentials are the bound.
#include <algorithm>
#include <numeric>

#include "cuda/attention.cuh"
#include "cuda/common.cuh"
#include "cuda/kernels.h"
#include "cuda/sm90.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

namespace ni::cuda {
namespace {

constexpr int kWarpgroup = 128;     // threads
constexpr int kWarpgroupRows = 64;  // query rows
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kStages = 4;     // tiles in each ring
constexpr int kAtomCols = 64;  // columns in the 128 bytes that the swizzle permutes
constexpr int kAtomRows = 8;
constexpr int kAtomBytes = kAtomRows * 128;
static_assert(kPrefillRows == 2 * kWarpgroupRows && kTile == 64);

template <int kDim>
struct Smem {
  static constexpr int kGroupBytes = kDim / kAtomCols * kAtomBytes;  // of 8 tokens
  static constexpr int kTileBytes = kTile / kAtomRows * kGroupBytes;
  static constexpr int kV = kStages * kTileBytes;
  static constexpr int kQ = kV + kStages * kTileBytes;
  static constexpr int kRow = 2 * kDim + 16;  // of q or out; so far apart they lie in other banks
  static constexpr int kOut = kQ + kPrefillRows * kRow;
  static constexpr int kBarriers = kOut + kPrefillRows * kRow;
  static constexpr int kAlign = 1024;  // of a swizzled tile
  static constexpr int kBytes = kBarriers + (4 * kStages + 3) * 8 + kAlign;
};

// What a launch fixes.
struct PrefillParams {
  AttnParams attn;
  ScoreScale scale;
  int32_t box;        // slots that one TMA copy brings
  int32_t num_works;  // heads of items
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty and never launched

constexpr int kComputeWarps = 8;
constexpr int kTilesPerChunk = kKvChunk / kTile;

// -- Rings ----------------------------------------------------------------------------------------

// Addresses in the shared memory of a block, and the barriers of its rings.
template <int kDim>
struct Rings {
  uint32_t base;

  __device__ uint32_t k(int stage) const { return base + stage * Smem<kDim>::kTileBytes; }
  __device__ uint32_t v(int stage) const {
    return base + Smem<kDim>::kV + stage * Smem<kDim>::kTileBytes;
  }
  __device__ uint32_t q(int row) const { return base + Smem<kDim>::kQ + row * Smem<kDim>::kRow; }
  __device__ uint32_t out(int row) const {
    return base + Smem<kDim>::kOut + row * Smem<kDim>::kRow;
  }
  __device__ uint32_t k_full(int stage) const { return barrier(stage); }
  __device__ uint32_t k_empty(int stage) const { return barrier(kStages + stage); }
  __device__ uint32_t v_full(int stage) const { return barrier(2 * kStages + stage); }
  __device__ uint32_t v_empty(int stage) const { return barrier(3 * kStages + stage); }
  __device__ uint32_t tail() const { return barrier(4 * kStages); }
  __device__ uint32_t q_full() const { return barrier(4 * kStages + 1); }
  __device__ uint32_t q_empty() const { return barrier(4 * kStages + 2); }
  __device__ uint32_t barrier(int i) const { return base + Smem<kDim>::kBarriers + 8 * i; }
};

// -- The works of a block -------------------------------------------------------------------------

struct Item {
  int32_t head, kv_head;
  int32_t first_row, rows;        // query rows, at most kPrefillRows
  int32_t position;               // of the first row
  int32_t context;                // tokens of the sequence
  int32_t first_tile, last_tile;  // all that any row sees
  const int32_t* blocks;
};

__device__ __forceinline__ Item make_item(const AttnParams& p, int32_t index) {
  const StepInputs& in = *p.step;
  const AttnItem work = in.prefill_items[index / p.args.num_heads];
  Item item;
  item.head = index % p.args.num_heads;
  item.kv_head = item.head / (p.args.num_heads / p.kv.num_kv_heads);
  const int32_t begin = in.cu_seqlens_q[work.seq], end = in.cu_seqlens_q[work.seq + 1];
  item.first_row = begin + work.index * kPrefillRows;
  item.rows = min(kPrefillRows, end - item.first_row);
  item.context = in.context_lens[work.seq];
  item.position = item.context - (end - item.first_row);
  item.first_tile = p.args.window > 0 ? max(0, item.position - p.args.window + 1) / kTile : 0;
  item.last_tile = (item.position + item.rows - 1) / kTile;
  item.blocks = in.block_tables + static_cast<int64_t>(work.seq) * in.block_table_stride;
  return item;
}

// Longest works come first; in every other round the CTAs take them in the opposite order, so that
// all have about as much to do.
template <typename F>
__device__ __forceinline__ void for_each_work(const PrefillParams& p, const F& f) {
  const auto ctas = static_cast<int32_t>(gridDim.x), cta = static_cast<int32_t>(blockIdx.x);
  for (int32_t round = 0; round * ctas < p.num_works; ++round) {
    const int32_t work = round * ctas + (round % 2 == 0 ? cta : ctas - 1 - cta);
    if (work < p.num_works) f(make_item(p.attn, work));
  }
}

// -- Loading --------------------------------------------------------------------------------------

// Slots beyond the context may hold NaN, and 0 * NaN would spread: rows [from, kTile) become zero.
template <int kDim>
__device__ __forceinline__ void zero_values(uint32_t v, int32_t from, int lane) {
  for (int32_t i = from * 8 + lane; i < kTile * 8; i += 32) {
    const uint32_t row = v + i / 64 * Smem<kDim>::kGroupBytes + i % 64 * 16;
#pragma unroll
    for (int part = 0; part < kDim / kAtomCols; ++part)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(row + part * kAtomBytes), "r"(0)
                   : "memory");
  }
  fence_async_proxy();
}

// One warp fills both rings; each lane copies at most one box of K and one of V a tile.
template <int kDim>
__device__ __forceinline__ void load_tiles(const PrefillParams& p, const CUtensorMap* k_map,
                                           const CUtensorMap* v_map, const Rings<kDim>& rings) {
  constexpr int kBytes = Smem<kDim>::kTileBytes;
  const int lane = threadIdx.x % 32;
  const int32_t offset = lane * p.box;  // of the lane's box in its tile
  const bool copies = offset < kTile;
  const uint32_t to = offset / kAtomRows * Smem<kDim>::kGroupBytes;
  const int32_t block_size = p.attn.kv.block_size;
  Place place;
  uint32_t tail_phase = 0;
  for_each_work(p, [&](const Item& item) {
    for (int32_t tile = item.first_tile; tile <= item.last_tile; ++tile, place.advance(kStages)) {
      // A box wholly beyond the context has no block of its own: it brings the last one's again.
      const int32_t token = min(tile * kTile + offset, item.context - 1);
      const int32_t block = copies ? item.blocks[token / block_size] : 0;
      const int32_t slot = token % block_size / p.box * p.box;
      const int32_t group = (item.kv_head * block_size + slot) / kAtomRows;  // of the block

      wait(rings.k_empty(place.stage), place.phase ^ 1);
      if (lane == 0) arrive_expecting(rings.k_full(place.stage), kBytes);
      __syncwarp();
      if (copies)
        copy_box(rings.k(place.stage) + to, k_map, 0, 0, 0, group, block,
                 rings.k_full(place.stage));

      const int32_t valid = item.context - tile * kTile;  // only the last tile can lack tokens
      const uint32_t full = valid < kTile ? rings.tail() : rings.v_full(place.stage);
      wait(rings.v_empty(place.stage), place.phase ^ 1);
      if (lane == 0) arrive_expecting(full, kBytes);
      __syncwarp();
      if (copies) copy_box(rings.v(place.stage) + to, v_map, 0, 0, 0, group, block, full);
      if (valid < kTile) {
        wait(rings.tail(), tail_phase);
        tail_phase ^= 1;
        zero_values<kDim>(rings.v(place.stage), valid, lane);
        __syncwarp();
        if (lane == 0) arrive(rings.v_full(place.stage));
      }
    }
  });
}

// Another brings q, a row a copy.
template <int kDim, typename T>
__device__ __forceinline__ void load_queries(const PrefillParams& p, const Rings<kDim>& rings) {
  const int lane = threadIdx.x % 32;
  uint32_t phase = 1;
  for_each_work(p, [&](const Item& item) {
    wait(rings.q_empty(), phase);
    phase ^= 1;
    if (lane == 0) arrive_expecting(rings.q_full(), item.rows * 2 * kDim);
    __syncwarp();
    const T* q = static_cast<const T*>(p.attn.q) + item.head * kDim;
    for (int32_t row = lane; row < item.rows; row += 32)
      copy_bytes(rings.q(row), q + (item.first_row + row) * p.attn.q_stride, 2 * kDim,
                 rings.q_full());
  });
}

// -- Computing ------------------------------------------------------------------------------------

// The two warpgroups issue their products in turns: 0 first.
__device__ __forceinline__ void await_turn(int warpgroup) {
  asm volatile("bar.sync %0, 256;" ::"r"(1 + warpgroup) : "memory");
}
__device__ __forceinline__ void pass_turn(int warpgroup) {
  asm volatile("bar.arrive %0, 256;" ::"r"(2 - warpgroup) : "memory");
}

// A thread's share of the 64 rows of its warpgroup: of its warp's 16 rows lane / 4 and that plus 8,
// as in the fragments of mma.sync (attention.cuh).
template <int kDim, typename T>
struct Rows {
  static constexpr int kTiles = kDim / 8;  // of 8 columns
  static constexpr int kGroupBytes = Smem<kDim>::kGroupBytes;

  uint32_t q[kDim / 16][4];
  Scores s;
  uint32_t p[kTile / 16][4];
  float o[kTiles][4];  // of the chunk, whose first product overwrites it
  float l[4];          // of the chunk; l[0] and l[2] are the row sums
  float m[2];          // of the chunk
  float total[kTiles][4], total_m[2], total_l[2];

  // Rows beyond the item's are zero. `row`: the first of the thread's, in the item; `smem`: its
  // warp's rows.
  __device__ __forceinline__ void init(uint32_t smem, int row, int num_rows) {
    const int lane = threadIdx.x % 32;
    const uint32_t from = smem + lane % 16 * Smem<kDim>::kRow + lane / 16 * 16;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      ldmatrix_x4(q[i], from + 32 * i);
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (row + r % 2 * 8 >= num_rows) q[i][r] = 0;
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) total[i / 4][i % 4] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total_m[r] = -INFINITY;
      total_l[r] = 0;
    }
    clear_sums();
    m[0] = m[1] = -INFINITY;
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (float& x : l) x = 0;
  }

  // Starts s = q K^T.
  __device__ __forceinline__ void issue_scores(uint32_t k) {
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
      wgmma_rows<T>(s, q[i], matrix(k + i / 4 * kAtomBytes + i % 4 * 32, 0, kGroupBytes), i > 0);
    wgmma_commit();
  }

  // Starts o += p V; where a chunk begins, o = p V.
  __device__ __forceinline__ void issue_values(uint32_t v, bool begins) {
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i)
      wgmma_columns<T>(o, p[i], matrix(v + 2 * i * kGroupBytes, kAtomBytes, kGroupBytes),
                       i > 0 || !begins);
    wgmma_commit();
  }

  // l += P 1.
  __device__ __forceinline__ void add_row_sums() {
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) mma<T>(l, p[i], kOnes2<T>, kOnes2<T>);
  }

  // fp32 probabilities to the fragments of P.
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i)
      p[i / 4][i % 4] = pack2<T>(s[i / 2][2 * (i % 2)], s[i / 2][2 * (i % 2) + 1]);
  }

  // A warp whose maxima stay has nothing to do: times 1 is exact.
  __device__ __forceinline__ void scale_chunk(const float (&alpha)[2]) {
    if (!__any_sync(0xffffffffu, alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i)
      o[i / 4][i % 4] = __fmul_rn(o[i / 4][i % 4], alpha[i / 2 % 2]);
    l[0] = __fmul_rn(l[0], alpha[0]);
    l[2] = __fmul_rn(l[2], alpha[1]);
  }

  // Adds the chunk, whose maxima are `chunk_m`, to the total.
  __device__ __forceinline__ void merge_chunk(const float (&chunk_m)[2], float c) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const MergeFactors f = merge_max(total_m[r], chunk_m[r], c);
      total_l[r] = merge_sum(total_l[r], l[2 * r], f);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        float& sum = total[i / 2][2 * r + i % 2];
        sum = merge_sum(sum, o[i / 2][2 * r + i % 2], f);
      }
    }
  }

  // By way of a warp's 16 rows of shared memory, `smem`, which it leaves as soon as it can.
  // `first`: the warp's first row in the item.
  __device__ __forceinline__ void store(const AttnParams& args, const Item& item, int first,
                                        uint32_t smem) const {
    const int lane = threadIdx.x % 32;
    const float scale[2] = {final_scale(total_l[0], args.kv.v_scale),
                            final_scale(total_l[1], args.kv.v_scale)};
    wait_for_reads_of_copies();  // those of the work before
    __syncwarp();
    const uint32_t to = smem + lane % 16 * Smem<kDim>::kRow + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = &total[n + i / 2][i % 2 * 2];
        pairs[i] = pack2_out<T>(__fmul_rn(x[0], scale[i % 2]), __fmul_rn(x[1], scale[i % 2]));
      }
      stmatrix_x4(to + 16 * n, pairs);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane < 16 && first + lane < item.rows)
      copy_bytes_out(static_cast<T*>(args.out) + (item.first_row + first + lane) * args.out_stride +
                         item.head * kDim,
                     smem + lane * Smem<kDim>::kRow, 2 * kDim);
    commit_copies();
  }
};

// Caps and masks the scores of a tile and takes the softmax step of attention.cuh, save that P
// stays fp32 in rows.s: the registers that P V in flight reads are written after it (pack).
template <int kDim, typename T, bool kSoftcap>
__device__ __forceinline__ void softmax(Rows<kDim, T>& rows, const PrefillParams& p,
                                        const Item& item, int row, int32_t tile,
                                        float (&alpha)[2]) {
  if constexpr (kSoftcap) cap_scores(rows.s, p.scale);
  const int32_t end = item.position + item.rows - 1;  // rows beyond the item count as its last
  const int32_t position[2] = {min(item.position + row, end), min(item.position + row + 8, end)};
  const int32_t begin = tile * kTile, window = p.attn.args.window;
  const bool whole =
      begin + kTile - 1 <= position[0] && begin >= first_visible(position[1], window);
  if (!__all_sync(0xffffffffu, whole)) mask_scores(rows.s, begin, position, window);

  const float c = p.scale.c;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = rows.m[r];
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) top = fmaxf(top, rows.s[i / 2][2 * r + i % 2]);
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float safe = safe_max(top), minus_mc = -__fmul_rn(safe, c);
    alpha[r] = rescale(rows.m[r], safe, c);
    rows.m[r] = top;
#pragma unroll
    for (int i = 0; i < kTile / 4; ++i) {
      float& s = rows.s[i / 2][2 * r + i % 2];
      s = probability(s, c, minus_mc);
    }
  }
}

// Where a warp is in the rings, from one work to the next.
struct Places {
  Place k, v;
  uint32_t q_phase = 0;
};

template <int kDim, typename T, bool kSoftcap>
__device__ __forceinline__ void compute(const PrefillParams& p, const Item& item,
                                        const Rings<kDim>& rings, Places& places, int warp) {
  const int warpgroup = warp / 4, lane = threadIdx.x % 32, row = warp * 16 + lane / 4;
  const auto release = [&](uint32_t empty) {
    if (lane == 0) arrive(empty);
  };
  auto& [k, v, q_phase] = places;
  Rows<kDim, T> rows;
  wait(rings.q_full(), q_phase);
  q_phase ^= 1;
  rows.init(rings.q(warp * 16), row, item.rows);

  float alpha[2];
  wait(rings.k_full(k.stage), k.phase);
  wgmma_fence();
  rows.issue_scores(rings.k(k.stage));
  wgmma_wait<0>();
  pin(rows.s);
  release(rings.k_empty(k.stage));
  k.advance(kStages);
  arrive(rings.q_empty());  // every thread, now that products have used what it has read of q
  softmax<kDim, T, kSoftcap>(rows, p, item, row, item.first_tile, alpha);
  rows.pack();

  // The first 64 rows may see one tile less. Then the last turn of their warpgroup has no scores.
  const int32_t last_position =
      item.position + min((warpgroup + 1) * kWarpgroupRows, item.rows) - 1;
  const int32_t last_tile = last_position / kTile;
  if (warpgroup == 1 && item.first_tile < item.last_tile) pass_turn(1);
  bool begins_chunk = true;
  for (int32_t tile = item.first_tile; tile < last_tile; ++tile) {
    wait(rings.v_full(v.stage), v.phase);  // has come before the next K
    wait(rings.k_full(k.stage), k.phase);
    await_turn(warpgroup);
    pin(rows.s);
    pin(rows.o);
    pin(rows.p);
    wgmma_fence();
    rows.issue_scores(rings.k(k.stage));
    rows.issue_values(rings.v(v.stage), begins_chunk);
    if (warpgroup == 0 || tile + 1 < item.last_tile) pass_turn(warpgroup);

    rows.add_row_sums();
    wgmma_wait<1>();
    pin(rows.s);
    release(rings.k_empty(k.stage));
    k.advance(kStages);
    const bool ends_chunk = (tile + 1) % kTilesPerChunk == 0;
    const float chunk_m[2] = {rows.m[0], rows.m[1]};
    if (ends_chunk) rows.m[0] = rows.m[1] = -INFINITY;
    softmax<kDim, T, kSoftcap>(rows, p, item, row, tile + 1, alpha);

    pin(rows.s);  // not after P V
    wgmma_wait<0>();
    pin(rows.o);
    pin(rows.s);  // packed only now: P V reads the fragments
    release(rings.v_empty(v.stage));
    v.advance(kStages);
    if (ends_chunk) {
      rows.merge_chunk(chunk_m, p.scale.c);
      rows.clear_sums();
    } else {
      rows.scale_chunk(alpha);
    }
    begins_chunk = ends_chunk;
    rows.pack();
  }

  wait(rings.v_full(v.stage), v.phase);
  const bool has_turn = last_tile < item.last_tile;
  if (has_turn) await_turn(warpgroup);
  pin(rows.o);
  pin(rows.p);
  wgmma_fence();
  rows.issue_values(rings.v(v.stage), begins_chunk);
  if (has_turn) pass_turn(warpgroup);
  rows.add_row_sums();
  wgmma_wait<0>();
  pin(rows.o);
  release(rings.v_empty(v.stage));
  v.advance(kStages);
  if (has_turn) {  // the others' tile
    wait(rings.k_full(k.stage), k.phase);
    release(rings.k_empty(k.stage));
    k.advance(kStages);
    wait(rings.v_full(v.stage), v.phase);
    release(rings.v_empty(v.stage));
    v.advance(kStages);
  }
  rows.merge_chunk(rows.m, p.scale.c);
  rows.store(p.attn, item, 16 * warp, rings.out(16 * warp));
}

template <int kDim, typename T>
__device__ __forceinline__ Rings<kDim> make_rings() {
  extern __shared__ unsigned char smem[];
  constexpr uint32_t kAlign = Smem<kDim>::kAlign;
  const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  Rings<kDim> rings{(base + kAlign - 1) / kAlign * kAlign};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(rings.k_full(i), 1);
      init_barrier(rings.v_full(i), 1);
      init_barrier(rings.k_empty(i), kComputeWarps);
      init_barrier(rings.v_empty(i), kComputeWarps);
    }
    init_barrier(rings.tail(), 1);
    init_barrier(rings.q_full(), 1);
    init_barrier(rings.q_empty(), 32 * kComputeWarps);
  }
  fence_async_proxy();
  __syncthreads();
  return rings;
}

#endif

template <int kDim, typename T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 1)
    attention_prefill_sm90_kernel(const __grid_constant__ PrefillParams p,
                                  const __grid_constant__ CUtensorMap k_map,
                                  const __grid_constant__ CUtensorMap v_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const Rings<kDim> rings = make_rings<kDim, T>();
  if (!p.attn.settled) wait_for_previous();
  const Item first = make_item(p.attn, static_cast<int32_t>(blockIdx.x));
  asm volatile("" ::"r"(first.rows), "l"(first.blocks));  // what it takes comes into the cache
  wait_for_previous();
  let_next_start();
  const int warp = uniform(threadIdx.x / 32);
  if (warp >= kComputeWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == kComputeWarps) load_tiles<kDim>(p, &k_map, &v_map, rings);
    if (warp == kComputeWarps + 1) load_queries<kDim, T>(p, rings);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Places places;
    for_each_work(
        p, [&](const Item& item) { compute<kDim, T, kSoftcap>(p, item, rings, places, warp); });
    wait_for_copies();
  }
#endif
}

// A [blocks][kv heads][slots][d] cache, copied in boxes of `box` slots of one head.
CUtensorMap cache_map(void* data, const KvView& kv, int32_t box) {
  const int64_t block = kv.block_stride > 0 ? kv.block_stride : kv.block_elements();
  const int64_t row = 2 * int64_t{kv.head_dim}, groups = kv.block_size / kAtomRows;
  return make_tensor_map(
      "attention", kv.dtype, data,
      {kAtomCols, kAtomRows, kv.head_dim / kAtomCols, kv.num_kv_heads * groups, kv.num_blocks},
      {row, 2 * kAtomCols, kAtomRows * row, 2 * block},
      {kAtomCols, kAtomRows, kv.head_dim / kAtomCols, box / kAtomRows, 1});
}

template <int kDim, typename T, bool kSoftcap>
void launch_prefill(const AttnParams& p, int32_t num_items, const Card& card, cudaStream_t stream) {
  const auto kernel = attention_prefill_sm90_kernel<kDim, T, kSoftcap>;
  const PrefillParams params{p, score_scale(p.args, p.kv.k_scale), std::gcd(p.kv.block_size, kTile),
                             num_items * p.args.num_heads};
  constexpr size_t kBytes = Smem<kDim>::kBytes;
  allow_smem(kernel, kBytes, "attention_prefill_sm90");
  launch(kernel, static_cast<unsigned>(std::min(params.num_works, card.num_sms)), kThreads, kBytes,
         stream, "attention_prefill_sm90", params, cache_map(p.kv.k, p.kv, params.box),
         cache_map(p.kv.v, p.kv, params.box));
}

}  // namespace

bool attention_prefill_sm90(const AttnParams& p, int32_t num_items, const Card& card,
                            cudaStream_t stream) {
  const int32_t dim = p.kv.head_dim;
  if (card.arch != 90 || (dim != 64 && dim != 128) || p.kv.dtype != p.dtype ||
      p.kv.block_size % 16 != 0 || !is_aligned(p.q, 2 * p.q_stride) ||
      !is_aligned(p.out, 2 * p.out_stride))
    return false;
  if (num_items == 0) return true;
  dispatch_16bit(p.dtype, "attention", [&](auto t) {
    using T = decltype(t);
    if (dim == 64) {
      p.args.softcap > 0 ? launch_prefill<64, T, true>(p, num_items, card, stream)
                         : launch_prefill<64, T, false>(p, num_items, card, stream);
    } else {
      p.args.softcap > 0 ? launch_prefill<128, T, true>(p, num_items, card, stream)
                         : launch_prefill<128, T, false>(p, num_items, card, stream);
    }
  });
  return true;
}

}  // namespace ni::cuda
