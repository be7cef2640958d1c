// y[m, n] = sum over k of x[m, k] W[n, k] (+ bias[n]) (+ y[m, n]) for few rows, in the canonical
// order: one fp32 accumulator of the tensor core, groups of 16 ascending k, the sum never split.
// (The order inside a group does not change the bits, nor does which operand the weights are.)
// Layouts: x [M, x_stride], W [N, w_stride], rows 16-byte aligned. A CTA has up to 64 rows of x and
// a strip of 8 weight rows a warp; all threads copy stages of 128 or 256 columns of both into a
// ring (cp.async), each warp multiplies its strip. x is the A operand, W the B operand; a lane
// takes four neighbouring k of a row with one 8-byte load, the same for both. Moves N * K * 2 bytes
// of weights once, x once a CTA (from the L2 cache); bound by bandwidth, which needs bytes in
// flight (the ring) and an even spread of strips, and for short N by the chain of K / 16 dependent
// products.
#include "cuda/attention.cuh"
#include "cuda/linear.h"
#include "cuda/linear_plan.h"

namespace ni::cuda {
namespace {

template <int kRows>
constexpr int kSkinnyStageK = skinny_stage_k(kRows);
template <int kRows>
constexpr int kSkinnyRowBytes = skinny_row_bytes(kRows);

struct SkinnyParams {
  const void* x;
  const void* w;
  void* out;
  const float* bias;
  int64_t x_stride, w_stride, out_stride;
  int m, n, k;
  int stages;
  bool accumulate;
};

// 16 bytes, of which the first `bytes` are read and the rest become zero.
__device__ __forceinline__ void cp_async_part(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ uint2 load_shared(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

// Waits until at most `pending` of the newest groups are still being copied.
__device__ __forceinline__ void wait_for_groups(int pending) {
  switch (pending) {
    case 0:
      return cp_async_wait<0>();
    case 1:
      return cp_async_wait<1>();
    case 2:
      return cp_async_wait<2>();
    case 3:
      return cp_async_wait<3>();
    case 4:
      return cp_async_wait<4>();
    case 5:
      return cp_async_wait<5>();
    default:
      return cp_async_wait<6>();
  }
}

// One element of the result.
template <typename T, typename O>
__device__ __forceinline__ void store(const SkinnyParams& p, int row, int col, float v) {
  if (row >= p.m || col >= p.n) return;
  if (p.bias != nullptr) v = __fadd_rn(v, as_float(from_float<T>(p.bias[col])));
  O* to = static_cast<O*>(p.out) + row * p.out_stride + col;
  if (p.accumulate) v = __fadd_rn(v, as_float(*to));
  if constexpr (std::is_same_v<O, __half>)
    *to = __float2half_rn(v);
  else
    *to = from_float<O>(v);
}

template <typename T, typename O, int kRows>
__global__ void __launch_bounds__(256) skinny_kernel(const SkinnyParams p) {
  constexpr int kStageK = kSkinnyStageK<kRows>, kRowBytes = kSkinnyRowBytes<kRows>;
  constexpr int kSegments = kStageK / 8;  // of 16 bytes in a row
  constexpr int kTiles = kRows <= 16 ? 1 : kRows / 16;
  extern __shared__ __align__(128) unsigned char smem[];
  const auto ring = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int strips = blockDim.x / 32;
  const int stage_bytes = (kRows + 8 * strips) * kRowBytes;
  const int first_row = blockIdx.y * kRows, first_col = blockIdx.x * 8 * strips;
  const int rows = min(kRows, p.m - first_row);
  const int k16 = (p.k + 15) / 16 * 16;
  const int num_stages = (k16 + kStageK - 1) / kStageK;

  // Rows of x that do not exist are zero once and for all.
  for (int i = threadIdx.x; i < p.stages * (kRows - rows) * (kRowBytes / 16); i += blockDim.x) {
    const int per_stage = (kRows - rows) * (kRowBytes / 16);
    *reinterpret_cast<uint4*>(smem + i / per_stage * stage_bytes + rows * kRowBytes +
                              i % per_stage * 16) = uint4{0, 0, 0, 0};
  }

  const auto copy_weights = [&](int stage) {
    if (stage >= num_stages) return;
    const uint32_t to = ring + stage % p.stages * stage_bytes;
    const int k0 = stage * kStageK, segments = min(kSegments, (k16 - k0) / 8);
    for (int i = threadIdx.x; i < 8 * strips * kSegments; i += blockDim.x) {
      const int r = i / kSegments, segment = i % kSegments;
      const bool exists = segment < segments && first_col + r < p.n;
      const T* from = static_cast<const T*>(p.w);
      if (exists) from += (first_col + r) * p.w_stride + k0 + segment * 8;
      cp_async_part(to + (kRows + r) * kRowBytes + segment * 16, from, exists ? 16 : 0);
    }
  };
  const auto copy_x = [&](int stage) {
    const uint32_t to = ring + stage % p.stages * stage_bytes;
    const int k0 = stage * kStageK;
    for (int i = threadIdx.x; stage < num_stages && i < rows * kSegments; i += blockDim.x) {
      const int r = i / kSegments, segment = i % kSegments;
      const int left = p.k - k0 - segment * 8;  // columns beyond k may be anything
      const T* from = static_cast<const T*>(p.x);
      if (left > 0) from += (first_row + r) * p.x_stride + k0 + segment * 8;
      cp_async_part(to + r * kRowBytes + segment * 16, from, min(16, max(0, 2 * left)));
    }
    cp_async_commit();
  };

  // Weights do not depend on the kernel before this one: their first stages come while it ends.
  for (int s = 0; s < p.stages - 1; ++s) copy_weights(s);
  wait_for_previous();
  let_next_start();
  for (int s = 0; s < p.stages - 1; ++s) copy_x(s);
  float acc[kTiles][4] = {};
  const uint32_t own = lane / 4 * kRowBytes + lane % 4 * 8;
  for (int stage = 0; stage < num_stages; ++stage) {
    wait_for_groups(p.stages - 2);
    __syncthreads();  // this stage is there for all; all are done with the one before
    copy_weights(stage + p.stages - 1);
    copy_x(stage + p.stages - 1);
    const uint32_t x_at = ring + stage % p.stages * stage_bytes + own;
    const uint32_t w_at = x_at + (kRows + 8 * warp) * kRowBytes;
    const int groups = min(kStageK, k16 - stage * kStageK) / 16;
#pragma unroll 8
    for (int g = 0; g < groups; ++g) {
      const uint2 b = load_shared(w_at + g * 32);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint2 low = load_shared(x_at + t * 16 * kRowBytes + g * 32);
        uint2 high{0, 0};
        if constexpr (kRows > 8) high = load_shared(x_at + (t * 16 + 8) * kRowBytes + g * 32);
        const uint32_t a[4] = {low.x, high.x, low.y, high.y};
        mma<T>(acc[t], a, b.x, b.y);
      }
    }
  }
  cp_async_wait<0>();

  const int col = first_col + 8 * warp + lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int row = first_row + t * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store<T, O>(p, row, col + i, acc[t][i]);
      if constexpr (kRows > 8) store<T, O>(p, row + 8, col + i, acc[t][2 + i]);
    }
  }
}

template <typename T, typename O, int kRows>
void launch_skinny(const SkinnyParams& p, const SkinnyPlan& plan, cudaStream_t stream) {
  const auto kernel = skinny_kernel<T, O, kRows>;
  allow_smem(kernel, static_cast<size_t>(plan.smem), "linear_skinny");
  const dim3 grid(static_cast<unsigned>((p.n + 8 * plan.warps - 1) / (8 * plan.warps)),
                  static_cast<unsigned>((p.m + kRows - 1) / kRows));
  launch(kernel, grid, static_cast<unsigned>(32 * plan.warps), static_cast<size_t>(plan.smem),
         stream, "linear_skinny", p);
}

}  // namespace

