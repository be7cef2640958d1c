// linear_skinny on Hopper: y[m, n] = sum over k of x[m, k] W[n, k] (+ bias) for few rows, in the
// canonical order (see linear_skinny.cu), with what stands before and after it in a decoder layer:
//   x := norm(x);   y := round(act(y[:, :n / 2]) * y[:, n / 2:]);   y := round(out + y)
// each rounded like the operators of their own, so fused and separate give the same bits.
//
// Layouts: x [M, x_stride], W [N, w_stride], K and w_stride multiples of 64. A CTA goes through
// tiles of up to 8 strips of 16 weight rows (gated: 8 of the gate and their 8 others); one warp
// brings boxes of 64 columns by the copy engine through a ring in shared memory (128-byte swizzle),
// a warp a strip multiplies, or 2 or 4 warps, 16 rows of x each. x comes through the same ring, or
// as a whole, and is normalised where it lies, by every CTA. W is the A operand (16 rows), x the B
// operand (8 rows), both read by ldmatrix. Moves N * K * 2 bytes once; bound by bandwidth. What
// that takes: 50 KB (H100) to 150 KB (H200) in flight on every multiprocessor from the kernel's
// first moment on (the ring fills while the kernel before still works: weights depend on nobody),
// strips spread evenly, and a warp that only copies, since issuing a copy takes longer than the
// product of what it brings. For short N the chain of K / 16 dependent products (25 cycles each) is
// the bound, so the loop around it is straight code: a stage without branches, operands loaded
// ahead.
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
  __device__ __forceinline__ uint32_t x_full() const { return barriers + 16 * stages; }
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

template <int kRows, int kAtoms, bool kWhole>
__device__ __forceinline__ void copy(const Params& p, const Memory& memory,
                                     const CUtensorMap* w_map, const CUtensorMap* x_map) {
  const SkinnySm90Plan& plan = p.plan;
  const int box_rows = kStripRows / (p.a.gated ? 2 : 1) * plan.tile;
  // Of x no more rows are copied than there are: filling in zeros takes its time, too.
  const int rows = static_cast<int>(p.a.rows), x_bytes = kWhole ? 0 : 128 * min(kRows, rows);
  const int bytes = kAtoms * (plan.tile * kStripBytes + x_bytes);

  // Weights, which nobody reads again in this step, do not push out what all layers share.
  const uint64_t once = evict_first();
  const auto copy_w = [&](const Source& from, int stage) {
    const uint32_t to = memory.stage(stage), barrier = memory.full(stage);
    const int row = from.tile * box_rows;
    arrive_expecting(barrier, bytes);
    if (!p.a.gated) {
      copy_box(to, w_map, 0, row, from.stage * kAtoms, barrier, once);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < 2 * kAtoms; ++i)  // of an atom the gate's rows, then the others
      copy_box(to + i * box_rows * 128, w_map, 0, i % 2 * p.n + row, from.stage * kAtoms + i / 2,
               barrier, once);
  };
  const auto copy_x = [&](const Source& from, int stage) {
    const uint32_t to = memory.stage(stage) + kAtoms * plan.tile * kStripBytes;
#pragma unroll
    for (int i = 0; i < kAtoms; ++i)
      copy_box(to + i * kRows * 128, x_map, (from.stage * kAtoms + i) * kAtom, blockIdx.y * kRows,
               memory.full(stage));
  };

  if (!p.a.settled) wait_for_previous();
  if (p.a.norm.weight != nullptr) {
    // Already now: attention looks up its work meanwhile, and its code and that of `down` come.
    let_next_start();
    arrive_expecting(memory.x_full(), 4 * p.k);
    copy_bytes(memory.x + rows * plan.x_stride, p.a.norm.weight, 4 * p.k, memory.x_full());
  }
  // The first stages of the weights come while the kernel before ends.
  const Source begin{static_cast<int>(blockIdx.x)};
  Source next = begin;
  Place place;
  if constexpr (kWhole) {  // written once: the less code, the sooner it is there
    for (int count = 0;; ++count, next.advance(p), place.advance(plan.stages)) {
      const bool ends = next.tile >= p.num_tiles;
      if (count == plan.stages || (ends && count < plan.stages)) {
        wait_for_previous();
        arrive_expecting(memory.x_full(), rows * 2 * p.k);
#pragma unroll 1
        for (int row = 0; row < rows; ++row)
          copy_bytes(memory.x + row * plan.x_stride,
                     static_cast<const uint16_t*>(p.a.x) + row * p.a.x_stride, 2 * p.k,
                     memory.x_full());
      }
      if (ends) break;
      wait(memory.empty(place.stage), place.phase ^ 1);  // at first they are
      copy_w(next, place.stage);
    }
  } else {
    int ahead = 0;
    for (; ahead < plan.stages && next.tile < p.num_tiles; ++ahead, next.advance(p))
      copy_w(next, ahead);
    wait_for_previous();
    Source from = begin;
    for (int stage = 0; stage < ahead; ++stage, from.advance(p)) copy_x(from, stage);
    for (; next.tile < p.num_tiles; next.advance(p), place.advance(plan.stages)) {
      wait(memory.empty(place.stage), place.phase);
      copy_w(next, place.stage);
      copy_x(next, place.stage);
    }
  }
  // Without a norm the next kernel's ring fills while this one's last stages are multiplied.
  let_next_start();
}

