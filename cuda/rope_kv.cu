// One kernel between the qkv product and attention: per-head RMSNorm of q and k (Qwen3), rotary
// position embedding (Su et al., "RoFormer", 2021; Hugging Face's order: i pairs with i + half),
// and the write of k and v into the paged cache, in its type (fp8: divided by its scale).
//   q' = rotate(norm(q)) in place;  cache[slot] = rotate(norm(k)), v
// Layout: qkv [T, (heads + 2 kv_heads) * d]; cos, sin [positions, rotary_dim / 2]; cache: KvView
// with plain rows. One warp a (row, head); a lane holds elements 2 * lane, 2 * lane + 1 (+ 64 …) of
// both halves of the rotated dimensions. Reads and writes each element once: about T * (2 heads + 4
// kv_heads) * d * 2 bytes; bound by bandwidth, by the launch where rows are few.
#include <cuda_fp8.h>

#include "cuda/kernels.h"
#include "cuda/rope.cuh"

namespace ni::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxPairs = 4;  // of elements, a lane: head_dim <= 256; kernels: 1, 2 or 4

// Counts and slots in 32 bits: wide divisions would take longer than all else.
struct RopeParams {
  void* qkv;
  int64_t qkv_stride;
  uint32_t rows;
  int num_heads;
  const int32_t* positions;
  const int64_t* slot_mapping;
  RopeArgs rope;
  KvView kv;
  float inverse_k_scale, inverse_v_scale;
  bool settled;  // common.cuh; of positions and slots
};

// T: activations, C: cache.
template <typename T, typename C, int kPairs>
__global__ void __launch_bounds__(kWarps * 32) rope_kv_kernel(const RopeParams p) {
  if (!p.settled) wait_for_previous();
  const int lane = threadIdx.x % 32;
  const uint32_t heads = p.num_heads + 2 * p.kv.num_kv_heads;
  const uint32_t unit = blockIdx.x * kWarps + threadIdx.x / 32, row = unit / heads;
  const int head = static_cast<int>(unit - row * heads);
  const int d = p.kv.head_dim, half = p.rope.rotary_dim / 2;
  const bool is_q = head < p.num_heads;
  const bool is_v = head >= p.num_heads + p.kv.num_kv_heads;
  const float* norm = is_q ? p.rope.q_norm.weight : p.rope.k_norm.weight;
  int32_t slot = 0;
  C* to = nullptr;
  // Pair k: elements [2 * lane + 64 k, + 2) of the head. What depends on no other kernel first.
  float2 v[kPairs], weight[kPairs], cos[kPairs], sin[kPairs];
  if (row < p.rows) {
    if (!is_q) {
      slot = static_cast<int32_t>(p.slot_mapping[row]);
      const int kv_head = is_v ? head - p.num_heads - p.kv.num_kv_heads : head - p.num_heads;
      const int block = slot / p.kv.block_size;
      to = static_cast<C*>(is_v ? p.kv.v : p.kv.k) +
           p.kv.v_offset(block, kv_head, slot - block * p.kv.block_size, 0);
    }
    const int64_t at = static_cast<int64_t>(p.positions[row]) * half;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = 2 * lane + 64 * k;
      if (i < d && !is_v && norm != nullptr) weight[k] = *reinterpret_cast<const float2*>(norm + i);
      if (i >= 2 * half || is_v || p.rope.cos == nullptr) continue;
      const int64_t j = at + (i >= half ? i - half : i);
      cos[k] = *reinterpret_cast<const float2*>(p.rope.cos + j);
      sin[k] = *reinterpret_cast<const float2*>(p.rope.sin + j);
    }
  }
  if (p.settled) wait_for_previous();
  let_next_start();
  if (row >= p.rows || slot < 0) return;  // a padding row writes nothing
  T* x = static_cast<T*>(p.qkv) + row * p.qkv_stride + static_cast<int64_t>(head) * d;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int i = 2 * lane + 64 * k;
    if (i >= d) continue;
    const Vec<T, 2> e = *reinterpret_cast<const Vec<T, 2>*>(x + i);
    v[k] = {as_float(e.v[0]), as_float(e.v[1])};
  }
  if (!is_v) {
    if (norm != nullptr) normalise_head(v, weight, lane, d, p.rope.norm_eps);
    if (p.rope.cos != nullptr) {
      // The partner of element i is i + half or i - half, which another lane may hold.
      extern __shared__ float exchange[];
      float* own = exchange + static_cast<int64_t>(threadIdx.x / 32) * d;
#pragma unroll
      for (int k = 0; k < kPairs; ++k)
        if (2 * lane + 64 * k < d) *reinterpret_cast<float2*>(own + 2 * lane + 64 * k) = v[k];
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const int i = 2 * lane + 64 * k;
        if (i >= 2 * half) continue;
        const bool upper = i >= half;
        const float2 other = *reinterpret_cast<const float2*>(own + (upper ? i - half : i + half));
        v[k] = rotate_pair(v[k], other, cos[k], sin[k], upper);
      }
    }
  }

  if (is_q) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k)
      if (2 * lane + 64 * k < d) store_pair(x + 2 * lane + 64 * k, v[k], 1.0f);
    return;
  }
  const float inverse = is_v ? p.inverse_v_scale : p.inverse_k_scale;
