// y[m, n] = sum over k of x[m, k] W[n, k] (+ bias[n]) (+ y[m, n]) for few rows, in the canonical
// order: one fp32 accumulator of the tensor core, groups of 16 ascending k, the sum never split.
// (The order inside a group does not change the bits, nor does which operand the weights are.)
// Layouts: x [M, x_stride], W [N, w_stride], rows 16-byte aligned. A CTA has up to 64 rows of x and
// a strip of 8 weight rows a warp; stages of 128 or 256 columns of both come through a ring in
// shared memory (cp.async.bulk on Hopper, else cp.async), each warp multiplies its strip. x is the
// A operand, W the B operand; a lane takes four neighbouring k of a row with one 8-byte load, the
// same for both. Moves N * K * 2 bytes of weights once, x once a CTA (from the L2 cache); bound by
// bandwidth, which needs bytes in flight (the ring) and an even spread of strips, and for short N
// by the chain of K / 16 dependent products.
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

// mbarriers and the copy engine (PTX ISA, Hopper on); a barrier's phase ends when one thread has
// said how many bytes to expect and they have arrived.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void fence_async_proxy() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
}
// A multiple of 16 bytes.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
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

// The ring: stage by stage, `rows` rows of x and the strips' weight rows, kRowBytes apart. On
// Hopper the copy engine moves whole row segments and counts their bytes on a barrier a stage;
// before, every thread copies 16 bytes at a time.
template <typename T, int kRows, bool kBulk>
class Ring {
 public:
  static constexpr int kStageK = kSkinnyStageK<kRows>, kRowBytes = kSkinnyRowBytes<kRows>;

