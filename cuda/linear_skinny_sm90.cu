// linear_skinny on Hopper: y[m, n] = sum over k of x[m, k] W[n, k] (+ bias) for few rows, in the
// canonical order (see linear_skinny.cu), with what stands before and after it in a decoder layer:
//   x := norm(x);   y := round(act(y[:, :n / 2]) * y[:, n / 2:]);   y := round(out + y)
// each rounded like the operators of their own, so fused and separate give the same bits.
//
// Layouts: x [M, x_stride], W [N, w_stride], K and w_stride multiples of 64. A CTA goes through
// tiles of up to 16 strips of 16 weight rows (gated: 8 of the gate and their 8 others); one warp
// brings boxes of 64 columns by the copy engine through a ring in shared memory (128-byte swizzle),
// up to 8 warps multiply 1 or 2 strips each, or 2 or 4 warps a strip, 16 rows of x each. x comes
// through the same ring, or is normalised into shared memory as a whole by every CTA. W is the A
// operand (16 rows), x the B operand (8 rows), both read by ldmatrix. Moves N * K * 2 bytes once;
// bound by bandwidth. What that takes: some 50 KB in flight on every multiprocessor from the
// kernel's first moment on (the ring fills while the kernel before still works: weights depend on
// nobody), strips spread evenly, and a warp that only copies, since issuing a copy takes longer
// than the product of what it brings. For short N the chain of K / 16 dependent products (25 cycles
// each) is the bound, so the loop around it is straight code: a stage without branches, operands
// loaded ahead.
#include "cuda/activation.cuh"
#include "cuda/attention.cuh"
#include "cuda/linear.h"
#include "cuda/linear_plan.h"
#include "cuda/linear_skinny.cuh"
#include "cuda/sm90.cuh"
#include "cuda/tensor_map.h"

namespace ni::cuda {
namespace {

constexpr int kAtom = 64;  // columns of a box, 128 bytes
constexpr int kStripRows = SkinnySm90Plan::kStripRows;
constexpr int kMaxWarps = 8;  // that compute, and that normalise
constexpr int kMaxThreads = 32 * (kMaxWarps + 1);
constexpr int kShareThreads = 32 * (kSkinnyShareWarps + 1);

struct Params {
  SkinnyArgs a;
  SkinnySm90Plan plan;
  int n, k;                   // of the result (half of W's rows if gated), and of the sum
  int num_tiles, num_stages;  // stages of a tile
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr int kStripBytes = kStripRows * 128;  // of an atom

// Shared memory: the ring, x as a whole (or nothing) with the norm's weights and sums, barriers.
struct Memory {
  uint32_t base, x, barriers;
  int stage_bytes, stages;