#pragma unroll
  for (int k = 0; k < kPairs; ++k)
    if (2 * lane + 64 * k < d) store_pair(to + 2 * lane + 64 * k, v[k], inverse);
}

}  // namespace

void rope_kv_write(void* qkv, int64_t qkv_stride, int64_t rows, int32_t num_heads,
                   const int32_t* positions, const int64_t* slot_mapping, const RopeArgs& a,
                   const KvView& kv, DType dtype, bool settled, cudaStream_t stream) {
  if (rows == 0) return;
  check_arg(kv.head_dim % 4 == 0 && kv.head_dim <= 64 * kMaxPairs, "rope_kv_write: head_dim ",
            kv.head_dim, " is not a multiple of 4 up to ", 64 * kMaxPairs);
  check_arg(a.rotary_dim % 4 == 0 && a.rotary_dim <= kv.head_dim, "rope_kv_write: rotary_dim ",
            a.rotary_dim, " is not a multiple of 4 up to ", kv.head_dim);
  check_arg(kv.tile() == 1, "rope_kv_write: K must be plain rows on CUDA");
  const int64_t units = rows * (num_heads + 2 * kv.num_kv_heads), limit = int64_t{1} << 31;
  check_arg(units < limit && int64_t{kv.num_blocks} * kv.block_size < limit,
            "rope_kv_write: ", rows, " rows or ", kv.num_blocks, " blocks are too many");
  const RopeParams p{
      qkv, qkv_stride, static_cast<uint32_t>(rows), num_heads,         positions, slot_mapping,
      a,   kv,         1.0f / kv.k_scale,           1.0f / kv.v_scale, settled};
  const auto grid = static_cast<unsigned>((units + kWarps - 1) / kWarps);
  const size_t smem = kWarps * sizeof(float) * static_cast<size_t>(kv.head_dim);
  dispatch_16bit(dtype, "rope_kv_write", [&](auto type) {
    using T = decltype(type);
    const auto with_cache = [&](auto cache) {
      using C = decltype(cache);
      const auto kernel = kv.head_dim <= 64    ? rope_kv_kernel<T, C, 1>
                          : kv.head_dim <= 128 ? rope_kv_kernel<T, C, 2>
                                               : rope_kv_kernel<T, C, kMaxPairs>;
      launch(kernel, grid, kWarps * 32, smem, stream, "rope_kv_write", p);
    };
    if (kv.dtype == DType::fp8_e4m3) {
      with_cache(__nv_fp8_e4m3{});
    } else {
      check_arg(kv.dtype == dtype, "rope_kv_write: a cache of ", dtype_name(kv.dtype), " with ",
                dtype_name(dtype), " activations; it must be of the same type or fp8_e4m3");
      with_cache(T{});
    }
  });
}

}  // namespace ni::cuda
