// Attention of few query rows (at most kDecodeRows a sequence) over the paged cache, in the
// arithmetic of attention.cuh (flash decoding: Dao et al., 2023), cut along the cache:
//   out[t, h] = softmax(q[t, h] K^T scale) V    over the tokens that row t sees
// Layouts: q, out [T, heads * d]; K, V [block][kv head][slot][d]. A unit of work is (item, kv head,
// row tile): an item is a chunk of 256 tokens or a whole sequence, the 16 rows of a tile are (query
// row, head of the group) pairs, so that K and V are read once for a group. A persistent CTA of 4
// warps walks units; tiles of 64 tokens come through a ring of cp.async copies that does not stop
// between units. Scores: a warp has 16 of the 64 tokens; P V: a warp has a part of the dimensions.
// A sequence of several chunks leaves (m, l, O) of each in the workspace; the CTA that arrives last
// merges them in ascending order.
// Moves tokens * kv_heads * 2 d elements of the cache, a small part of that for partial sums; bound
// by memory bandwidth, by latency where the batch is small.
#include <climits>

#include "cuda/attention.cuh"

namespace ni::cuda {
namespace {

constexpr int kWarps = kDecodeThreads / 32;
static_assert(kTile == 16 * kWarps);

struct DecodeParams {
  AttnParams attn;
  ScoreScale scale;
  int group;      // heads of a kv head
  int row_tiles;  // of 16 rows, for the longest query
  int stages;
  // [max_seqs][num_heads]: chunks that are done of a (sequence, kv head, row tile).
  int32_t* counters;
  // Of an item: (m, l) [kv head][kDecodeRows * group], then O [kv head][kDecodeRows * group][d].
  float* partials;

  __device__ int64_t partial_rows() const {
    return static_cast<int64_t>(kDecodeRows) * attn.args.num_heads;
  }
  __device__ float* partial(int item) const {
    return partials + item * partial_rows() * (attn.kv.head_dim + 2);
  }
};

struct Work {
  int item, seq, kv_head, row_tile;
  int query_begin, query_len, context;
  int tile_begin, tile_end;     // tiles of 64 tokens; at least one
  int first_chunk, num_chunks;  // that some query row of the sequence sees
  int first_item;               // that of chunk 0
  bool is_whole;                // the sequence is one item

  __device__ int rows(int group) const { return query_len * group; }
};

// False: nothing to do, for the chunk lies before the window or the row tile after the last row.
__device__ __forceinline__ bool find_work(const DecodeParams& p, int unit, Work& w) {
  const StepInputs& in = *p.attn.step;
  w.row_tile = unit % p.row_tiles;
  unit /= p.row_tiles;
  w.kv_head = unit % p.attn.kv.num_kv_heads;
  w.item = unit / p.attn.kv.num_kv_heads;
  const AttnItem item = in.decode_items[w.item];
  w.seq = item.seq;
  w.query_begin = in.cu_seqlens_q[w.seq];
  w.query_len = in.cu_seqlens_q[w.seq + 1] - w.query_begin;
  w.context = in.context_lens[w.seq];
  const int first = first_visible(w.context - w.query_len, p.attn.args.window);
  w.first_chunk = first / kKvChunk;
  w.num_chunks = max(1, (w.context + kKvChunk - 1) / kKvChunk - w.first_chunk);
  w.first_item = w.item - item.index;
  w.is_whole = item.index < 0;
  w.tile_begin = first / kTile;
  w.tile_end = max(w.tile_begin + 1, (w.context + kTile - 1) / kTile);
  if (!w.is_whole) {
    w.tile_begin = max(w.tile_begin, item.index * (kKvChunk / kTile));
    w.tile_end = min(w.tile_end, (item.index + 1) * (kKvChunk / kTile));
  }
  return w.row_tile * kMmaRows < w.rows(p.group) && w.tile_begin < w.tile_end;
}

__device__ __forceinline__ int num_units(const DecodeParams& p) {
  return p.attn.step->num_decode_items * p.attn.kv.num_kv_heads * p.row_tiles;
}

// Copies the tiles of this CTA's units into the ring, one after the other, V one tile behind K: the
// buffer of V is free later. Each warp copies its 16 tokens; the table entry of the next tile is
// fetched a tile ahead.
template <typename C, int D>
class Loader {
 public:
  static constexpr int kRowBytes = D * sizeof(C);
  static constexpr int kTileBytes = kTile * kRowBytes;

