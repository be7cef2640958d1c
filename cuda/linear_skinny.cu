// y[m, n] = sum over k of x[m, k] W[n, k] (+ bias[n]) (+ y[m, n]) for few rows, in the canonical
// order: one fp32 accumulator of the tensor core, groups of 16 ascending k, the sum never split.
// (The order inside a group does not change the bits, nor does which operand the weights are.)
// Layouts: x [M, x_stride], W [N, w_stride], rows 16-byte aligned. A CTA has up to 64 rows of x and
// a strip of 8 weight rows a warp; stages of 128 or 256 columns of both come through a ring in
// shared memory (cp.async), each warp multiplies its strip. x is the A operand, W the B operand; a
// lane takes four neighbouring k of a row with one 8-byte load, the same for both.
// Moves N * K * 2 bytes of weights once, x once a CTA (from the L2 cache); bound by bandwidth, and
// for short N by the chain of K / 16 dependent products. For all cards but Hopper's, and there for
// K that is no multiple of 64.
#include "cuda/attention.cuh"
#include "cuda/linear.h"
#include "cuda/linear_plan.h"
#include "cuda/linear_skinny.cuh"

namespace ni::cuda {
namespace {

template <int kRows>
constexpr int kSkinnyStageK = skinny_stage_k(kRows);
template <int kRows>
constexpr int kSkinnyRowBytes = skinny_row_bytes(kRows);

struct SkinnyParams {
  SkinnyArgs a;
  int m, n, k;
  int stages;
};

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

// The ring: stage by stage, `rows` rows of x and the strips' weight rows, kRowBytes apart; every
// thread copies 16 bytes at a time.
template <typename T, int kRows>
class Ring {
 public:
  static constexpr int kStageK = kSkinnyStageK<kRows>, kRowBytes = kSkinnyRowBytes<kRows>;

  __device__ Ring(const SkinnyParams& p, uint32_t memory)
      : p_(p),
        memory_(memory),
        strips_(blockDim.x / 32),
        first_row_(blockIdx.y * kRows),
        first_col_(blockIdx.x * 8 * strips_),
        rows_(min(kRows, p.m - first_row_)),
        k16_((p.k + 15) / 16 * 16),
        num_stages_((k16_ + kStageK - 1) / kStageK) {}

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
    const int k0 = stage * kStageK;
    copy(at(stage) + kRows * kRowBytes,
         static_cast<const T*>(p_.a.w) + first_col_ * p_.a.w_stride + k0, p_.a.w_stride,
         8 * strips_, min(8 * strips_, p_.n - first_col_), min(kStageK, k16_ - k0));
  }
  __device__ __forceinline__ void copy_x(int stage) {
    const int k0 = stage * kStageK;
    if (stage < num_stages_)
      copy(at(stage), static_cast<const T*>(p_.a.x) + first_row_ * p_.a.x_stride + k0,
           p_.a.x_stride, rows_, rows_, min(kStageK, (p_.k + 7) / 8 * 8 - k0));
    cp_async_commit();
  }
  // Until the stage is there, for this thread.
  __device__ __forceinline__ void wait() const { wait_for_groups(p_.stages - 2); }

 private:
  const SkinnyParams& p_;
  const uint32_t memory_;
  const int strips_, first_row_, first_col_, rows_, k16_, num_stages_;

  // `rows` rows of a stage, zero where they or their columns do not exist.
  __device__ __forceinline__ void copy(uint32_t to, const T* from, int64_t stride, int rows,
                                       int existing, int width) {
    constexpr int kSegments = kStageK / 8;  // of 16 bytes in a row
    for (int i = threadIdx.x; i < rows * kSegments; i += blockDim.x) {
      const int r = i / kSegments, segment = i % kSegments;
      const bool exists = 8 * segment < width && r < existing;
      cp_async16(to + r * kRowBytes + segment * 16, exists ? from + r * stride + segment * 8 : from,
                 exists);
    }
  }
};

template <typename T, int kRows>
__global__ void __launch_bounds__(256) skinny_kernel(const __grid_constant__ SkinnyParams p) {
  constexpr int kRowBytes = kSkinnyRowBytes<kRows>;
  constexpr int kTiles = kRows <= 16 ? 1 : kRows / 16;
  extern __shared__ __align__(128) unsigned char smem[];
  Ring<T, kRows> ring(p, static_cast<uint32_t>(__cvta_generic_to_shared(smem)));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.y * kRows, first_col = blockIdx.x * blockDim.x / 4;

  // The first stages of the weights come while the kernel before ends.
  if (!p.a.settled) wait_for_previous();
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
    ring.wait();
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
  cp_async_wait<0>();

  const auto store = [&](int row, int col, float v) {
    if (row >= p.m || col >= p.n) return;
    const int64_t at = row * p.a.out_stride + col;
    store_linear<T>(p.a, at, with_bias<T>(p.a, v, col), load_linear<T>(p.a, at));
  };
  const int col = first_col + 8 * warp + lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int row = first_row + t * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store(row, col + i, acc[t][i]);
      if constexpr (kRows > 8) store(row + 8, col + i, acc[t][2 + i]);
    }
  }
}