  __device__ Memory(uint32_t begin, const SkinnySm90Plan& plan)
      : base((begin + kSkinnyAlign - 1) / kSkinnyAlign * kSkinnyAlign),
        x(base + plan.stages * plan.stage_bytes),
        barriers(x + plan.x_bytes),
        stage_bytes(plan.stage_bytes),
        stages(plan.stages) {}
  __device__ __forceinline__ uint32_t stage(int i) const { return base + i * stage_bytes; }
  __device__ __forceinline__ uint32_t full(int i) const { return barriers + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return barriers + 8 * (stages + i); }
};

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// -- The warp that copies -------------------------------------------------------------------------

// Where a stage lies in the CTA's tiles. (No divisions: they take longer than a copy.)
struct Source {
  int tile, stage = 0;
  __device__ __forceinline__ void advance(const Params& p) {
    if (++stage < p.num_stages) return;
    stage = 0;
    tile += gridDim.x;
  }
};

template <int kRows, int kAtoms, bool kNorm>
__device__ __forceinline__ void copy(const Params& p, const Memory& memory,
                                     const CUtensorMap* w_map, const CUtensorMap* x_map) {
  const SkinnySm90Plan& plan = p.plan;
  const int box_rows = kStripRows / (p.a.gated ? 2 : 1) * plan.tile;
  // Of x no more rows are copied than there are: filling in zeros takes its time, too.
  const int x_bytes = kNorm ? 0 : 128 * min(kRows, static_cast<int>(p.a.rows));
  const int bytes = kAtoms * (plan.tile * kStripBytes + x_bytes);

  const auto copy_w = [&](const Source& from, int stage) {
    const uint32_t to = memory.stage(stage), barrier = memory.full(stage);
    const int row = from.tile * box_rows;
    arrive_expecting(barrier, bytes);
    if (!p.a.gated) {
      copy_box(to, w_map, 0, row, from.stage * kAtoms, barrier);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2 * kAtoms; ++i)  // of an atom the gate's rows, then the others
      copy_box(to + i * box_rows * 128, w_map, 0, i % 2 * p.n + row, from.stage * kAtoms + i / 2,
               barrier);
  };
  const auto copy_x = [&](const Source& from, int stage) {
    const uint32_t to = memory.stage(stage) + kAtoms * plan.tile * kStripBytes;
#pragma unroll
    for (int i = 0; i < kAtoms; ++i)
      copy_box(to + i * kRows * 128, x_map, (from.stage * kAtoms + i) * kAtom, blockIdx.y * kRows,
               memory.full(stage));
  };

  // The first stages of the weights come while the kernel before ends.
  if (!p.a.settled) wait_for_previous();
  const Source begin{static_cast<int>(blockIdx.x)};
  Source next = begin;
  int ahead = 0;
  for (; ahead < plan.stages && next.tile < p.num_tiles; ++ahead, next.advance(p))
    copy_w(next, ahead);
  wait_for_previous();
  // The next kernel's ring shall fill while this one's last stages are multiplied, not before.
  if (next.tile >= p.num_tiles) let_next_start();
  if (!kNorm) {
    Source from = begin;
    for (int stage = 0; stage < ahead; ++stage, from.advance(p)) copy_x(from, stage);
  }
  if (next.tile >= p.num_tiles) return;
  Place place;
  for (; next.tile < p.num_tiles; next.advance(p), place.advance(plan.stages)) {
    wait(memory.empty(place.stage), place.phase);
    copy_w(next, place.stage);
    if (!kNorm) copy_x(next, place.stage);
  }
  let_next_start();
}

// -- The warps that compute -----------------------------------------------------------------------

__device__ __forceinline__ void synchronise_normalisers() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kMaxWarps) : "memory");
}

// x as a whole, rows x_stride bytes apart, normalised as norm.cu does it, to the bit; zeros behind
// the last column, which meet zeros of W but may not be NaN. By kMaxWarps warps.
template <typename T>
__device__ __forceinline__ void normalise(const Params& p, const Memory& memory) {
  using Elements = Vec<T, 8>;
  constexpr int kThreads = 32 * kMaxWarps, kAhead = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = static_cast<int>(p.a.rows), vectors = p.k / 8;
  const uint32_t weights = memory.x + rows * p.plan.x_stride, sums = weights + p.k * 4;
  const auto place = [&](int row, int vector) {
    return memory.x + row * p.plan.x_stride + 16 * vector;
  };
  if (!p.a.settled) wait_for_previous();
  for (int i = threadIdx.x; i < p.k / 4; i += kThreads)
    store_shared(weights + 16 * i, reinterpret_cast<const uint4*>(p.a.norm.weight)[i]);
  for (int row = 0; row < rows; ++row)
    for (int v = vectors + threadIdx.x; v < p.num_stages * p.plan.atoms * (kAtom / 8);
         v += kThreads)
      store_shared(place(row, v), uint4{0, 0, 0, 0});
  wait_for_previous();

  // What a warp of norm.cu sums is a part; kAhead of them are on their way at once.
  const T* x = static_cast<const T*>(p.a.x);
  const int parts = norm_threads(vectors) / 32;  // of a row
  int row = 0, part = warp;
  while (part >= parts) part -= parts, ++row;
  while (row < rows) {
    float sum[kAhead];
    uint32_t to[kAhead];
    int rows_of[kAhead], parts_of[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      sum[j] = 0;
      rows_of[j] = row;
      parts_of[j] = part;
      to[j] = sums + 4 * (row * 16 + part);
      part += kMaxWarps;
      while (part >= parts) part -= parts, ++row;
    }
    for (int item = lane; item < vectors; item += 32 * parts) {
      Elements e[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (const int v = item + 32 * parts_of[j]; v < vectors && rows_of[j] < rows)
          e[j] = reinterpret_cast<const Elements*>(x + rows_of[j] * p.a.x_stride)[v];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int v = item + 32 * parts_of[j];
        if (v >= vectors || rows_of[j] >= rows) continue;
        store_shared(place(rows_of[j], v), *reinterpret_cast<const uint4*>(&e[j]));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float h = as_float(e[j].v[i]);
          sum[j] = __fmaf_rn(h, h, sum[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const float total = warp_sum(sum[j]);
      if (lane == 0 && rows_of[j] < rows)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to[j]), "f"(total) : "memory");
    }
  }
  synchronise_normalisers();
  for (int r = warp; r < rows; r += kMaxWarps) {
    float sum = 0;
    if (lane < parts)
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(sum) : "r"(sums + 4 * (r * 16 + lane)));
    const float variance = warp_sum(sum) / static_cast<float>(p.k);
    if (lane == 0)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(sums + 64 * r),
                   "f"(rsqrtf(variance + p.a.norm_eps))
                   : "memory");
  }
  synchronise_normalisers();
  for (int r = 0; r < rows; ++r) {
    float factor;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(factor) : "r"(sums + 64 * r) : "memory");
    for (int v = threadIdx.x; v < vectors; v += kThreads) {
      const uint4 raw = load_shared(place(r, v));
      const uint4 w[2] = {load_shared(weights + 32 * v), load_shared(weights + 32 * v + 16)};
      Elements e = *reinterpret_cast<const Elements*>(&raw);
      const float* weight = reinterpret_cast<const float*>(w);
#pragma unroll
      for (int i = 0; i < 8; ++i) e.v[i] = from_float<T>(as_float(e.v[i]) * factor * weight[i]);
      store_shared(place(r, v), *reinterpret_cast<const uint4*>(&e));
    }
  }
  synchronise_normalisers();
}

