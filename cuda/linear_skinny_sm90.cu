// linear_skinny on Hopper: y[m, n] = sum over k of x[m, k] W[n, k] (+ bias) for few rows, in the
// canonical order (see linear_skinny.cu), with what stands before and after it in a decoder layer:
//   x := norm(x);   y := round(act(y[:, :n / 2]) * y[:, n / 2:]);   y := round(out + y)
// each rounded like the operators of their own, so fused and separate give the same bits.
//
// Layouts: x [M, x_stride], W [N, w_stride], w_stride a multiple of 64. A CTA goes through tiles of
// up to 32 strips of 8 weight rows; one warp brings boxes of 64 columns by the copy engine through
// a ring in shared memory (128-byte swizzle), up to 8 warps multiply 1, 2 or 4 strips each. x comes
// through the same ring, or is normalised into shared memory as a whole by every CTA. x is the A
// operand, W the B operand; a lane takes four neighbouring k of a row with one 8-byte load.
// Moves N * K * 2 bytes once; bound by bandwidth. What that takes: some 50 KB in flight on every
// multiprocessor from the kernel's first moment on (the ring fills while the kernel before is
// still at work: weights depend on nobody), strips spread evenly, and a warp that only copies,
// since issuing a copy takes longer than the product of what it brings. For short N the chain of
// K / 16 dependent products (33 cycles each) is the bound.
#include <cstdlib>

#include "cuda/activation.cuh"
#include "cuda/attention.cuh"
#include "cuda/linear.h"
#include "cuda/linear_plan.h"
#include "cuda/linear_skinny.cuh"
#include "cuda/sm90.cuh"
#include "cuda/tensor_map.h"

