// linear_large on Hopper: y[m, n] = sum over k of x[m, k] W[n, k] (+ bias) for many rows, in the
// canonical order (see linear_skinny.cu), with what follows in a decoder layer:
//   y := round(silu(y[:, :n / 2]) * y[:, n / 2:])     or, of qkv, rope_kv_write() (rope_kv.cu)
// each rounded like the operators of their own, so fused and separate give the same bits; or of
// logits, which then nobody reads, only their units (logit_units.cuh).
//
// Layouts: x [M, x_stride], M >= 128; W [N, w_stride]; K and w_stride multiples of 64. A tile is
// 128 rows of x by kColumns rows of W, gated: half of them of the gate, half of the others. Two
// groups of four warps take tiles in turn: while one makes results of its sums, the tensor core is
// the other's. A warp brings both operands, 64 columns a stage, by the copy engine through a ring
// in shared memory. Two CTAs of a cluster have tiles below each other; each brings half of the rows
// of W for both. Bound by arithmetic, in truth by the power that the card may draw.
// (The order of work follows the "ping-pong" kernels of CUTLASS 3.)
#include "cuda/activation.cuh"
#include "cuda/linear.h"
#include "cuda/linear_large_qkv.cuh"
#include "cuda/linear_plan.h"
#include "cuda/linear_skinny.cuh"
#include "cuda/logit_units.cuh"
#include "cuda/sm90.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

namespace ni::cuda {
namespace {

constexpr int kAtom = 64;  // columns of a box, 128 bytes
constexpr int kTileRows = kLargeTileRows, kGroups = 2, kGroupWarps = 4;
constexpr int kComputeWarps = kGroups * kGroupWarps;

// What follows the product: a gate, or norm, rotation and cache of heads of so many elements, or
// units of logits.
enum class Then { gate, rope_64, rope_128, units };
template <Then kThen>
constexpr bool kRotates = kThen == Then::rope_64 || kThen == Then::rope_128;
template <Then kThen>
constexpr bool kGates = kThen == Then::gate;
template <Then kThen>
constexpr int kHeadDim = kThen == Then::rope_64 ? 64 : 128;

struct Params {
  SkinnyArgs a;
  QkvArgs qkv;
  int n;             // columns of the result
  int num_stages;    // of a tile
  int row_tiles;     // as many as CTAs of a cluster have below each other are one
  int column_tiles;  // of W
  bool vectors;      // out has rows of 16-byte vectors
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty and never launched

// What a cluster does as its i-th: tiles in the order in which they share most in the L2 cache.
struct Item {
  int row_tile, column_tile;

  __device__ Item(const Params& p, int i) {
    constexpr int kBand = 8;  // row tiles
    const int band = i / (kBand * p.column_tiles), rest = i - band * kBand * p.column_tiles;
    const int rows = min(kBand, p.row_tiles - band * kBand);
    column_tile = rest / rows;
    row_tile = band * kBand + rest - column_tile * rows;
  }
};

template <int kColumns>
struct Memory {
  static constexpr int kStages = large_stages(kColumns), kStageBytes = large_stage_bytes(kColumns);
  static constexpr int kXBytes = kTileRows * 128, kOutBytes = large_out_bytes(kColumns);
  uint32_t base, out, barriers;