// One tile's products of one warp: kStrips strips with kTiles times 8 rows of x.
template <typename T, int kRows, int kTiles, int kStrips, int kAtoms, bool kNorm>
struct Tile {
  // Groups of 16 columns whose operands are loaded together, ahead of their products; an even
  // number of such batches makes a stage.
  static constexpr int kBatch = kAtoms > 1 && kTiles* kStrips <= 2 ? 4 : 2;
  static constexpr int kBatches = 4 * kAtoms / kBatch;
  struct Operands {
    uint32_t w[kBatch][kStrips][4], x[kBatch / 2][kTiles][4];  // x: two groups
  };

  const Params& p;
  const Memory& memory;
  Place place;  // of the present stage
  float acc[kStrips][kTiles][4];
  uint32_t w_offset, x_offset[kTiles], strip_offset[kStrips];
  uint32_t w_at, x_at;  // of the present stage
  int strip, first;     // the warp's first strip in the tile, and row of x
  int rows;             // of x that exist

  __device__ Tile(const Params& params, const Memory& m, int warp, int lane)
      : p(params), memory(m), x_at(m.x) {
    rows = min(kRows, static_cast<int>(p.a.rows) - static_cast<int>(blockIdx.y) * kRows);
    constexpr bool kShared = kTiles < kRows / 8;
    strip = kShared ? warp / p.plan.shares : warp * kStrips;
    first = kShared ? warp % p.plan.shares * (8 * kTiles) : 0;
    // ldmatrix takes from each lane the address of a row of a quarter. Of W: rows 0 to 7, 8 to 15
    // of the first 8 columns, then of the others. Of x: 8 columns after the other.
    w_offset = lane % 8 * 128 + ((lane / 16 ^ lane % 8) << 4) +
               lane / 8 % 2 * (p.a.gated ? p.plan.tile : 1) * (kStripBytes / 2);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int row = min(first + 8 * t + lane % 8, rows - 1);  // what does not exist is not stored
      x_offset[t] =
          kNorm ? row * p.plan.x_stride + lane / 8 * 16 : row * 128 + ((lane / 8 ^ row % 8) << 4);
    }
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
      strip_offset[s] = (strip + s) * (p.a.gated ? kStripBytes / 2 : kStripBytes);
  }

  __device__ __forceinline__ void enter_stage(int index) {
    wait(memory.full(place.stage), place.phase);
    w_at = memory.stage(place.stage);
    x_at = kNorm ? memory.x + index * (kAtoms * 128) : w_at + kAtoms * p.plan.tile * kStripBytes;
  }

  __device__ __forceinline__ void load(Operands& o, int batch) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int atom = (batch * kBatch + i) / 4, group = (batch * kBatch + i) % 4;
      const uint32_t w = w_at + atom * p.plan.tile * kStripBytes + (w_offset ^ group << 5);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) ldmatrix_x4(o.w[i][s], w + strip_offset[s]);
      if (i % 2 != 0) continue;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        ldmatrix_x4(o.x[i / 2][t], kNorm ? x_at + x_offset[t] + atom * 128 + group * 32
                                         : x_at + atom * kRows * 128 + (x_offset[t] ^ group << 5));
    }
  }

  __device__ __forceinline__ void multiply(const Operands& o) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int s = 0; s < kStrips; ++s)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          mma<T>(acc[s][t], o.w[i][s], o.x[i / 2][t][i % 2 * 2], o.x[i / 2][t][i % 2 * 2 + 1]);
  }

  // The tile's sums. A stage is given back when all of it has been multiplied: until ldmatrix has
  // read, no copy may write.
  __device__ __forceinline__ void run(int lane) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[s][t][i] = 0;
    Operands o[2];
    enter_stage(0);
    load(o[0], 0);
    for (int stage = 0; stage < p.num_stages; ++stage) {
      const uint32_t empty = memory.empty(place.stage);
#pragma unroll
      for (int b = 0; b < kBatches; ++b) {
        if (b + 1 < kBatches) {
          load(o[(b + 1) % 2], b + 1);
        } else {
          place.advance(p.plan.stages);
          if (stage + 1 < p.num_stages) {
            enter_stage(stage + 1);
            load(o[0], 0);
          }
        }
        multiply(o[b % 2]);
      }
      __syncwarp();
      if (lane == 0) arrive(empty);
    }
  }

  // Accumulators 0 and 1 belong to the strip's row lane / 4, 2 and 3 to the eighth after.
  __device__ __forceinline__ void store(int tile, int lane) const {
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int index = tile * p.plan.tile + strip + s;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = first + 8 * t + lane % 4 * 2 + i;
          if (row >= rows) continue;
          const int64_t to = (first_row + row) * p.a.out_stride;
          if (p.a.gated) {
            const int col = 8 * index + lane / 4;
            if (col >= p.n) continue;
            const T gate = round_linear<T>(with_bias<T>(p.a, acc[s][t][i], col));
            const T other = round_linear<T>(with_bias<T>(p.a, acc[s][t][2 + i], p.n + col));
            static_cast<T*>(p.a.out)[to + col] =
                from_float<T>(activate(p.a.act, as_float(gate)) * as_float(other));
            continue;
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int col = kStripRows * index + 8 * half + lane / 4;
            if (col < p.n)
              store_linear<T>(p.a, to + col, with_bias<T>(p.a, acc[s][t][2 * half + i], col));
          }
        }
      }
    }
  }
};