namespace ni::cuda {
namespace {

constexpr int kAtom = 64;          // columns of a box, 128 bytes
constexpr int kStripBytes = 1024;  // 8 rows of an atom
constexpr int kMaxThreads = 8 * 32 + 32;
constexpr int kConsumers = 1;  // named barrier of the warps that compute

struct Params {
  SkinnyArgs a;
  SkinnySm90Plan plan;
  int n, k;  // of the result (half of W's rows if gated), and of the sum
  int num_tiles, num_atoms;
  int trig, l2;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

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

template <typename V>
__device__ __forceinline__ V load_shared(uint32_t address) {
  V v;
  if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  } else {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
  }
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
  int tile, atom = 0;
  __device__ __forceinline__ void advance(const Params& p) {
    atom += p.plan.atoms;
    if (atom < p.num_atoms) return;
    atom = 0;
    tile += gridDim.x;
  }
};

template <int kRows>
__device__ __forceinline__ void copy(const Params& p, const Memory& memory,
                                     const CUtensorMap* w_map, const CUtensorMap* x_map) {
  const SkinnySm90Plan& plan = p.plan;
  const int box_rows = 8 * plan.tile / (p.a.gated ? 2 : 1);
  const bool x_in_ring = plan.x_bytes == 0;
  const int first_row = blockIdx.y * kRows;

  // Of x no more rows are copied than there are: filling in zeros takes its time, too.
  const int bytes =
      plan.atoms * (plan.tile * kStripBytes + (x_in_ring ? 128 * min(kRows, int(p.a.rows)) : 0));
  const auto copy_w = [&](const Source& from, int stage) {
    const uint32_t to = memory.stage(stage), barrier = memory.full(stage);
    const int row = from.tile * box_rows;
    arrive_expecting(barrier, bytes);
    if (!p.a.gated) {
      copy_box(to, w_map, 0, row, from.atom, barrier);
      return;
    }
    for (int i = 0; i < 2 * plan.atoms; ++i)  // of an atom the gate's rows, then the others
      copy_box(to + i * box_rows * 128, w_map, 0, i % 2 * p.n + row, from.atom + i / 2, barrier);
  };
  const auto copy_x = [&](const Source& from, int stage) {
    const uint32_t to = memory.stage(stage) + plan.atoms * plan.tile * kStripBytes;
    for (int i = 0; i < plan.atoms; ++i)
      copy_box(to + i * kRows * 128, x_map, (from.atom + i) * kAtom, first_row, memory.full(stage));
  };

  // Weights depend on no kernel before this one: their first stages come while it ends.
  const Source begin{static_cast<int>(blockIdx.x)};
  Source next = begin;
  int ahead = 0;
  for (; ahead < plan.stages && next.tile < p.num_tiles; ++ahead, next.advance(p))
    copy_w(next, ahead);
  Source soon = next;
  for (int i = 0; i < p.l2 && soon.tile < p.num_tiles; ++i, soon.advance(p)) {
    if (!p.a.gated)
      prefetch_box(w_map, 0, soon.tile * box_rows, soon.atom);
    else
      for (int j = 0; j < 2 * plan.atoms; ++j)
        prefetch_box(w_map, 0, j % 2 * p.n + soon.tile * box_rows, soon.atom + j / 2);
  }
  wait_for_previous();
  if (p.trig == 0) let_next_start();
  if (x_in_ring) {
    Source from = begin;
    for (int stage = 0; stage < ahead; ++stage, from.advance(p)) copy_x(from, stage);
  }
  Place place;
  for (; next.tile < p.num_tiles; next.advance(p), place.advance(plan.stages)) {
    wait(memory.empty(place.stage), place.phase);
    copy_w(next, place.stage);
    if (x_in_ring) copy_x(next, place.stage);
  }
  // The next kernel's ring shall fill while this one's last stages are multiplied, not before.
  if (p.trig == 1) let_next_start();
}

// -- The warps that compute -----------------------------------------------------------------------

// x, normalised as norm.cu does it, to the bit, in the layout that boxes have: [k / 64][row][64].
template <typename T, int kRows>
__device__ __forceinline__ void normalise(const Params& p, const Memory& memory) {
  using Elements = Vec<T, 8>;
  const int threads = 32 * p.plan.warps, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = min(kRows, static_cast<int>(p.a.rows));  // there is one row block
  const int vectors = p.k / 8, columns = p.num_atoms * kAtom;
  const uint32_t weights = memory.x + columns * rows * 2, sums = weights + columns * 4;
  for (int i = threadIdx.x; i < p.k / 4; i += threads)
    store_shared(weights + 16 * i, reinterpret_cast<const uint4*>(p.a.norm.weight)[i]);
  const auto place = [&](int row, int vector) {
    return memory.x + (vector / 8 * rows + row) * 128 + ((vector % 8 ^ row % 8) << 4);
  };
  const auto synchronise = [&] {
    asm volatile("bar.sync %0, %1;" ::"n"(kConsumers), "r"(threads) : "memory");
  };
  // Columns beyond k meet weights of zero, but may not be NaN.
  for (int i = threadIdx.x; i < rows * (columns / 8 - vectors); i += threads)
    store_shared(place(i % rows, vectors + i / rows), uint4{0, 0, 0, 0});
  wait_for_previous();

  const T* x = static_cast<const T*>(p.a.x);
  const int norm_warps = norm_threads(vectors) / 32;
  for (int part = warp; part < rows * norm_warps; part += p.plan.warps) {
    const int row = part / norm_warps, norm_warp = part % norm_warps;
    float sum = 0;
    for (int v = norm_warp * 32 + lane; v < vectors; v += 32 * norm_warps) {
      const auto e = reinterpret_cast<const Elements*>(x + row * p.a.x_stride)[v];
      store_shared(place(row, v), *reinterpret_cast<const uint4*>(&e));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float h = as_float(e.v[j]);
        sum = __fmaf_rn(h, h, sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(sums + 4 * (row * 16 + norm_warp)), "f"(sum)
                   : "memory");
  }
  synchronise();
  for (int part = warp; part < rows * norm_warps; part += p.plan.warps) {
    const int row = part / norm_warps, norm_warp = part % norm_warps;
    float sum = 0;
    if (lane < norm_warps)
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(sum) : "r"(sums + 4 * (row * 16 + lane)));
    const float variance = warp_sum(sum) / static_cast<float>(p.k);
    const float factor = rsqrtf(variance + p.a.norm_eps);
    for (int v = norm_warp * 32 + lane; v < vectors; v += 32 * norm_warps) {
      const uint32_t at = place(row, v);
      const uint4 raw = load_shared<uint4>(at);
      const uint4 w[2] = {load_shared<uint4>(weights + 32 * v),
                          load_shared<uint4>(weights + 32 * v + 16)};
      Elements e = *reinterpret_cast<const Elements*>(&raw);
      const float* weight = reinterpret_cast<const float*>(w);
#pragma unroll
      for (int j = 0; j < 8; ++j) e.v[j] = from_float<T>(as_float(e.v[j]) * factor * weight[j]);
      store_shared(at, *reinterpret_cast<const uint4*>(&e));
    }
  }
  synchronise();
}

// The rows of eight that a half-warp reads together lie in different banks: 0, 2, 4, 6, 1, 3, 5, 7.
__device__ __forceinline__ int nth_row(int i) {
  return (i & 3) << 1 | i >> 2;
}

template <typename T, int kRows, int kStrips>
struct Tile {
  static constexpr int kTiles = kRows <= 16 ? 1 : kRows / 16, kHalves = kRows > 8 ? 2 : 1;
  // Operands are loaded in parts of an atom, a part ahead of its products.
  static constexpr int kGroups = kTiles * kStrips >= 4 ? 2 : 4, kParts = 4 / kGroups;
  struct Operands {
    uint2 x[kGroups][kTiles][kHalves], w[kGroups][kStrips];
  };