void linear_skinny(const void* x, int64_t x_stride, int64_t rows, const void* w, int64_t w_stride,
                   int64_t in_features, int64_t out_features, const float* bias, bool accumulate,
                   DType dtype, void* out, DType out_dtype, int64_t out_stride, const Card& card,
                   cudaStream_t stream) {
  if (rows == 0 || out_features == 0) return;
  const SkinnyPlan plan =
      plan_skinny(rows, out_features, card.num_sms, card.max_smem, card.smem_per_sm);
  const SkinnyParams p{x,
                       w,
                       out,
                       bias,
                       x_stride,
                       w_stride,
                       out_stride,
                       static_cast<int>(rows),
                       static_cast<int>(out_features),
                       static_cast<int>(in_features),
                       plan.stages,
                       accumulate};
  dispatch_16bit(dtype, "linear", [&](auto type) {
    using T = decltype(type);
    const auto with_rows = [&](auto out_type) {
      using O = decltype(out_type);
      switch (plan.rows) {
        case 8:
          return launch_skinny<T, O, 8>(p, plan, stream);
        case 16:
          return launch_skinny<T, O, 16>(p, plan, stream);
        case 32:
          return launch_skinny<T, O, 32>(p, plan, stream);
        default:
          return launch_skinny<T, O, 64>(p, plan, stream);
      }
    };
    if (out_dtype == DType::f32) {
      with_rows(float{});
    } else {
      with_rows(T{});
    }
  });
}

}  // namespace ni::cuda