  __device__ Loader(const DecodeParams& p, uint32_t ring)
      : p_(p), ring_(ring), unit_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {
    advance();
  }
  __device__ uint32_t k_tile(int stage) const { return ring_ + stage * 2 * kTileBytes; }
  __device__ uint32_t v_tile(int stage) const { return k_tile(stage) + kTileBytes; }

  // Whether what issue() copies next was in the cache before this step.
  __device__ bool next_is_old() const {
    return p_.attn.settled && (tile_ + 1) * kTile <= old_tokens_;
  }

  // Two groups of copies: V of the tile that the last call gave K of, then K of the next.
  __device__ __forceinline__ void issue() {
    copy(p_.attn.kv.v, v_tile(stage_ == 0 ? p_.stages - 1 : stage_ - 1));
    offset_ = p_.attn.kv.v_offset(block_, kv_head_, slot_, 0);
    valid_ = next_valid_;
    copy(p_.attn.kv.k, k_tile(stage_));
    if (++stage_ == p_.stages) stage_ = 0;
    advance();
  }

 private:
  static constexpr int kNone = INT_MIN;

  // This warp's 16 rows at offset_.
  __device__ __forceinline__ void copy(const void* cache, uint32_t tile) {
    if (valid_ != kNone)
      copy_rows<16, kRowBytes, kRowBytes>(tile, 16 * (threadIdx.x / 32),
                                          static_cast<const C*>(cache) + offset_, valid_);
    cp_async_commit();
  }

  __device__ __forceinline__ void advance() {
    if (++tile_ >= tile_end_ && !next_unit()) {
      next_valid_ = kNone;
      return;
    }
    const int token = tile_ * kTile + 16 * static_cast<int>(threadIdx.x / 32);
    next_valid_ = context_ - token;
    if (next_valid_ <= 0) return;  // table entries beyond the context are garbage; nothing is read
    const int index = token / p_.attn.kv.block_size;
    slot_ = token - index * p_.attn.kv.block_size;
    block_ = table_[index];
  }

  __device__ __forceinline__ bool next_unit() {
    const int units = num_units(p_);
    Work w;
    do {
      unit_ += gridDim.x;
      if (unit_ >= units) {
        unit_ -= gridDim.x;  // asked again, the answer is the same
        tile_ = tile_end_ = 0;
        return false;
      }
    } while (!find_work(p_, unit_, w));
    const StepInputs& in = *p_.attn.step;
    table_ = in.block_tables + static_cast<int64_t>(w.seq) * in.block_table_stride;
    tile_ = w.tile_begin;
    tile_end_ = w.tile_end;
    context_ = w.context;
    old_tokens_ = w.context - w.query_len;
    kv_head_ = w.kv_head;
    return true;
  }