#endif

template <typename T, int kRows, int kTiles, int kStrips, int kAtoms, bool kNorm>
__global__ void __launch_bounds__(kTiles < kRows / 8 ? kShareThreads : kMaxThreads,
                                  kRows <= 16 ? 2 : 1)
    linear_skinny_sm90_kernel(const __grid_constant__ Params p,
                              const __grid_constant__ CUtensorMap w_map,
                              const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ unsigned char smem[];
  const Memory memory(static_cast<uint32_t>(__cvta_generic_to_shared(smem)), p.plan);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.plan.stages; ++i) {
      init_barrier(memory.full(i), 1);
      init_barrier(memory.empty(i), p.plan.warps);
    }
    fence_async_proxy();
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform for the compiler too
  const int lane = threadIdx.x % 32;
  if (warp == static_cast<int>(blockDim.x) / 32 - 1) {
    if (lane == 0) copy<kRows, kAtoms, kNorm>(p, memory, &w_map, &x_map);
    return;
  }
  if constexpr (kNorm) {
    normalise<T>(p, memory);
    if (warp >= p.plan.warps) return;
  } else {
    wait_for_previous();
  }
  Tile<T, kRows, kTiles, kStrips, kAtoms, kNorm> tile(p, memory, warp, lane);
  for (int i = blockIdx.x; i < p.num_tiles; i += gridDim.x) {
    tile.run(lane);
    tile.store(i, lane);
  }