  const Params& p;
  const Memory& memory;
  Place read, done;  // the stages that are loaded from and given back next
  float acc[kTiles][kStrips][4];
  uint32_t x_offset[kTiles][kHalves], w_offset, strip_offset[kStrips];
  int rows;  // of x that exist

  __device__ Tile(const Params& params, const Memory& m, int warp, int lane)
      : p(params), memory(m) {
    rows = min(kRows, static_cast<int>(p.a.rows) - static_cast<int>(blockIdx.y) * kRows);
    const auto offset = [&](int row) {
      const int q = lane % 4;
      return static_cast<uint32_t>(row * 128 + ((q / 2 ^ row % 8) << 4) + q % 2 * 8);
    };
    w_offset = offset(nth_row(lane / 4));
    // Rows that do not exist are computed on the last one, and not stored.
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
        x_offset[t][h] = offset(min(t * 16 + 8 * h + nth_row(lane / 4), rows - 1));
#pragma unroll
    for (int s = 0; s < kStrips; ++s) strip_offset[s] = strip(warp, s) * kStripBytes;
  }

  // Of the tile's strips, the s-th of the warp: if gated, first those of the gate.
  __device__ int strip(int warp, int s) const {
    if (!p.a.gated) return warp * kStrips + s;
    constexpr int kHalf = kStrips / 2;
    return s < kHalf ? warp * kHalf + s : p.plan.tile / 2 + warp * kHalf + s - kHalf;
  }

  // Where the next atom lies; in_stage: atoms before it in its stage.
  int in_stage;
  uint32_t w_at, x_at;
  __device__ __forceinline__ void enter_stage() {
    in_stage = 0;
    w_at = memory.stage(read.stage) + w_offset;
    if (p.plan.x_bytes == 0) x_at = w_at - w_offset + p.plan.atoms * p.plan.tile * kStripBytes;
    wait(memory.full(read.stage), read.phase);
  }
  __device__ __forceinline__ void next_atom() {
    w_at += p.plan.tile * kStripBytes;
    x_at += (p.plan.x_bytes > 0 ? rows : kRows) * 128;
    if (++in_stage < p.plan.atoms) return;
    read.advance(p.plan.stages);
    in_stage = -1;  // to be entered
  }