  const DecodeParams& p_;
  uint32_t ring_;
  int stage_ = 0;
  // The tile that issue() gives K of next.
  int unit_, tile_ = 0, tile_end_ = 0, context_ = 0, old_tokens_ = 0, kv_head_ = 0;
  int block_ = 0, slot_ = 0, next_valid_ = kNone;
  const int32_t* table_ = nullptr;
  // The tile that issue() gives V of next; how many of the warp's rows exist.
  int64_t offset_ = 0;
  int valid_ = kNone;
};

// All but the last 2 * stages - 2 groups have arrived.
__device__ __forceinline__ void wait_for_tiles(int stages) {
  switch (stages) {
    case 1:
      return cp_async_wait<0>();
    case 2:
      return cp_async_wait<2>();
    case 3:
      return cp_async_wait<4>();
    default:
      return cp_async_wait<6>();
  }
}

// Where the result of a packed row lies.
template <typename T>
__device__ __forceinline__ T* out_row(const DecodeParams& p, const Work& w, int row) {
  const int query = row / p.group, head = w.kv_head * p.group + row % p.group;
  return static_cast<T*>(p.attn.out) + (w.query_begin + query) * p.attn.out_stride +
         static_cast<int64_t>(head) * p.attn.kv.head_dim;
}

// The 16 rows of q to shared memory; zeros where there is none.
template <typename C, int D>
__device__ __forceinline__ void load_q(const DecodeParams& p, const Work& w, unsigned char* tile) {
  for (int i = threadIdx.x; i < kMmaRows * (D / 16); i += kDecodeThreads) {
    const int r = i / (D / 16), unit = i % (D / 16);
    const int row = w.row_tile * kMmaRows + r;
    uint4 v[2] = {};
    if (row < w.rows(p.group)) {
      const int query = row / p.group, head = w.kv_head * p.group + row % p.group;
      const uint16_t* from = static_cast<const uint16_t*>(p.attn.q) +
                             (w.query_begin + query) * p.attn.q_stride +
                             static_cast<int64_t>(head) * D + 16 * unit;
      v[0] = *reinterpret_cast<const uint4*>(from);
      v[1] = *reinterpret_cast<const uint4*>(from + 8);
    }
    permute_q<C>(v);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<uint4*>(tile + segment_offset<2 * D>(r, 2 * unit + h)) = v[h];
  }
}

// What one CTA holds of a row tile: every warp has all rows' m and l and its own columns of O,
// units warp, warp + 4, … of 16.
template <int D>
struct Sums {
  static constexpr int kUnits = (D / 16 + kWarps - 1) / kWarps;
  float m[2];
  float l[4];  // an accumulator all of whose columns are equal
  Unit o[kUnits];

  __device__ __forceinline__ void clear() {
    m[0] = m[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i) o[u][i / 4][i % 4] = 0;
  }
  // Multiplies rows g, g + 8.
  __device__ __forceinline__ void scale(const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = __fmul_rn(l[i], alpha[i / 2]);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        o[u][i / 4][i % 4] = __fmul_rn(o[u][i / 4][i % 4], alpha[i % 4 / 2]);
  }
  __device__ __forceinline__ void merge(const Sums& chunk, float c) {
    const MergeFactors f[2] = {merge_max(m[0], chunk.m[0], c), merge_max(m[1], chunk.m[1], c)};
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = merge_sum(l[i], chunk.l[i], f[i / 2]);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        o[u][i / 4][i % 4] = merge_sum(o[u][i / 4][i % 4], chunk.o[u][i / 4][i % 4], f[i % 4 / 2]);
  }
};

// Opaque, or the compiler keeps all multiples of the stride in registers.
template <typename Element>
__device__ __forceinline__ const Element* step_pointer(const Element* at, int64_t bytes) {
  asm volatile("add.s64 %0, %0, %1;" : "+l"(at) : "l"(bytes));
  return at;
}

template <typename T, typename C, int D>
class Decoder {
 public:
  using Tiles = Loader<C, D>;

  __device__ Decoder(const DecodeParams& p, unsigned char* smem)
      : p_(p),
        p_tile_(reinterpret_cast<uint16_t*>(smem)),
        top_(reinterpret_cast<float*>(smem + kMmaRows * kDecodePStride * 2)),
        is_last_(reinterpret_cast<int*>(top_ + kWarps * kMmaRows)),
        q_(smem + kDecodeExtraSmem),
        q_address_(smem_address(q_)),
        tiles_(p, q_address_ + kMmaRows * D * 2) {}

  __device__ void run() {
    // This step's K and V, and q, come from the kernel before; all else may have come already.
    int issued = 0;
    for (; issued < p_.stages && tiles_.next_is_old(); ++issued) tiles_.issue();
    wait_for_previous();
    let_next_start();
    for (; issued < p_.stages; ++issued) tiles_.issue();
    const int units = num_units(p_);
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      Work w;
      if (!find_work(p_, unit, w)) continue;
      Sums<D> total;
      attend(w, total);
      find_work(p_, unit, w);  // again, so that it takes no registers meanwhile
      if (w.is_whole || w.num_chunks == 1) {
        write_out(w, total);
      } else {
        write_partial(w, total);
        if (arrive_last(w)) merge_partials(w);
      }
    }
    cp_async_wait<0>();
  }

 private:
  static constexpr int kUnits = Sums<D>::kUnits;

  static __device__ uint32_t smem_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
  }
  __device__ __forceinline__ int row(int half) const { return lane_ / 4 + 8 * half; }
  __device__ __forceinline__ int packed_row(const Work& w, int half) const {
    return w.row_tile * kMmaRows + row(half);
  }

