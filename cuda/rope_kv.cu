// One kernel between the qkv product and attention: per-head RMSNorm of q and k (Qwen3), rotary
// position embedding (Su et al., "RoFormer", 2021; Hugging Face's order: i pairs with i + half),
// and the write of k and v into the paged cache, in its type (fp8: divided by its scale).
//   q' = rotate(norm(q)) in place;  cache[slot] = rotate(norm(k)), v
// Layout: qkv [T, (heads + 2 kv_heads) * d]; cos, sin [positions, rotary_dim / 2]; cache: KvView
// with plain rows. Where all dimensions rotate (or none) and d is 64 or 128, d / 16 lanes a (row,
// head), each with 8 elements of the lower half and the 8 of the upper half that rotate with them;
// else one warp a (row, head), a lane holds elements 2 * lane, 2 * lane + 1 (+ 64 …) of both halves
// of the rotated dimensions. Reads and writes each element once: about T * (2 heads + 4 kv_heads) *
// d * 2 bytes; bound by bandwidth, by the launch where rows are few.
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

__device__ __forceinline__ void load8(float (&v)[8], const float* from) {
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    *reinterpret_cast<float4*>(v + i) = *reinterpret_cast<const float4*>(from + i);
}
template <typename C>
__device__ __forceinline__ void store8(C* to, const float (&v)[8], float inverse_scale) {
  Vec<C, 8> out;
#pragma unroll
  for (int i = 0; i < 8; i += 2) store_pair(out.v + i, {v[i], v[i + 1]}, inverse_scale);
  *reinterpret_cast<Vec<C, 8>*>(to) = out;
}

// Of a head whose D / 16 lanes have 8 elements of either half: warp_sum() of what normalise_head()
// gives its 32 lanes, addition by addition.
template <int D>
__device__ __forceinline__ float sum_of_squares(const float (&v)[2][8]) {
  float part[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto add = [&](float s, int h) {
      return __fmaf_rn(v[h][2 * i + 1], v[h][2 * i + 1], __fmaf_rn(v[h][2 * i], v[h][2 * i], s));
    };
    // 64 dimensions: the halves lie in lanes 16 apart there.
    part[i] = D == 64 ? add(0, 0) + add(0, 1) : add(add(0, 0), 1);
#pragma unroll
    for (int apart = D / 32; apart > 0; apart /= 2)
      part[i] += __shfl_xor_sync(0xffffffffu, part[i], apart);
  }
  return (part[0] + part[2]) + (part[1] + part[3]);
}

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

// The same for D dimensions that rotate all or not at all, with the same bits: the squares of a
// head are summed as normalise_head() sums them. What one lane has there, lane l, lies here in lane
// l / 4 of the head, as number l % 4.
template <typename T, typename C, int D>
__global__ void __launch_bounds__(kWarps * 32) rope_kv_wide_kernel(const RopeParams p) {
  constexpr int kLanes = D / 16;  // of a head
  using Elements = Vec<T, 8>;
  if (!p.settled) wait_for_previous();
  const uint32_t heads = p.num_heads + 2 * p.kv.num_kv_heads;
  const uint32_t unit = (blockIdx.x * (kWarps * 32) + threadIdx.x) / kLanes, row = unit / heads;
  const int head = static_cast<int>(unit - row * heads), lane = threadIdx.x % kLanes;
  const bool is_q = head < p.num_heads;
  const bool is_v = head >= p.num_heads + p.kv.num_kv_heads;
  const bool exists = row < p.rows;
  const float* norm = is_v ? nullptr : (is_q ? p.rope.q_norm : p.rope.k_norm).weight;
  const bool turns = !is_v && p.rope.cos != nullptr;
  // What depends on no other kernel first.
  int32_t slot = 0;
  float cos[8], sin[8], weight[2][8];
  if (exists) {
    if (!is_q) slot = static_cast<int32_t>(p.slot_mapping[row]);
    if (turns) {
      const int64_t at = static_cast<int64_t>(p.positions[row]) * (D / 2) + 8 * lane;
      load8(cos, p.rope.cos + at);
      load8(sin, p.rope.sin + at);
    }
    if (norm != nullptr) {
      load8(weight[0], norm + 8 * lane);
      load8(weight[1], norm + D / 2 + 8 * lane);
    }
  }
  if (p.settled) wait_for_previous();
  let_next_start();
  const bool works = exists && slot >= 0;  // a padding row writes nothing
  T* x = static_cast<T*>(p.qkv) + row * p.qkv_stride + static_cast<int64_t>(head) * D + 8 * lane;
  float v[2][8] = {};
  if (works) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Elements e = *reinterpret_cast<const Elements*>(x + h * (D / 2));
#pragma unroll
      for (int i = 0; i < 8; ++i) v[h][i] = as_float(e.v[i]);
    }
  }
  // By whole warps, for neighbours may have a norm.
  if (p.rope.q_norm.weight != nullptr || p.rope.k_norm.weight != nullptr) {
    const float sum = sum_of_squares<D>(v);
    if (norm != nullptr) {
      const float factor = head_factor(sum, D, p.rope.norm_eps);
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 8; ++i) v[h][i] = __fmul_rn(v[h][i], __fmul_rn(factor, weight[h][i]));
    }
  }
  if (!works) return;
  if (turns) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float2 low{v[0][i], v[0][i + 1]}, high{v[1][i], v[1][i + 1]};
      const float2 c{cos[i], cos[i + 1]}, s{sin[i], sin[i + 1]};
      const float2 turned[2] = {rotate_pair(low, high, c, s, false),
                                rotate_pair(high, low, c, s, true)};