  __device__ Ring(const SkinnyParams& p, uint32_t memory, uint32_t barriers)
      : p_(p),
        memory_(memory),
        barriers_(barriers),
        strips_(blockDim.x / 32),
        first_row_(blockIdx.y * kRows),
        first_col_(blockIdx.x * 8 * strips_),
        rows_(min(kRows, p.m - first_row_)),
        k16_((p.k + 15) / 16 * 16),
        num_stages_((k16_ + kStageK - 1) / kStageK) {
    if constexpr (kBulk) {
      if (threadIdx.x == 0) {
        for (int s = 0; s < p.stages; ++s) mbarrier_init(barriers_ + 8 * s);
        fence_mbarrier_init();
      }
      if (p.k % 16 != 0) {  // columns that no copy writes are multiplied, too, with zeros
        for (int i = threadIdx.x; i < p.stages * stage_bytes() / 16; i += blockDim.x)
          asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(memory_ + 16 * i), "r"(0)
                       : "memory");
        fence_async_proxy();
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ int rows() const { return rows_; }  // of x that exist
  __device__ __forceinline__ int num_stages() const { return num_stages_; }
  __device__ __forceinline__ int stage_bytes() const { return (kRows + 8 * strips_) * kRowBytes; }
  __device__ __forceinline__ uint32_t at(int stage) const {
    return memory_ + stage % p_.stages * stage_bytes();
  }
  __device__ __forceinline__ int groups(int stage) const {
    return min(kStageK, k16_ - stage * kStageK) / 16;
  }

  __device__ __forceinline__ void copy_weights(int stage) {
    if (stage >= num_stages_) return;
    const uint32_t to = at(stage) + kRows * kRowBytes;
    const int k0 = stage * kStageK, width = min(kStageK, k16_ - k0);
    const int count = min(8 * strips_, p_.n - first_col_);
    const T* from = static_cast<const T*>(p_.w) + first_col_ * p_.w_stride + k0;
    if constexpr (kBulk) {
      const uint32_t barrier = barriers_ + 8 * (stage % p_.stages);
      if (threadIdx.x == 0)
        mbarrier_expect(barrier, static_cast<uint32_t>(2 * (count * width + rows_ * x_width(k0))));
      for (int r = threadIdx.x; r < count; r += blockDim.x)
        bulk_copy(to + r * kRowBytes, from + r * p_.w_stride, static_cast<uint32_t>(2 * width),
                  barrier);
    } else {
      constexpr int kSegments = kStageK / 8;  // of 16 bytes in a row
      for (int i = threadIdx.x; i < 8 * strips_ * kSegments; i += blockDim.x) {
        const int r = i / kSegments, segment = i % kSegments;
        const bool exists = 8 * segment < width && r < count;
        const T* source = exists ? from + r * p_.w_stride + segment * 8 : from;
        cp_async16(to + r * kRowBytes + segment * 16, source, exists);
      }
    }
  }

  __device__ __forceinline__ void copy_x(int stage) {
    if (stage < num_stages_) {
      const int k0 = stage * kStageK;
      const T* from = static_cast<const T*>(p_.x) + first_row_ * p_.x_stride + k0;
      const int width = x_width(k0);
      if constexpr (kBulk) {
        for (int r = threadIdx.x; width > 0 && r < rows_; r += blockDim.x)
          bulk_copy(at(stage) + r * kRowBytes, from + r * p_.x_stride,
                    static_cast<uint32_t>(2 * width), barriers_ + 8 * (stage % p_.stages));
      } else {
        constexpr int kSegments = kStageK / 8;
        for (int i = threadIdx.x; i < rows_ * kSegments; i += blockDim.x) {
          const int r = i / kSegments, segment = i % kSegments;
          const bool exists = 8 * segment < width;
          const T* source = exists ? from + r * p_.x_stride + segment * 8 : from;
          cp_async16(at(stage) + r * kRowBytes + segment * 16, source, exists);
        }
      }
    }
    if constexpr (!kBulk) cp_async_commit();
  }

  // Until the stage is there, for every thread.
  __device__ __forceinline__ void wait(int stage) {
    if constexpr (kBulk) {
      mbarrier_wait(barriers_ + 8 * (stage % p_.stages),
                    static_cast<uint32_t>(stage / p_.stages % 2));
    } else {
      wait_for_groups(p_.stages - 2);
    }
  }

 private:
  const SkinnyParams& p_;
  const uint32_t memory_, barriers_;
  const int strips_, first_row_, first_col_, rows_, k16_, num_stages_;

  // Columns of x in a stage, up to a multiple of 8.
  __device__ __forceinline__ int x_width(int k0) const {
    return max(0, min(kStageK, (p_.k + 7) / 8 * 8 - k0));
  }
};

template <typename T, typename O, int kRows, bool kBulk>
__global__ void __launch_bounds__(256) skinny_kernel(const __grid_constant__ SkinnyParams p) {
  constexpr int kRowBytes = kSkinnyRowBytes<kRows>;
  constexpr int kTiles = kRows <= 16 ? 1 : kRows / 16;
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ uint64_t barriers[kSkinnyMaxStages];
  Ring<T, kRows, kBulk> ring(p, static_cast<uint32_t>(__cvta_generic_to_shared(smem)),
                             static_cast<uint32_t>(__cvta_generic_to_shared(barriers)));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.y * kRows, first_col = blockIdx.x * blockDim.x / 4;

  // Weights do not depend on the kernel before this one: their first stages come while it ends.
  for (int s = 0; s < p.stages - 1; ++s) ring.copy_weights(s);
  wait_for_previous();
  let_next_start();
  for (int s = 0; s < p.stages - 1; ++s) ring.copy_x(s);
  float acc[kTiles][4] = {};
  // Rows that do not exist are computed on the last one, and not stored.
  uint32_t x_rows[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      x_rows[t][h] = min(t * 16 + 8 * h + lane / 4, ring.rows() - 1) * kRowBytes + lane % 4 * 8;
  const uint32_t w_row = (kRows + 8 * warp + lane / 4) * kRowBytes + lane % 4 * 8;
  // Operands are loaded a batch ahead of the chain of products that needs them.
  constexpr int kBatch = kTiles == 1 ? 8 : kTiles == 2 ? 4 : 2;
  for (int stage = 0; stage < ring.num_stages(); ++stage) {
    ring.wait(stage);
    __syncthreads();  // this stage is there for all; all are done with the one before
    ring.copy_weights(stage + p.stages - 1);
    ring.copy_x(stage + p.stages - 1);
    const unsigned char* at = smem + (ring.at(stage) - ring.at(0));
    const int groups = ring.groups(stage);
    for (int first = 0; first < groups; first += kBatch) {
      uint2 b[kBatch], a[kBatch][kTiles][2];
#pragma unroll
      for (int g = 0; g < kBatch; ++g) {
        const int k = min(first + g, groups - 1) * 32;
        b[g] = *reinterpret_cast<const uint2*>(at + w_row + k);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int h = 0; h < (kRows > 8 ? 2 : 1); ++h)
            a[g][t][h] = *reinterpret_cast<const uint2*>(at + x_rows[t][h] + k);
      }
#pragma unroll
      for (int g = 0; g < kBatch; ++g) {
        if (first + g >= groups) break;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint2 low = a[g][t][0], high = kRows > 8 ? a[g][t][1] : uint2{0, 0};
          const uint32_t fragment[4] = {low.x, high.x, low.y, high.y};
          mma<T>(acc[t], fragment, b[g].x, b[g].y);
        }
      }
    }
  }
  if constexpr (!kBulk) cp_async_wait<0>();

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
void launch_skinny(const SkinnyParams& p, const SkinnyPlan& plan, bool bulk, cudaStream_t stream) {
  const auto kernel = bulk ? skinny_kernel<T, O, kRows, true> : skinny_kernel<T, O, kRows, false>;
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
  const bool bulk = card.arch >= 90;
  dispatch_16bit(dtype, "linear", [&](auto type) {
    using T = decltype(type);
    const auto with_rows = [&](auto out_type) {
      using O = decltype(out_type);
      switch (plan.rows) {
        case 8:
          return launch_skinny<T, O, 8>(p, plan, bulk, stream);
        case 16:
          return launch_skinny<T, O, 16>(p, plan, bulk, stream);
        case 32:
          return launch_skinny<T, O, 32>(p, plan, bulk, stream);
        default:
          return launch_skinny<T, O, 64>(p, plan, bulk, stream);
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