// -- The warps that compute -----------------------------------------------------------------------

__device__ __forceinline__ void synchronise_normalisers() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kMaxWarps) : "memory");
}

// Zeros behind the last column of x as a whole: they meet zeros of W but may not be NaN.
__device__ __forceinline__ void clear_behind(const Params& p, const Memory& memory, int thread,
                                             int threads) {
  const int end = p.num_stages * p.plan.atoms * (kAtom / 8);
  for (int row = 0; row < p.a.rows; ++row)
    for (int v = p.k / 8 + thread; v < end; v += threads)
      store_shared(memory.x + row * p.plan.x_stride + 16 * v, uint4{0, 0, 0, 0});
  __syncwarp();
}

// x as a whole, rows x_stride bytes apart, normalised as norm.cu does it, to the bit. By kMaxWarps
// warps. In little code: it runs once a launch, and fetching it takes longer than running it.
template <typename T>
__device__ __forceinline__ void normalise(const Params& p, const Memory& memory) {
  using Elements = Vec<T, 8>;
  constexpr int kThreads = 32 * kMaxWarps, kAtOnce = 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = static_cast<int>(p.a.rows), vectors = p.k / 8;
  const uint32_t weights = memory.x + rows * p.plan.x_stride, sums = weights + p.k * 4;
  const auto place = [&](int row, int vector) {
    return memory.x + row * p.plan.x_stride + 16 * vector;
  };
  const auto load = [&](int row, int vector) {
    const uint4 raw = load_shared(place(row, vector));
    return *reinterpret_cast<const Elements*>(&raw);
  };
  clear_behind(p, memory, threadIdx.x, kThreads);
  wait(memory.x_full(), 0);

  // What a warp of norm.cu sums is a part.
  const int parts = norm_threads(vectors) / 32;  // of a row
  int row = 0, part = warp;
  while (part >= parts) part -= parts, ++row;
#pragma unroll 1
  while (row < rows) {
    float sum[kAtOnce] = {};
    int rows_of[kAtOnce], parts_of[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      rows_of[j] = row;
      parts_of[j] = part;
      part += kMaxWarps;
      while (part >= parts) part -= parts, ++row;
    }
#pragma unroll 1
    for (int item = lane; item < vectors; item += 32 * parts) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int v = item + 32 * parts_of[j];
        if (v >= vectors || rows_of[j] >= rows) continue;
        const Elements e = load(rows_of[j], v);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float h = as_float(e.v[i]);
          sum[j] = __fmaf_rn(h, h, sum[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      sum[j] = warp_sum(sum[j]);
      if (lane == 0 && rows_of[j] < rows)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(sums + 4 * (rows_of[j] * 16 + parts_of[j])),
                     "f"(sum[j])
                     : "memory");
    }
  }
  synchronise_normalisers();
#pragma unroll 1
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
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    float factor;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(factor) : "r"(sums + 64 * r) : "memory");
#pragma unroll 1
    for (int v = threadIdx.x; v < vectors; v += kThreads) {
      const uint4 w[2] = {load_shared(weights + 32 * v), load_shared(weights + 32 * v + 16)};
      Elements e = load(r, v);
      const float* weight = reinterpret_cast<const float*>(w);
#pragma unroll
      for (int i = 0; i < 8; ++i) e.v[i] = from_float<T>(as_float(e.v[i]) * factor * weight[i]);
      store_shared(place(r, v), *reinterpret_cast<const uint4*>(&e));
    }
  }
  synchronise_normalisers();
}