#pragma unroll
      for (int h = 0; h < 2; ++h) v[h][i] = turned[h].x, v[h][i + 1] = turned[h].y;
    }
  }
  C* to = nullptr;
  if (!is_q) {
    const int kv_head = head - p.num_heads - (is_v ? p.kv.num_kv_heads : 0);
    const int block = slot / p.kv.block_size;
    to = static_cast<C*>(is_v ? p.kv.v : p.kv.k) + 8 * lane +
         p.kv.v_offset(block, kv_head, slot - block * p.kv.block_size, 0);
  }
  const float inverse = is_v ? p.inverse_v_scale : p.inverse_k_scale;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (is_q) {
      store8(x + h * (D / 2), v[h], 1.0f);
    } else {
      store8(to + h * (D / 2), v[h], inverse);
    }
  }
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
  // (A thread has an index of its own, 32 a unit.)
  check_arg(units < limit / 32 && int64_t{kv.num_blocks} * kv.block_size < limit,
            "rope_kv_write: ", rows, " rows or ", kv.num_blocks, " blocks are too many");
  const RopeParams p{
      qkv, qkv_stride, static_cast<uint32_t>(rows), num_heads,         positions, slot_mapping,
      a,   kv,         1.0f / kv.k_scale,           1.0f / kv.v_scale, settled};
  const bool is_wide =
      (kv.head_dim == 64 || kv.head_dim == 128) &&
      (a.rotary_dim == kv.head_dim || a.cos == nullptr) && is_vector_aligned(qkv, qkv_stride) &&
      is_vector_aligned(kv.k, kv.block_stride) && is_vector_aligned(kv.v, kv.block_stride) &&
      is_vector_aligned(a.cos, 0) && is_vector_aligned(a.sin, 0) &&
      is_vector_aligned(a.q_norm.weight, 0) && is_vector_aligned(a.k_norm.weight, 0);
  const int64_t lanes = is_wide ? kv.head_dim / 16 : 32;  // of a unit
  const auto grid = static_cast<unsigned>((units * lanes + kWarps * 32 - 1) / (kWarps * 32));
  const size_t smem = is_wide ? 0 : kWarps * sizeof(float) * static_cast<size_t>(kv.head_dim);
  dispatch_16bit(dtype, "rope_kv_write", [&](auto type) {
    using T = decltype(type);
    const auto with_cache = [&](auto cache) {
      using C = decltype(cache);
      const auto kernel = is_wide && kv.head_dim == 64 ? rope_kv_wide_kernel<T, C, 64>
                          : is_wide                    ? rope_kv_wide_kernel<T, C, 128>
                          : kv.head_dim <= 64          ? rope_kv_kernel<T, C, 1>
                          : kv.head_dim <= 128         ? rope_kv_kernel<T, C, 2>
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