#endif
}

template <typename T, int kRows, int kTiles, int kStrips, int kAtoms, bool kNorm>
void launch_sm90(const Params& p, cudaStream_t stream) {
  const SkinnyArgs& a = p.a;
  const int box_rows = kStripRows / (a.gated ? 2 : 1) * p.plan.tile;
  // Of W the columns are cut into atoms, so that a box brings several, one after the other.
  const CUtensorMap w_map =
      make_tensor_map("linear", a.dtype, a.w, {kAtom, a.out_features, a.in_features / kAtom},
                      {2 * a.w_stride, 2 * kAtom}, {kAtom, box_rows, a.gated ? 1 : kAtoms});
  const CUtensorMap x_map =
      kNorm ? w_map  // not used
            : make_tensor_map("linear", a.dtype, a.x, {a.in_features, a.rows}, {2 * a.x_stride},
                              {kAtom, std::min<int64_t>(kRows, a.rows)});
  const auto kernel = linear_skinny_sm90_kernel<T, kRows, kTiles, kStrips, kAtoms, kNorm>;
  allow_smem(kernel, static_cast<size_t>(p.plan.smem), "linear_skinny");
  const dim3 grid(static_cast<unsigned>(p.plan.ctas),
                  static_cast<unsigned>((a.rows + kRows - 1) / kRows));
  launch(kernel, grid, static_cast<unsigned>(kNorm ? kMaxThreads : 32 * (p.plan.warps + 1)),
         static_cast<size_t>(p.plan.smem), stream, "linear_skinny", p, w_map, x_map);
}

}  // namespace

void linear_skinny_sm90(const SkinnyArgs& a, const Card& card, cudaStream_t stream) {
  const bool norm = a.norm.weight != nullptr;
  const SkinnySm90Plan plan = plan_skinny_sm90(a.rows, a.out_features, a.in_features, norm,
                                               card.num_sms, card.max_smem, card.smem_per_sm);
  const Params p{a,
                 plan,
                 static_cast<int>(a.gated ? a.out_features / 2 : a.out_features),
                 static_cast<int>(a.in_features),
                 static_cast<int>(plan.tiles(a.out_features)),
                 static_cast<int>((a.in_features + kAtom * plan.atoms - 1) / (kAtom * plan.atoms))};
  dispatch_16bit(a.dtype, "linear", [&](auto type) {
    using T = decltype(type);
    const auto with = [&]<int kRows, int kTiles, int kAtoms>(std::integral_constant<int, kRows>,
                                                             std::integral_constant<int, kTiles>,
                                                             std::integral_constant<int, kAtoms>) {
      const auto with_norm = [&]<bool kNorm>(std::bool_constant<kNorm>) {
        if constexpr (kAtoms == 1 && kTiles == kRows / 8)
          if (plan.strips == 2) return launch_sm90<T, kRows, kTiles, 2, kAtoms, kNorm>(p, stream);
        launch_sm90<T, kRows, kTiles, 1, kAtoms, kNorm>(p, stream);
      };
      if constexpr (kRows <= 16)
        if (norm) return with_norm(std::true_type{});
      with_norm(std::false_type{});
    };
    const auto with_rows = [&]<int kRows>(std::integral_constant<int, kRows> rows) {
      constexpr std::integral_constant<int, 1> one{};
      constexpr std::integral_constant<int, 2> two{};
      constexpr std::integral_constant<int, kRows / 8> all{};
      if constexpr (kRows > 16) {
        if (plan.shares == 1) return with(rows, all, one);
        return plan.atoms == 1 ? with(rows, two, one) : with(rows, two, two);
      } else {
        if (plan.atoms == 1) return with(rows, all, one);
        if (plan.atoms == 2) return with(rows, all, two);
        with(rows, all, std::integral_constant<int, 4>{});
      }
    };
    switch (plan.rows) {
      case 8:
        return with_rows(std::integral_constant<int, 8>{});
      case 16:
        return with_rows(std::integral_constant<int, 16>{});
      case 32:
        return with_rows(std::integral_constant<int, 32>{});
      default:
        return with_rows(std::integral_constant<int, 64>{});
    }
  });
}

}  // namespace ni::cuda