  __device__ explicit Memory(uint32_t begin)
      : base((begin + kSkinnyAlign - 1) / kSkinnyAlign * kSkinnyAlign),
        out(base + kStages * kStageBytes),
        barriers(out + kOutBytes) {}
  __device__ __forceinline__ uint32_t stage(int i) const { return base + i * kStageBytes; }
  __device__ __forceinline__ uint32_t full(int i) const { return barriers + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return barriers + 8 * (kStages + i); }
  // The tensor core is the group's.
  __device__ __forceinline__ uint32_t turn(int group) const {
    return barriers + 8 * (2 * kStages + group);
  }
};

// The first row of x of this CTA's tile. The last tile is a whole one: rows that the one before it
// has, too, are computed twice.
template <int kCluster>
__device__ __forceinline__ int first_row(const Params& p, const Item& item) {
  return min((item.row_tile * kCluster + cluster_rank<kCluster>()) * kTileRows,
             static_cast<int>(p.a.rows) - kTileRows);
}

template <int kColumns, Then kThen, int kCluster>
__device__ __forceinline__ void copy(const Params& p, const Memory<kColumns>& memory, int items,
                                     const CUtensorMap* w_map, const CUtensorMap* x_map) {
  using Ring = Memory<kColumns>;
  constexpr int kHalf = kColumns / 2, kHalfBytes = kHalf * 128;
  const int rank = cluster_rank<kCluster>(), clusters = static_cast<int>(gridDim.x) / kCluster;
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  prefetch_map(w_map);
  prefetch_map(x_map);
  wait_for_previous();
  Place place;
  for (int i = first; i < items; i += clusters) {
    const Item item(p, i);
    const int row = first_row<kCluster>(p, item);
    const auto copy_half = [&](int half, int stage, int atom) {
      const int from = kGates<kThen> ? half * p.n + item.column_tile * kHalf
                                     : item.column_tile * kColumns + half * kHalf;
      const uint32_t to = memory.stage(stage) + Ring::kXBytes + half * kHalfBytes;
      copy_box_to_cluster<kCluster>(to, w_map, kAtom * atom, from, memory.full(stage));
    };
    for (int atom = 0; atom < p.num_stages; ++atom, place.advance(Ring::kStages)) {
      wait(memory.empty(place.stage), place.phase ^ 1);  // at first they are
      arrive_expecting(memory.full(place.stage), Ring::kStageBytes);
      copy_box(memory.stage(place.stage), x_map, kAtom * atom, row, memory.full(place.stage));
      if constexpr (kCluster == 2) {
        copy_half(rank, place.stage, atom);
      } else {
        copy_half(0, place.stage, atom);
        copy_half(1, place.stage, atom);
      }
    }
  }
  let_next_start();
}

template <typename T, int kColumns, Then kThen, int kCluster>
struct Group {
  using Ring = Memory<kColumns>;
  static constexpr int kBlocks = kTileRows / 64, kTiles = kColumns / 8;

  const Params& p;
  const Ring& memory;
  int group, warp, lane;  // the warp of this group
  float acc[kBlocks][kTiles][4];
  QkvRows<T, kHeadDim<kThen>> qkv;

  __device__ Group(const Params& params, const Ring& m, int warp_of_all, int my_lane)
      : p(params),
        memory(m),
        group(warp_of_all / kGroupWarps),
        warp(warp_of_all % kGroupWarps),
        lane(my_lane),
        qkv(p.a, p.qkv, memory.out + warp_of_all * qkv.kStagedBytes, lane) {}

  // The sums of the group's number `count` (of both groups: 2 count + group), which takes its turn
  // at the tensor core.
  __device__ __forceinline__ void multiply(int count) {
    const int before = (2 * count + group) * p.num_stages;
    Place place{before % Ring::kStages, static_cast<uint32_t>(before / Ring::kStages) & 1};
    const uint32_t begin = uniform(memory.base / 16);
    uint32_t stage_at = begin + uniform(place.stage) * (Ring::kStageBytes / 16);
    int left = Ring::kStages - uniform(place.stage);
    wait(memory.turn(group), static_cast<uint32_t>(count + 1 - group) & 1);
    wait(memory.full(place.stage), place.phase);
    uint32_t before_this = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(acc[b]);
    wgmma_fence();
    for (int stage = 0; stage < p.num_stages; ++stage) {
      wait(memory.full(place.stage), place.phase);
#pragma unroll
      for (int i = 0; i < kAtom / 16; ++i)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
          wgmma_shared<T>(acc[b], stage_at + b * (64 * 128 / 16) + 2 * i,
                          stage_at + Ring::kXBytes / 16 + 2 * i, i > 0 || stage > 0);
      wgmma_commit();
      if (stage > 0) {
        wgmma_wait<1>();
        give_back(before_this);
      }
      before_this = memory.empty(place.stage);
      place.advance(Ring::kStages);
      stage_at += Ring::kStageBytes / 16;
      if (--left == 0) stage_at = begin, left = Ring::kStages;
    }
    if (lane == 0) arrive(memory.turn(1 - group));
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(acc[b]);
    give_back(before_this);
  }
  // To all CTAs that copy into the stage.
  __device__ __forceinline__ void give_back(uint32_t empty) const {
    if (lane < kCluster) arrive_in_cluster<kCluster>(empty, lane);
  }

  // -- By way of shared memory, 16 rows of half of the columns at a time, so that rows leave as
  // vectors. 16-byte chunks change places, so that a warp's rows lie in different banks. --