  // The operands of the kPart-th part of an atom; waits for the atom's stage if it is the first.
  template <int kPart>
  __device__ __forceinline__ void load(Operands& o) {
    if (kPart == 0 && in_stage < 0) enter_stage();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      constexpr int kFirst = kPart * kGroups;
      const uint32_t chunk = (kFirst + i) << 5;
#pragma unroll
      for (int s = 0; s < kStrips; ++s)
        o.w[i][s] = load_shared<uint2>((w_at ^ chunk) + strip_offset[s]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
          o.x[i][t][h] = load_shared<uint2>(x_at + (x_offset[t][h] ^ chunk));
    }
    if (kPart == kParts - 1) next_atom();
  }

  __device__ __forceinline__ void multiply(const Operands& o) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint2 low = o.x[i][t][0], high = kHalves > 1 ? o.x[i][t][kHalves - 1] : uint2{0, 0};
        const uint32_t fragment[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
        for (int s = 0; s < kStrips; ++s) mma<T>(acc[t][s], fragment, o.w[i][s].x, o.w[i][s].y);
      }
  }

  // A stage is given back when all of its atoms have been multiplied.
  __device__ __forceinline__ void give_back(int& atoms, int left, int lane) {
    if (++atoms < p.plan.atoms && left > 0) return;
    atoms = 0;
    __syncwarp();
    if (lane == 0) arrive(memory.empty(done.stage));
    done.advance(p.plan.stages);
  }

  // The tile's sums.
  __device__ __forceinline__ void run(int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int s = 0; s < kStrips; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[t][s][i] = 0;
    x_at = memory.x;
    in_stage = -1;
    Operands even, odd;
    load<0>(even);
    int given = 0;  // atoms of the present stage
    if constexpr (kParts == 2) {
      for (int left = p.num_atoms - 1; left >= 0; --left) {
        load<1>(odd);
        multiply(even);
        if (left > 0) load<0>(even);
        multiply(odd);
        give_back(given, left, lane);
      }
    } else {
      for (int left = p.num_atoms - 1; left >= 0; left -= 2) {
        if (left > 0) load<0>(odd);
        multiply(even);
        give_back(given, left, lane);
        if (left == 0) break;
        if (left > 1) load<0>(even);
        multiply(odd);
        give_back(given, left - 1, lane);
      }
    }
    if (in_stage > 0) read.advance(p.plan.stages);  // the last stage was not full
  }

  __device__ __forceinline__ void store(int tile, int warp, int lane) {
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
    const int first_col = tile * 8 * p.plan.tile / (p.a.gated ? 2 : 1);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) {
        const int row = t * 16 + 8 * (i / 2) + nth_row(lane / 4);
        if (row >= rows) continue;
        const int64_t to = (first_row + row) * p.a.out_stride;
        const int in_strip = nth_row(lane % 4 * 2 + i % 2);
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          const int col = first_col + 8 * strip(warp, s) + in_strip;
          if (col >= p.n) continue;
          const float v = with_bias<T>(p.a, acc[t][s][i], col);
          if (!p.a.gated) {
            store_linear<T>(p.a, to + col, v);
          } else if (s < kStrips / 2) {
            const float other =
                with_bias<T>(p.a, acc[t][(s + kStrips / 2) % kStrips][i], p.n + col);
            const float act = activate(p.a.act, as_float(round_linear<T>(v)));
            static_cast<T*>(p.a.out)[to + col] =
                from_float<T>(act * as_float(round_linear<T>(other)));
          }
        }
      }
    }
  }
};

template <typename T, int kRows, int kStrips>
__device__ __forceinline__ void compute(const Params& p, const Memory& memory, int warp) {
  const int lane = threadIdx.x % 32;
  if (p.plan.x_bytes > 0) {
    normalise<T, kRows>(p, memory);
  } else {
    wait_for_previous();
  }
  Tile<T, kRows, kStrips> tile(p, memory, warp, lane);
  for (int i = blockIdx.x; i < p.num_tiles; i += gridDim.x) {
    tile.run(lane);
    tile.store(i, warp, lane);
  }
}