// One tile's products of one warp: a strip with kTiles times 8 rows of x.
template <typename T, int kRows, int kTiles, int kAtoms, bool kWhole>
struct Tile {
  // Groups of 16 columns whose operands are loaded together, ahead of their products; an even
  // number of such batches makes a stage.
  static constexpr int kBatch = kAtoms > 1 && kTiles <= 2 ? 4 : 2;
  static constexpr int kBatches = 4 * kAtoms / kBatch;
  struct Operands {
    uint32_t w[kBatch][4], x[kBatch / 2][kTiles][4];  // x: two groups
  };

  const Params& p;
  const Memory& memory;
  Place place;                                   // of the present stage
  static constexpr bool kFetches = kTiles <= 2;  // registers are enough
  float acc[kTiles][4], before[kFetches ? kTiles : 1][4] = {};
  uint32_t w_offset, x_offset[kTiles];
  uint32_t w_at, x_at;  // of the present stage
  int strip, first;     // the warp's strip in the tile, and first row of x
  int rows;             // of x that exist

  __device__ Tile(const Params& params, const Memory& m, int warp, int lane)
      : p(params), memory(m), x_at(m.x) {
    rows = min(kRows, static_cast<int>(p.a.rows) - static_cast<int>(blockIdx.y) * kRows);
    constexpr bool kShared = kTiles < kRows / 8;
    strip = kShared ? warp / p.plan.shares : warp;
    first = kShared ? warp % p.plan.shares * (8 * kTiles) : 0;
    // ldmatrix takes from each lane the address of a row of a quarter. Of W: rows 0 to 7, 8 to 15
    // of the first 8 columns, then of the others. Of x: 8 columns after the other.
    w_offset = lane % 8 * 128 + ((lane / 16 ^ lane % 8) << 4) +
               lane / 8 % 2 * (p.a.gated ? p.plan.tile : 1) * (kStripBytes / 2) +
               strip * (p.a.gated ? kStripBytes / 2 : kStripBytes);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int row = min(first + 8 * t + lane % 8, rows - 1);  // what does not exist is not stored
      x_offset[t] =
          kWhole ? row * p.plan.x_stride + lane / 8 * 16 : row * 128 + ((lane / 8 ^ row % 8) << 4);
    }
  }

  __device__ __forceinline__ void enter_stage(int index) {
    wait(memory.full(place.stage), place.phase);
    w_at = memory.stage(place.stage);
    x_at = kWhole ? memory.x + index * (kAtoms * 128) : w_at + kAtoms * p.plan.tile * kStripBytes;
  }

  // Group i of a batch.
  __device__ __forceinline__ void load(Operands& o, int batch, int i) {
    const int atom = (batch * kBatch + i) / 4, group = (batch * kBatch + i) % 4;
    ldmatrix_x4(o.w[i], w_at + atom * p.plan.tile * kStripBytes + (w_offset ^ group << 5));
    if (i % 2 != 0) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      ldmatrix_x4(o.x[i / 2][t], kWhole ? x_at + x_offset[t] + atom * 128 + group * 32
                                        : x_at + atom * kRows * 128 + (x_offset[t] ^ group << 5));
  }
  __device__ __forceinline__ void multiply(const Operands& o, int i) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      mma<T>(acc[t], o.w[i], o.x[i / 2][t][i % 2 * 2], o.x[i / 2][t][i % 2 * 2 + 1]);
  }

  // The tile's sums. A product waits for the one before, and in that time operands are loaded. A
  // stage is given back when all of it has been multiplied: until ldmatrix has read, no copy may
  // write.
  __device__ __forceinline__ void run(int tile, int lane) {
    if (kWhole && p.a.norm.weight == nullptr) wait(memory.x_full(), 0);
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[t][i] = 0;
    Operands o[2];
    enter_stage(0);
    if constexpr (kFetches) fetch(tile, lane);  // x is there, so the copying warp has waited
#pragma unroll
    for (int i = 0; i < kBatch; ++i) load(o[0], 0, i);
    for (int stage = 0; stage < p.num_stages; ++stage) {
      const uint32_t empty = memory.empty(place.stage);
#pragma unroll
      for (int b = 0; b < kBatches; ++b) {
        const bool ends = b + 1 == kBatches, loads = !ends || stage + 1 < p.num_stages;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          multiply(o[b % 2], i);
          if (ends && i == 0) {
            place.advance(p.plan.stages);
            if (loads) enter_stage(stage + 1);
          }
          if (loads) load(o[(b + 1) % 2], ends ? 0 : b + 1, i);
        }
      }
      __syncwarp();
      if (lane == 0) arrive(empty);
    }
  }

  // Calls f(t, i, column, elements from `out`) for what this lane stores, if not gated.
  // Accumulators 0 and 1 belong to the strip's row lane / 4, 2 and 3 to the eighth after.
  template <typename F>
  __device__ __forceinline__ void for_each(int tile, int lane, const F& f) const {
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first + 8 * t + lane % 4 * 2 + i % 2;
        const int col = kStripRows * (tile * p.plan.tile + strip) + i / 2 * 8 + lane / 4;
        if (row < rows && col < p.n) f(t, i, col, (first_row + row) * p.a.out_stride + col);
      }
  }
  // What the sums are added to comes while they are made.
  __device__ __forceinline__ void fetch(int tile, int lane) {
    if (p.a.accumulate)
      for_each(tile, lane,
               [&](int t, int i, int, int64_t at) { before[t][i] = load_linear<T>(p.a, at); });
  }

  __device__ __forceinline__ void store(int tile, int lane) const {
    if (!p.a.gated) {
      for_each(tile, lane, [&](int t, int i, int col, int64_t at) {
        const float old = kFetches ? before[t][i] : load_linear<T>(p.a, at);
        store_linear<T>(p.a, at, with_bias<T>(p.a, acc[t][i], col), old);
      });
      return;
    }
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
    const int col = 8 * (tile * p.plan.tile + strip) + lane / 4;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first + 8 * t + lane % 4 * 2 + i;
        if (row >= rows || col >= p.n) continue;
        const T gate = round_linear<T>(with_bias<T>(p.a, acc[t][i], col));
        const T other = round_linear<T>(with_bias<T>(p.a, acc[t][2 + i], p.n + col));
        static_cast<T*>(p.a.out)[(first_row + row) * p.a.out_stride + col] =
            from_float<T>(activate(p.a.act, as_float(gate)) * as_float(other));
      }
    }
  }
};