  __device__ __forceinline__ uint32_t staged(int row, int chunk) const {
    constexpr int kHalf = kTiles / 2;
    const int swap = kHalf % 8 == 0 ? row % 8 : kHalf % 4 == 0 ? row / 2 % 4 : row / 4 % 2;
    return memory.out + ((group * kGroupWarps + warp) * 16 + row) * (16 * kHalf) +
           16 * (chunk ^ swap);
  }
  static __device__ __forceinline__ float2 products(const float* v) {
    return pair_of_bits<T>(bits_of_pair<T>(v[0], v[1]));
  }
  static __device__ __forceinline__ uint32_t gated(const float* gate, const float* other) {
    const float2 g = products(gate), o = products(other);
    return rounded_pair<T>(activate<Activation::silu>(g.x) * o.x,
                           activate<Activation::silu>(g.y) * o.y);
  }

  __device__ __forceinline__ void store(const Item& item) {
    if constexpr (!kGates<kThen> && !kRotates<kThen>) {
      store_units_of(item);
    } else {
      if (p.a.bias != nullptr) add_bias(item);
      if constexpr (kRotates<kThen>) {
        qkv.store(acc);
      } else {
        store_gated(item);
      }
    }
  }
  __device__ __forceinline__ void store_gated(const Item& item) const {
    constexpr int kHalf = kTiles / 2, kStored = kHalf / 2;  // stored: vectors, by a lane
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      __syncwarp();  // what was there is stored
#pragma unroll
      for (int t = 0; t < kHalf; ++t)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          asm volatile(
              "st.shared.u32 [%0], %1;" ::"r"(staged(lane / 4 + i / 2 * 8, t) + lane % 4 * 4),
              "r"(gated(&acc[b][t][i], &acc[b][kHalf + t][i]))
              : "memory");
      __syncwarp();
      const int row0 = warp_row(item, b);
      const int col0 = 8 * kHalf * item.column_tile;
#pragma unroll 2
      for (int j = 0; j < kStored; ++j) {
        const int row = (lane + 32 * j) / kHalf, chunk = (lane + 32 * j) % kHalf;
        store_vector(load_staged(row, chunk), row0 + row, col0 + 8 * chunk);
      }
    }
  }
  // The first of a block's 16 rows of x that are this warp's.
  __device__ __forceinline__ int warp_row(const Item& item, int b) const {
    return first_row<kCluster>(p, item) + 64 * b + 16 * warp;
  }
  __device__ __forceinline__ uint4 load_staged(int row, int chunk) const {
    uint4 bits;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(staged(row, chunk))
                 : "memory");
    return bits;
  }
  __device__ __forceinline__ void store_vector(const uint4& bits, int row, int col) const {
    T* out = static_cast<T*>(p.a.out) + int64_t{row} * p.a.out_stride + col;
    if (p.vectors && col + 8 <= p.n) {
      *reinterpret_cast<uint4*>(out) = bits;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (col + i < p.n) out[i] = reinterpret_cast<const T*>(&bits)[i];
    }
  }
  __device__ __forceinline__ void add_bias(const Item& item) {
    constexpr int kStrips = kGates<kThen> ? kTiles / 2 : kTiles;  // of the result
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = t / kStrips, strip = t % kStrips;
          const int col = 8 * (kStrips * item.column_tile + strip) + lane % 4 * 2 + i % 2;
          if (col < p.n) acc[b][t][i] = with_bias<T>(p.a, acc[b][t][i], half * p.n + col);
        }
  }

  // What memory has for the results is on its way while the products are made.
  __device__ __forceinline__ void look_up(const Item& item) {
    if constexpr (kThen == Then::units) look_up_units(item);
    if constexpr (kRotates<kThen>) qkv.look_up(warp_row(item, 0), item.column_tile);
  }

  // -- Units of logits: how its 32 rows are sampled a warp keeps where others have results --