template <typename T, int kRows>
void launch_skinny(const SkinnyParams& p, const SkinnyPlan& plan, cudaStream_t stream) {
  const auto kernel = skinny_kernel<T, kRows>;
  allow_smem(kernel, static_cast<size_t>(plan.smem), "linear_skinny");
  const dim3 grid(static_cast<unsigned>((p.n + 8 * plan.warps - 1) / (8 * plan.warps)),
                  static_cast<unsigned>((p.m + kRows - 1) / kRows));
  launch(kernel, grid, static_cast<unsigned>(32 * plan.warps), static_cast<size_t>(plan.smem),
         stream, "linear_skinny", p);
}

// A CTA a row.
template <typename U>
__global__ void __launch_bounds__(256)
    count_differences_kernel(const U* a, int64_t a_stride, const U* b, int64_t b_stride,
                             int64_t cols, int* count) {
  wait_for_previous();
  a += blockIdx.x * a_stride;
  b += blockIdx.x * b_stride;
  int found = 0;
  for (int64_t i = threadIdx.x; i < cols; i += blockDim.x) found += a[i] != b[i];
  if (found > 0) atomicAdd(count, found);
}

}  // namespace

static bool is_for_sm90(const SkinnyArgs& a, const Card& card) {
  return card.arch == 90 && a.in_features % 64 == 0;
}

bool fuses_skinny(const SkinnyArgs& a, const Card& card) {
  if (!is_for_sm90(a, card) || a.x_stride % 8 != 0) return false;
  if (a.out_dtype != a.dtype && (a.gated || a.accumulate)) return false;
  if (a.gated && (a.accumulate || a.out_features % (2 * SkinnySm90Plan::kStripRows) != 0))
    return false;
  if (a.norm.weight == nullptr) return a.rows <= kSkinnyMaxTimedGateRows;
  if (a.norm.bias != nullptr || a.rows > kSkinnyMaxNormRows) return false;
  const SkinnySm90Plan plan = plan_skinny_sm90(a.rows, a.out_features, a.in_features, true, a.gated,
                                               card.num_sms, card.max_smem, card.smem_per_sm);
  // Where the weights are many (lm_head), what x takes of the ring costs more than a norm apart.
  constexpr int64_t kManyWeights = int64_t{256} << 20;  // bytes
  constexpr int kLittleX = 16 << 10;
  const bool is_long = !a.gated && 2 * a.out_features * a.in_features > kManyWeights;
  return plan.fits() && (!is_long || plan.x_bytes <= kLittleX);
}

bool makes_units(const SkinnyArgs& a, const Card& card) {
  return is_for_sm90(a, card) && a.out_dtype == DType::f32;
}

void linear_skinny(const SkinnyArgs& a, const Card& card, cudaStream_t stream) {
  if (a.rows == 0 || a.out_features == 0) return;
  if (is_for_sm90(a, card)) return linear_skinny_sm90(a, card, stream);
  check_invariant(a.norm.weight == nullptr && !a.gated && a.units.units == nullptr,
                  "linear_skinny: nothing is fused here");
  const SkinnyPlan plan =
      plan_skinny(a.rows, a.out_features, card.num_sms, card.max_smem, card.smem_per_sm);
  const SkinnyParams p{a, static_cast<int>(a.rows), static_cast<int>(a.out_features),
                       static_cast<int>(a.in_features), plan.stages};
  dispatch_16bit(a.dtype, "linear", [&](auto type) {
    using T = decltype(type);
    switch (plan.rows) {
      case 8:
        return launch_skinny<T, 8>(p, plan, stream);
      case 16:
        return launch_skinny<T, 16>(p, plan, stream);
      case 32:
        return launch_skinny<T, 32>(p, plan, stream);
      default:
        return launch_skinny<T, 64>(p, plan, stream);
    }
  });
}

void count_differences(const Tensor& a, const Tensor& b, int* count, cudaStream_t stream) {
  if (a.rows() == 0) return;
  const auto with_bits = [&](auto bits) {
    using U = decltype(bits);
    launch(count_differences_kernel<U>, static_cast<unsigned>(a.rows()), 256, 0, stream,
           "count_differences", a.as<U>(), a.row_stride, b.as<U>(), b.row_stride, a.cols(), count);
  };
  if (a.dtype == DType::f32) {
    with_bits(uint32_t{});
  } else {
    with_bits(uint16_t{});
  }
}

}  // namespace ni::cuda