  // The unit's tiles.
  __device__ __forceinline__ void attend(const Work& w, Sums<D>& total) {
    load_q<C, D>(p_, w, q_);
    if (!has_tiles_) wait_for_tiles(p_.stages);  // the first ones come beside the first q
    has_tiles_ = true;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r)
      position_[r] = w.context - w.query_len + packed_row(w, r) / p_.group;
    Sums<D> chunk;
    chunk.clear();
    total.clear();
    const int end = w.tile_end;
    for (int tile = w.tile_begin; tile < end; ++tile) {
      step(tile, chunk);
      if ((tile + 1) % (kKvChunk / kTile) == 0 || tile + 1 == end) {
        total.merge(chunk, p_.scale.c);  // into nothing: as it is
        chunk.clear();
      }
    }
  }

  __device__ __forceinline__ void step(int tile, Sums<D>& chunk) {
    float s[2][4] = {};  // 16 rows, this warp's 16 tokens
    const int lane = opaque_lane();
#pragma unroll
    for (int k2 = 0; k2 < D / 32; ++k2) {
      uint32_t q[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        ldmatrix_x4(q[k],
                    q_address_ + segment_offset<2 * D>(lane % 16, 4 * k2 + 2 * k + lane / 16));
      Fragments b;
      load_k<T, C, Tiles::kRowBytes>(b, tiles_.k_tile(stage_), 16 * warp_, k2, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mma<T>(s[i % 2], q[i / 2], b[i / 2][i % 2][0], b[i / 2][i % 2][1]);
    }
    cap_and_mask(s, tile);
    share_maxima(s);
    __syncthreads();  // maxima are there; all are done with this K and with the V before
    tiles_.issue();
    softmax(s, chunk);
    wait_for_tiles(p_.stages);
    __syncthreads();  // P, this V and the next K are there
    add_values(chunk);
    if (++stage_ == p_.stages) stage_ = 0;
  }

  __device__ __forceinline__ void cap_and_mask(float (&s)[2][4], int tile) {
    const int token0 = tile * kTile + 16 * warp_ + 2 * (lane_ % 4);
    const int window = p_.attn.args.window;
    const int first[2] = {first_visible(position_[0], window), first_visible(position_[1], window)};
    if (p_.scale.cap > 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i / 4][i % 4] = capped_score(s[i / 4][i % 4], p_.scale);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = token0 + i / 4 * 8 + i % 2, r = i % 4 / 2;
      if (token > position_[r] || token < first[r]) s[i / 4][i % 4] = -INFINITY;
    }
  }

  __device__ __forceinline__ void share_maxima(const float (&s)[2][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      if (lane_ % 4 == 0) top_[warp_ * kMmaRows + row(r)] = top;
    }
  }

  // This warp's 16 columns of P to shared memory; sums are rescaled to the new maximum.
  __device__ __forceinline__ void softmax(const float (&s)[2][4], Sums<D>& chunk) {
    float alpha[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = chunk.m[r];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, top_[w * kMmaRows + row(r)]);
      const float safe = safe_max(top), minus_mc = -__fmul_rn(safe, p_.scale.c);
      alpha[r] = rescale(chunk.m[r], safe, p_.scale.c);
      chunk.m[r] = top;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t pair = pack2<T>(probability(s[n][2 * r], p_.scale.c, minus_mc),
                                       probability(s[n][2 * r + 1], p_.scale.c, minus_mc));
        const int column = 16 * warp_ + 8 * n + 2 * (lane_ % 4);
        *reinterpret_cast<uint32_t*>(p_tile_ + row(r) * kDecodePStride + column) = pair;
      }
    }
    chunk.scale(alpha);
  }

  __device__ __forceinline__ void add_values(Sums<D>& chunk) {
    const int lane = opaque_lane();
    const uint32_t from = smem_address(p_tile_ + lane % 16 * kDecodePStride + lane / 16 * 8);
#pragma unroll
    for (int k2 = 0; k2 < kTile / 32; ++k2) {
      uint32_t a[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        ldmatrix_x4(a[k], from + (2 * k2 + k) * 32);
        mma<T>(chunk.l, a[k], kOnes2<T>, kOnes2<T>);
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = warp_ + u * kWarps;
        if (D / 16 % kWarps != 0 && unit >= D / 16) break;
        Fragments b;
        load_v<T, C, Tiles::kRowBytes>(b, tiles_.v_tile(stage_), 32 * k2, unit, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma<T>(chunk.o[u][i % 2], a[i / 2], b[i / 2][i % 2][0], b[i / 2][i % 2][1]);
      }
    }
  }

  // Calls f(half, packed row, unit of 16 columns, accumulator) for what this lane has.
  template <typename F>
  __device__ __forceinline__ void for_each_unit(const Work& w, const Sums<D>& total, const F& f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (packed_row(w, r) >= w.rows(p_.group)) continue;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = warp_ + u * kWarps;
        if (D / 16 % kWarps == 0 || unit < D / 16) f(r, packed_row(w, r), unit, total.o[u]);
      }
    }
  }

  __device__ __forceinline__ void write_out(const Work& w, const Sums<D>& total) {
    const float scale[2] = {final_scale(total.l[0], p_.attn.kv.v_scale),
                            final_scale(total.l[2], p_.attn.kv.v_scale)};
    for_each_unit(w, total, [&](int half, int packed, int unit, const Unit& o) {
      store_unit<T, C>(out_row<T>(p_, w, packed) + 16 * unit, o, half, scale[half]);
    });
  }

  __device__ __forceinline__ int64_t partial_row(const Work& w, int packed) const {
    return static_cast<int64_t>(w.kv_head) * kDecodeRows * p_.group + packed;
  }

  __device__ __forceinline__ void write_partial(const Work& w, const Sums<D>& total) {
    float* partial = p_.partial(w.item);
    float* sums = partial + 2 * p_.partial_rows();
    for_each_unit(w, total, [&](int half, int packed, int unit, const Unit& o) {
      store_unit_f32<C>(sums + partial_row(w, packed) * D + 16 * unit, o, half);
      if (unit == 0 && lane_ % 4 == 0)
        reinterpret_cast<float2*>(partial)[partial_row(w, packed)] =
            float2{total.m[half], total.l[2 * half]};
    });
  }

  // True in the CTA that is the last of its sequence, kv head and row tile.
  __device__ __forceinline__ bool arrive_last(const Work& w) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t* counter = p_.counters + static_cast<int64_t>(w.seq) * p_.attn.args.num_heads +
                         w.kv_head * p_.row_tiles + w.row_tile;
      *is_last_ = atomicAdd(counter, 1) == w.num_chunks - 1;
      if (*is_last_) *counter = 0;  // as it was found
      __threadfence();
    }
    __syncthreads();
    return *is_last_;
  }

  // All chunks of the row tile, ascending; a thread has 4 columns of a row. Loads bypass L1, which
  // may hold what lay there before.
  __device__ __forceinline__ void merge_partials(const Work& w) {
    constexpr int kVectors = D / 4, kAhead = 8;
    const int rows = min(kMmaRows, w.rows(p_.group) - w.row_tile * kMmaRows);
    const int64_t stride = p_.partial_rows() * (D + 2) * 4;  // bytes from chunk to chunk
    for (int i = threadIdx.x; i < rows * kVectors; i += kDecodeThreads) {
      const int packed = w.row_tile * kMmaRows + i / kVectors, vector = i % kVectors;
      const float* partial = p_.partial(w.first_item + w.first_chunk);
      const float2* ml = reinterpret_cast<const float2*>(partial) + partial_row(w, packed);
      const float4* sums = reinterpret_cast<const float4*>(partial + 2 * p_.partial_rows()) +
                           partial_row(w, packed) * kVectors + vector;
      float m = 0, l = 0, a[4];
      for (int base = 0; base < w.num_chunks; base += kAhead) {
        float2 next_ml[kAhead];
        float4 next[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          next_ml[j] = __ldcg(ml);
          next[j] = __ldcg(sums);
          const int64_t step = base + j + 1 < w.num_chunks ? stride : 0;
          ml = step_pointer(ml, step);
          sums = step_pointer(sums, step);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (base + j >= w.num_chunks) continue;
          const float o[4] = {next[j].x, next[j].y, next[j].z, next[j].w};
          const bool is_first = base + j == 0;
          if (is_first) m = next_ml[j].x;
          const MergeFactors f = merge_max(m, next_ml[j].x, p_.scale.c);
          l = is_first ? next_ml[j].y : merge_sum(l, next_ml[j].y, f);
#pragma unroll
          for (int e = 0; e < 4; ++e) a[e] = is_first ? o[e] : merge_sum(a[e], o[e], f);
        }
      }
      const float scale = final_scale(l, p_.attn.kv.v_scale);
      *reinterpret_cast<uint2*>(out_row<T>(p_, w, packed) + 4 * vector) =
          uint2{pack2_out<T>(__fmul_rn(a[0], scale), __fmul_rn(a[1], scale)),
                pack2_out<T>(__fmul_rn(a[2], scale), __fmul_rn(a[3], scale))};
    }
  }

  const DecodeParams& p_;
  const int lane_ = threadIdx.x % 32, warp_ = threadIdx.x / 32;
  uint16_t* p_tile_;  // P [16][kDecodePStride], 16-bit
  float* top_;        // [warp][16] row maxima
  int* is_last_;
  unsigned char* q_;  // [16][D], 16-bit
  uint32_t q_address_;
  Tiles tiles_;
  int stage_ = 0;
  bool has_tiles_ = false;
  int position_[2];
};