  __device__ __forceinline__ uint32_t unit_row(int in_warp) const {
    static_assert(kComputeWarps * 32 * 32 <= Ring::kOutBytes);
    return memory.out + ((group * kGroupWarps + warp) * 32 + in_warp) * 32;
  }
  __device__ __forceinline__ void look_up_units(const Item& item) const {
    const int row = warp_row(item, lane / 16) + lane % 16;
    const UnitRow how(p.a.units.step->sampling[p.a.units.first + row]);
    const float* draws = how.draws.v;
    __syncwarp();  // those of the tile before are used
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(unit_row(lane)), "f"(draws[0]),
                 "f"(draws[1]), "f"(draws[2]), "f"(draws[3])
                 : "memory");
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(unit_row(lane) + 16), "f"(how.factor) : "memory");
    __syncwarp();
  }
  __device__ __forceinline__ void store_units_of(const Item& item) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      UnitRow rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t from = unit_row(16 * b + 8 * i + lane / 4);
        float* draws = rows[i].draws.v;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(draws[0]), "=f"(draws[1]), "=f"(draws[2]), "=f"(draws[3])
                     : "r"(from)
                     : "memory");
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(rows[i].factor) : "r"(from + 16) : "memory");
      }
      LogitUnit* const units = p.a.units.units + (warp_row(item, b) + lane / 4) * logit_units(p.n);
      store_units(acc[b], rows, kColumns * item.column_tile, p.n, {true, true},
                  {units, units + 8 * logit_units(p.n)});
    }
  }
};

#endif

template <typename T, int kColumns, Then kThen, int kCluster>
__global__ void __launch_bounds__(32 * (kComputeWarps + kGroupWarps), 1)
    linear_large_sm90_kernel(const __grid_constant__ Params p,
                             const __grid_constant__ CUtensorMap w_map,
                             const __grid_constant__ CUtensorMap x_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char smem[];
  const Memory<kColumns> memory(static_cast<uint32_t>(__cvta_generic_to_shared(smem)));
  if (threadIdx.x == 0) {
    for (int i = 0; i < memory.kStages; ++i) {
      init_barrier(memory.full(i), 1);
      init_barrier(memory.empty(i), kCluster * kGroupWarps);
    }
    for (int i = 0; i < kGroups; ++i) init_barrier(memory.turn(i), kGroupWarps);
    fence_async_proxy();
  }
  synchronise_cluster<kCluster>();
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int items = p.row_tiles * p.column_tiles;
  const int clusters = static_cast<int>(gridDim.x) / kCluster;
  if (warp >= kComputeWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == kComputeWarps && lane == 0)
      copy<kColumns, kThen, kCluster>(p, memory, items, &w_map, &x_map);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    Group<T, kColumns, kThen, kCluster> group(p, memory, warp, lane);
    int count = 0;
    if (!p.a.settled) wait_for_previous();
    for (int i = static_cast<int>(blockIdx.x) / kCluster + group.group * clusters; i < items;
         i += 2 * clusters, ++count) {
      const Item item(p, i);
      group.look_up(item);
      group.multiply(count);
      group.store(item);
    }
  }
  synchronise_cluster<kCluster>();  // others copy into this CTA's memory and use its barriers
#endif
}

template <typename T, int kColumns, Then kThen, int kCluster>
void launch_large(const SkinnyArgs& a, const QkvArgs& qkv, const Card& card, cudaStream_t stream) {
  constexpr int kHalf = kColumns / 2, kWidth = kGates<kThen> ? kHalf : kColumns;
  constexpr int kRows = kTileRows * kCluster;
  const int n = static_cast<int>(kGates<kThen> ? a.out_features / 2 : a.out_features);
  const Params p{a,
                 qkv,
                 n,
                 static_cast<int>(a.in_features / kAtom),
                 static_cast<int>((a.rows + kRows - 1) / kRows),
                 (n + kWidth - 1) / kWidth,
                 is_vector_aligned(a.out, a.out_stride)};
  const CUtensorMap w_map = make_tensor_map("linear", a.dtype, a.w, {a.in_features, a.out_features},
                                            {2 * a.w_stride}, {kAtom, kHalf});
  const CUtensorMap x_map = make_tensor_map("linear", a.dtype, a.x, {a.in_features, a.rows},
                                            {2 * a.x_stride}, {kAtom, kTileRows});
  static_assert(large_stages(kColumns) >= 4 && kHalf * 128 % kSkinnyAlign == 0);
  const auto kernel = linear_large_sm90_kernel<T, kColumns, kThen, kCluster>;
  const size_t smem = static_cast<size_t>(large_smem(kColumns));
  allow_smem(kernel, smem, "linear_large");
  const int clusters = std::min(card.num_sms / kCluster, p.row_tiles * p.column_tiles);
  launch_clusters(kCluster, kernel, static_cast<unsigned>(kCluster * clusters),
                  32 * (kComputeWarps + kGroupWarps), smem, stream, "linear_large", p, w_map,
                  x_map);
}