#endif

template <typename T, int kRows, int kStrips>
__global__ void __launch_bounds__(kMaxThreads, kRows <= 16 ? 2 : 1)
    linear_skinny_sm90_kernel(const __grid_constant__ Params p,
                              const __grid_constant__ CUtensorMap w_map,
                              const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ unsigned char smem[];
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  const Memory memory(at, p.plan);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.plan.stages; ++i) {
      init_barrier(memory.full(i), 1);
      init_barrier(memory.empty(i), p.plan.warps);
    }
    fence_async_proxy();
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform for the compiler too
  if (warp < p.plan.warps) {
    compute<T, kRows, kStrips>(p, memory, warp);
  } else if (threadIdx.x % 32 == 0) {
    copy<kRows>(p, memory, &w_map, &x_map);
  }
#endif
}

template <typename T, int kRows, int kStrips>
void launch_sm90(const Params& p, cudaStream_t stream) {
  const SkinnyArgs& a = p.a;
  const int parts = a.gated ? 2 : 1, box_rows = 8 * p.plan.tile / parts;
  const CUtensorMap w_map = make_tensor_map(
      "linear", a.dtype, a.w, {kAtom, a.out_features, p.num_atoms}, {2 * a.w_stride, 2 * kAtom},
      {kAtom, box_rows, parts == 1 ? p.plan.atoms : 1});
  const CUtensorMap x_map =
      make_tensor_map("linear", a.dtype, a.x, {(p.k + 7) / 8 * 8, a.rows}, {2 * a.x_stride},
                      {kAtom, std::min<int64_t>(kRows, a.rows)});
  const auto kernel = linear_skinny_sm90_kernel<T, kRows, kStrips>;
  allow_smem(kernel, static_cast<size_t>(p.plan.smem), "linear_skinny");
  const dim3 grid(static_cast<unsigned>(p.plan.ctas),
                  static_cast<unsigned>((a.rows + kRows - 1) / kRows));
  launch(kernel, grid, static_cast<unsigned>(32 * (p.plan.warps + 1)),
         static_cast<size_t>(p.plan.smem), stream, "linear_skinny", p, w_map, x_map);
}

}  // namespace

void linear_skinny_sm90(const SkinnyArgs& a, const Card& card, cudaStream_t stream) {
  Params p{a, {}, 0, 0, 0, 0, 0, 0};
  p.plan = plan_skinny_sm90(a.rows, a.out_features, a.in_features, a.norm.weight != nullptr,
                            a.gated, card.num_sms, card.max_smem, card.smem_per_sm);
  static const int kTrig = getenv("NI_TRIG") ? atoi(getenv("NI_TRIG")) : 1;
  static const int kL2 = getenv("NI_L2") ? atoi(getenv("NI_L2")) : 0;
  p.trig = kTrig;
  p.l2 = kL2 / p.plan.stage_bytes;
  p.n = static_cast<int>(a.gated ? a.out_features / 2 : a.out_features);
  p.k = static_cast<int>(a.in_features);
  p.num_tiles = static_cast<int>(p.plan.tiles(a.out_features));
  p.num_atoms = static_cast<int>((a.in_features + kAtom - 1) / kAtom);
  dispatch_16bit(a.dtype, "linear", [&](auto type) {
    using T = decltype(type);
    const auto with_rows = [&]<int kRows>(std::integral_constant<int, kRows>) {
      if (p.plan.strips == 1) return launch_sm90<T, kRows, 1>(p, stream);
      if (p.plan.strips == 2) return launch_sm90<T, kRows, 2>(p, stream);
      if constexpr (kRows <= 16) launch_sm90<T, kRows, 4>(p, stream);
    };
    switch (p.plan.rows) {
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