// What fits on Hopper; registers must not be what limits there.
template <typename C, int D>
constexpr int kMinCtas =
    plan_decode(227 * 1024, 228 * 1024, D, static_cast<int>(sizeof(C))).ctas_per_sm;

template <typename T, typename C, int D>
__global__ void __launch_bounds__(kDecodeThreads, (kMinCtas<C, D>))
    decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  if (!p.attn.settled) wait_for_previous();
  Decoder<T, C, D>(p, smem).run();
}

// Where the counters end does not depend on the model, so that a workspace may serve several: what
// is zero for one is for all.
int64_t counter_bytes(int64_t max_seqs) {
  return max_seqs * kMaxAttentionHeads * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace

size_t decode_workspace_bytes(int64_t max_items, int64_t max_seqs, int32_t num_heads,
                              int32_t head_dim) {
  const int64_t partials = max_items * kDecodeRows * num_heads * (head_dim + 2) * 4;
  return static_cast<size_t>(counter_bytes(max_seqs) + partials);
}

void attention_decode(const AttnParams& p, int32_t max_query_len, int64_t max_seqs, void* workspace,
                      const Card& card, cudaStream_t stream) {
  if (max_query_len == 0) return;
  check_attention(p, "attention_decode");
  check_arg(max_query_len > 0 && max_query_len <= kDecodeRows, "attention_decode: ", max_query_len,
            " query rows of a sequence; at most ", kDecodeRows);
  check_arg(p.args.num_heads <= kMaxAttentionHeads, "attention_decode: num_heads ",
            p.args.num_heads, " is above ", kMaxAttentionHeads);
  const int group = p.args.num_heads / p.kv.num_kv_heads;
  const int row_tiles = (max_query_len * group + kMmaRows - 1) / kMmaRows;
  const DecodePlan plan = plan_decode(card.max_smem, card.smem_per_sm, p.kv.head_dim,
                                      static_cast<int>(dtype_size(p.kv.dtype)));
  check_arg(plan.stages > 0, "attention_decode: ", card.max_smem,
            " bytes of shared memory are too few for head_dim ", p.kv.head_dim);
  const DecodeParams params{
      p,
      score_scale(p.args, p.kv.k_scale),
      group,
      row_tiles,
      plan.stages,
      static_cast<int32_t*>(workspace),
      reinterpret_cast<float*>(static_cast<char*>(workspace) + counter_bytes(max_seqs))};
  dispatch_attention(p, "attention_decode", [&](auto type, auto cache, auto head_dim) {
    const auto kernel = decode_kernel<decltype(type), decltype(cache), head_dim()>;
    allow_smem(kernel, static_cast<size_t>(plan.smem), "attention_decode");
    launch(kernel, static_cast<unsigned>(card.num_sms * plan.ctas_per_sm), kDecodeThreads,
           static_cast<size_t>(plan.smem), stream, "attention_decode", params);
  });
}

}  // namespace ni::cuda