// Whether the kernels take this rotation: heads of 64 or 128 that turn as a whole or not at all,
// and a cache of the activations' type.
bool fits(const SkinnyArgs& a, const RopeKvWrite& write) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // of places in the cache
  const RopeArgs& rope = write.rope;
  const KvView& kv = write.kv;
  return !a.gated && (kv.head_dim == 64 || kv.head_dim == 128) && kv.dtype == a.dtype &&
         kv.tile() == 1 && (rope.cos == nullptr || rope.rotary_dim == kv.head_dim) &&
         (rope.q_norm.weight != nullptr) == (rope.k_norm.weight != nullptr) &&
         (rope.cos != nullptr || rope.q_norm.weight == nullptr) &&
         a.out_features % kv.head_dim == 0 && a.out_features / kv.head_dim > 2 * kv.num_kv_heads &&
         kv.head_offset(1, 0) % kv.head_dim == 0 &&
         kv.head_offset(kv.num_blocks, 0) / kv.head_dim < kLimit &&
         int64_t{kv.num_blocks} * kv.block_size < kLimit &&
         is_vector_aligned(a.out, a.out_stride) && is_vector_aligned(kv.k, kv.block_stride) &&
         is_vector_aligned(kv.v, kv.block_stride) && is_vector_aligned(rope.cos, 0) &&
         is_vector_aligned(rope.sin, 0) && is_vector_aligned(rope.q_norm.weight, 0) &&
         is_vector_aligned(rope.k_norm.weight, 0);
}

bool has_smem(const Card& card) {
  return card.max_smem >= std::max(large_smem(128), large_smem(192));
}

}  // namespace

bool fuses_large(const SkinnyArgs& a, const RopeKvWrite* rope, const Card& card) {
  const bool is_gate = a.gated && a.act == Activation::silu && a.out_features % 2 == 0;
  return card.arch == 90 && (rope != nullptr ? fits(a, *rope) : is_gate) &&
         a.norm.weight == nullptr && !a.accumulate && a.in_features % kAtom == 0 &&
         a.x_stride % 8 == 0 && a.out_dtype == a.dtype && a.rows >= kTileRows && has_smem(card);
}

bool makes_units_large(const SkinnyArgs& a, const Card& card) {
  return card.arch == 90 && a.out_dtype == DType::f32 && a.norm.weight == nullptr && !a.gated &&
         a.bias == nullptr && a.in_features % kAtom == 0 && a.x_stride % 8 == 0 &&
         a.rows >= kTileRows && has_smem(card);
}

void linear_large_sm90(const SkinnyArgs& a, const RopeKvWrite* rope, const Card& card,
                       cudaStream_t stream) {
  const bool units = a.units.units != nullptr;
  check_invariant(units ? makes_units_large(a, card) : fuses_large(a, rope, card),
                  "linear_large: made for other products");
  dispatch_16bit(a.dtype, "linear", [&](auto type) {
    using T = decltype(type);
    const auto with_cluster = [&](auto cluster) {
      constexpr int kCluster = decltype(cluster)::value;
      if (rope != nullptr) {
        const KvView& kv = rope->kv;
        const int heads = static_cast<int>(a.out_features / kv.head_dim) - 2 * kv.num_kv_heads;
        const QkvArgs r{rope->in->positions, rope->in->slot_mapping, rope->rope, kv, heads};
        if (kv.head_dim == 64)
          return launch_large<T, 128, Then::rope_64, kCluster>(a, r, card, stream);
        return launch_large<T, 128, Then::rope_128, kCluster>(a, r, card, stream);
      }
      const int clusters = std::max(1, card.num_sms / kCluster);
      const int columns = large_columns(a.rows, a.out_features, clusters, kCluster);
      const auto with_columns = [&](auto then) {
        constexpr Then kThen = decltype(then)::value;
        if (columns == 128) return launch_large<T, 128, kThen, kCluster>(a, {}, card, stream);
        if (columns == 160) return launch_large<T, 160, kThen, kCluster>(a, {}, card, stream);
        launch_large<T, 192, kThen, kCluster>(a, {}, card, stream);
      };
      if (units) return with_columns(std::integral_constant<Then, Then::units>{});
      with_columns(std::integral_constant<Then, Then::gate>{});
    };
    if (has_clusters()) return with_cluster(std::integral_constant<int, 2>{});
    with_cluster(std::integral_constant<int, 1>{});
  });
}

}  // namespace ni::cuda