#endif

template <typename T, int kRows, int kTiles, int kAtoms, bool kWhole>
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
    init_barrier(memory.x_full(), p.a.norm.weight != nullptr ? 2 : 1);  // its weights, and x
    fence_async_proxy();
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform for the compiler too
  const int lane = threadIdx.x % 32;
  if (warp == static_cast<int>(blockDim.x) / 32 - 1) {
    if (lane == 0) copy<kRows, kAtoms, kWhole>(p, memory, &w_map, &x_map);
    return;
  }
  if (kWhole && p.a.norm.weight != nullptr) {
    normalise<T>(p, memory);
    if (warp >= p.plan.warps) return;
  } else {
    if (kWhole) clear_behind(p, memory, lane, 32);
  }
  Tile<T, kRows, kTiles, kAtoms, kWhole> tile(p, memory, warp, lane);
  for (int i = blockIdx.x; i < p.num_tiles; i += gridDim.x) {
    tile.run(i, lane);
    tile.store(i, lane);
  }
#endif
}

template <typename T, int kRows, int kTiles, int kAtoms, bool kWhole>
void launch_sm90(const Params& p, cudaStream_t stream) {
  const SkinnyArgs& a = p.a;
  const int box_rows = kStripRows / (a.gated ? 2 : 1) * p.plan.tile;
  // Of W the columns are cut into atoms, so that a box brings several, one after the other.
  const CUtensorMap w_map =
      make_tensor_map("linear", a.dtype, a.w, {kAtom, a.out_features, a.in_features / kAtom},
                      {2 * a.w_stride, 2 * kAtom}, {kAtom, box_rows, a.gated ? 1 : kAtoms});
  const CUtensorMap x_map =
      kWhole ? w_map  // not used
             : make_tensor_map("linear", a.dtype, a.x, {a.in_features, a.rows}, {2 * a.x_stride},
                               {kAtom, std::min<int64_t>(kRows, a.rows)});
  const auto kernel = linear_skinny_sm90_kernel<T, kRows, kTiles, kAtoms, kWhole>;
  allow_smem(kernel, static_cast<size_t>(p.plan.smem), "linear_skinny");
  const dim3 grid(static_cast<unsigned>(p.plan.ctas),
                  static_cast<unsigned>((a.rows + kRows - 1) / kRows));
  const int threads = a.norm.weight != nullptr ? kMaxThreads : 32 * (p.plan.warps + 1);
  launch(kernel, grid, static_cast<unsigned>(threads), static_cast<size_t>(p.plan.smem), stream,
         "linear_skinny", p, w_map, x_map);
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
      if constexpr (kRows <= 16)
        if (plan.whole) return launch_sm90<T, kRows, kTiles, kAtoms, true>(p, stream);
      launch_sm90<T, kRows, kTiles, kAtoms, false>(p, stream);
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
