// What the attention kernels share, so that the same row has the same bits in all of them:
//   s = q.k  (tensor core, groups of 16 dimensions ascending);  capped: s = cap tanh(s scale / cap)
//   per tile of 64 tokens:  m' = max(m, max s);  P = exp2(s c - m' c), rounded to 16 bits;
//     a = exp2((m - m') c);  l = l a + P 1;  O = O a + P V  (tensor core, 16 tokens ascending)
//   per chunk of 256 tokens, ascending:  M' = max(M, m);  a, b = exp2((M, m - M') c);
//     L = L a + l b;  A = A a + O b
//   out = A (v_scale / L)
// Tiles and chunks lie at absolute multiples; a chunk starts from m = -inf, l = O = 0. Every
// multiply and add is an explicit intrinsic: contraction may not differ from kernel to kernel.
//
// Fragments of mma.sync m16n8k16 (PTX ISA), lane = 4 g + c: the accumulator of 16 x 8 holds rows g
// and g + 8, columns 2 c and 2 c + 1; wgmma's accumulator is the same for each warp's 16 rows.
//
// fp8 caches stay fp8 in shared memory and become f16 in registers (exactly; before Ada NaN becomes
// 480); so q (rounded; beyond 65504 it saturates) and P are f16 beside them, whatever activations
// are (Operand). A 16-byte row segment then holds 16 dimensions instead of 8, which permutes what a
// lane has: dimensions of a group of 16 for q.k (q is permuted alike: as_operands, or as it is
// read), columns of the output (see store_unit).
#pragma once

#include <cuda_fp8.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/attention_plan.h"
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace ni::cuda {

// The kernels for prefill_items; attention_prefill() chooses. The first returns false where it does
// not apply.
bool attention_prefill_sm90(const AttnParams& p, int32_t num_items, const Card& card,
                            cudaStream_t stream);
void attention_prefill_mma(const AttnParams& p, int32_t num_items, const Card& card,
                           cudaStream_t stream);

// -- Host -----------------------------------------------------------------------------------------

struct ScoreScale {
  float c;       // exponents of 2 are (capped) scores times this
  float cap;     // soft cap, 0: none
  float cap_in;  // 2 log2(e) scale k_scale / cap
};

inline ScoreScale score_scale(const AttnArgs& a, float k_scale) {
  constexpr float kLog2e = 1.4426950408889634f;
  const float scale = a.scale * k_scale;
  if (a.softcap > 0) return {kLog2e, a.softcap, 2 * kLog2e * (scale / a.softcap)};
  return {scale * kLog2e, 0, 0};
}

inline bool is_aligned(const void* data, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

inline void check_attention(const AttnParams& p, const char* what) {
  const KvView& kv = p.kv;
  check_arg(p.dtype == DType::bf16 || p.dtype == DType::f16, what, ": ", dtype_name(p.dtype),
            " is not supported on CUDA; bfloat16, float16 are");
  check_arg(kv.dtype == p.dtype || kv.dtype == DType::fp8_e4m3, what, ": a cache of ",
            dtype_name(kv.dtype), " beside activations of ", dtype_name(p.dtype),
            "; it must be the same or fp8_e4m3");
  check_arg(is_attention_head_dim(kv.head_dim), what, ": head_dim ", kv.head_dim,
            " is not supported on CUDA; ", kAttentionHeadDims, " are");
  check_arg(kv.block_size > 0 && kv.block_size % 16 == 0, what, ": block_size ", kv.block_size,
            " must be a multiple of 16");
  check_arg(kv.k_tile == 1, what, ": k_tile ", kv.k_tile, " must be 1");
  check_arg(kv.num_kv_heads > 0 && p.args.num_heads > 0 && p.args.num_heads % kv.num_kv_heads == 0,
            what, ": num_heads ", p.args.num_heads, " must be a multiple of num_kv_heads ",
            kv.num_kv_heads);
  check_arg(p.args.scale > 0 && std::isfinite(p.args.scale), what, ": scale ", p.args.scale,
            " must be above 0");
  check_arg(p.args.softcap >= 0 && std::isfinite(p.args.softcap), what, ": softcap ",
            p.args.softcap, " must be at least 0");
  check_arg(p.args.window >= 0, what, ": window ", p.args.window, " must be at least 0");
  check_arg(
      kv.k_scale > 0 && kv.v_scale > 0 && std::isfinite(kv.k_scale) && std::isfinite(kv.v_scale),
      what, ": k_scale ", kv.k_scale, " and v_scale ", kv.v_scale, " must be above 0");
  const auto kv_bytes = static_cast<int64_t>(dtype_size(kv.dtype));
  check_arg(is_aligned(p.q, 2 * p.q_stride) && is_aligned(p.out, 2 * p.out_stride) &&
                is_aligned(kv.k, kv_bytes * kv.block_stride) &&
                is_aligned(kv.v, kv_bytes * kv.block_stride),
            what, ": q, out and the cache must be 16-byte aligned, their strides too");
}

// Calls f(T{}, C{}, std::integral_constant<int, head_dim>) with the types of activations and cache.
template <typename F>
void dispatch_attention(const AttnParams& p, const char* what, const F& f) {
  dispatch_16bit(p.dtype, what, [&](auto type) {
    using T = decltype(type);
    const auto with_head_dim = [&](auto cache) {
      switch (p.kv.head_dim) {
        case 64:
          return f(T{}, cache, std::integral_constant<int, 64>{});
        case 96:
          return f(T{}, cache, std::integral_constant<int, 96>{});
        case 128:
          return f(T{}, cache, std::integral_constant<int, 128>{});
        default:
          return f(T{}, cache, std::integral_constant<int, 256>{});
      }
    };
    if (p.kv.dtype == DType::fp8_e4m3) {
      with_head_dim(__nv_fp8_e4m3{});
    } else {
      with_head_dim(T{});
    }
  });
}

// -- Softmax --------------------------------------------------------------------------------------

// cap tanh(s scale / cap), tanh(x) = 1 - 2 / (exp(2 x) + 1): an absolute error of some eps * cap.
__device__ __forceinline__ float capped_score(float s, const ScoreScale& scale) {
  const float e = fast_exp2(__fmul_rn(s, scale.cap_in));
  return __fmul_rn(scale.cap, __fmaf_rn(-2.0f, fast_reciprocal(__fadd_rn(e, 1.0f)), 1.0f));
}

template <typename C>
inline constexpr bool kIsFp8 = std::is_same_v<C, __nv_fp8_e4m3>;
// The type of the products, for activations T and a cache of C.
template <typename T, typename C>
using Operand = std::conditional_t<kIsFp8<C>, __half, T>;

// A maximum that may be subtracted: that of nothing counts as 0.
__device__ __forceinline__ float safe_max(float m) {
  return m == -INFINITY ? 0.0f : m;
}

// exp2((m - new_max) c): what sums for the maximum m are worth under a new one.
__device__ __forceinline__ float rescale(float m, float new_safe_max, float c) {
  return fast_exp2(__fmul_rn(__fsub_rn(m, new_safe_max), c));
}

// exp2(s c - m c); minus_mc = -(m c), rounded.
__device__ __forceinline__ float probability(float s, float c, float minus_mc) {
  return fast_exp2(__fmaf_rn(s, c, minus_mc));
}

__device__ __forceinline__ int first_visible(int position, int window) {
  return window > 0 ? max(0, position - window + 1) : 0;
}

// Two floats, rounded to nearest even, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The same for results: f16 saturates.
template <typename T>
__device__ __forceinline__ uint32_t pack2_out(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    low = fminf(fmaxf(low, -65504.0f), 65504.0f);
    high = fminf(fmaxf(high, -65504.0f), 65504.0f);
  }
  return pack2<T>(low, high);
}

// Both elements 1: with it as B operand, a product is the row sum of A in every column.
template <typename T>
inline constexpr uint32_t kOnes2 = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;

// Scores of a warp's 16 rows and a tile of 64 tokens: s[n] holds tokens 8 n + 2 c, + 1 for rows g
// (elements 0, 1) and g + 8 (2, 3).
using Scores = float[kTile / 8][4];

__device__ __forceinline__ void cap_scores(Scores& s, const ScoreScale& scale) {
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = capped_score(s[n][i], scale);
}

// -inf outside [first_visible(position), position], for row g (r = 0) or g + 8 (r = 1).
__device__ __forceinline__ void mask_row(Scores& s, int r, int tile_begin, int position,
                                         int window) {
  const int first = first_visible(position, window);
  const uint32_t token0 = tile_begin + 2 * (threadIdx.x % 4) - first;
  const uint32_t visible = max(position + 1 - first, 0);
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)  // before the first it is a large number
      if (token0 + 8 * n + i >= visible) s[n][2 * r + i] = -INFINITY;
}
__device__ __forceinline__ void mask_scores(Scores& s, int tile_begin, const int (&position)[2],
                                            int window) {
#pragma unroll
  for (int r = 0; r < 2; ++r) mask_row(s, r, tile_begin, position[r], window);
}

// A softmax step for rows that one warp owns: scores (capped and masked) become P as A fragments,
// p[k] for tokens 16 k …; m moves on; alpha is what l and O are to be multiplied with before P is
// added to them.
template <typename T>
__device__ __forceinline__ void softmax_tile(const Scores& s, float (&m)[2], float (&alpha)[2],
                                             uint32_t (&p)[kTile / 16][4], float c) {
  float minus_mc[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = m[r];
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float safe = safe_max(top);
    alpha[r] = rescale(m[r], safe, c);
    minus_mc[r] = -__fmul_rn(safe, c);
    m[r] = top;
  }
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows g, g + 8 of tokens 16 k + 2 c, then of 16 k + 8 + 2 c
      const int n = 2 * k + i / 2, r = i % 2;
      p[k][i] = pack2<T>(probability(s[n][2 * r], c, minus_mc[r]),
                         probability(s[n][2 * r + 1], c, minus_mc[r]));
    }
}

// -- Merging chunks -------------------------------------------------------------------------------

struct MergeFactors {
  float total, chunk;
};

// Moves the total maximum on to include a chunk's.
__device__ __forceinline__ MergeFactors merge_max(float& total_max, float chunk_max, float c) {
  const float top = fmaxf(total_max, chunk_max);
  const float safe = safe_max(top);
  const MergeFactors f{rescale(total_max, safe, c), rescale(chunk_max, safe, c)};
  total_max = top;
  return f;
}

// For L and for every element of A.
__device__ __forceinline__ float merge_sum(float total, float chunk, const MergeFactors& f) {
  return __fmaf_rn(total, f.total, __fmul_rn(chunk, f.chunk));
}

// out = A * this.
__device__ __forceinline__ float final_scale(float l, float v_scale) {
  return l > 0 ? __fdiv_rn(v_scale, l) : 0.0f;
}

// -- Tensor core and copies -----------------------------------------------------------------------

// acc += A[16, 16] B[16, 8]
template <typename T>
__device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The lane, in a way that the compiler cannot see through: what is computed from it is computed
// anew where it is needed instead of being kept in registers across a loop.
__device__ __forceinline__ int opaque_lane() {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

// Addresses of shared memory are 32-bit (__cvta_generic_to_shared).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes past the registers; zeros if !valid, and then `from` is not read.
__device__ __forceinline__ void cp_async16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A tile in shared memory: rows of kRowBytes without padding; 16-byte segments are XORed with the
// row so that the 8 rows that ldmatrix reads together lie in different banks.
template <int kRowBytes>
__device__ __forceinline__ uint32_t segment_offset(int row, int segment) {
  static_assert(kRowBytes % 32 == 0);
  int x;
  if constexpr (kRowBytes % 128 == 0) {
    x = row % 8;
  } else if constexpr (kRowBytes % 64 == 0) {
    x = row / 2 % 4;
  } else {
    x = row / 4 % 2;
  }
  return row * kRowBytes + (segment ^ x) * 16;
}

// Layouts of a tile: at(row, segment) is the offset of a 16-byte segment.
template <int kBytes>
struct RowLayout {
  static constexpr int kRowBytes = kBytes;
  static __device__ __forceinline__ uint32_t at(int row, int segment) {
    return segment_offset<kBytes>(row, segment);
  }
};
// What the copy engine leaves of pieces of 16 rows: rows are cut into parts as wide as it permutes.
template <int kBytes>
struct BoxLayout {
  static constexpr int kRowBytes = kBytes;
  static constexpr int kPart = kBytes % 128 == 0 ? 128 : kBytes % 64 == 0 ? 64 : 32;
  static constexpr int kParts = kBytes / kPart;
  static constexpr int kPieceBytes = 16 * kBytes;
  static __device__ __forceinline__ uint32_t at(int row, int segment) {
    constexpr int kSegments = kPart / 16;
    return row / 16 * kPieceBytes + segment / kSegments * (16 * kPart) +
           segment_offset<kPart>(row % 16, segment % kSegments);
  }
};

// Two e4m3 in the lower half of a word -> f16, exactly.
__device__ __forceinline__ uint32_t widen_fp8(uint32_t w) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t v;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(v) : "h"(static_cast<uint16_t>(w)));
  return v;
#else
  // The exponent is put in place and its bias corrected (subnormals come out right); NaN is 480.
  const uint32_t spread = __byte_perm(w, 0, 0x1404);
  const uint32_t bits = (spread & 0x80008000u) | (spread & 0x7f007f00u) >> 1;
  const __half2 v = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.0f));
  return reinterpret_cast<const uint32_t&>(v);
#endif
}

// Two bf16 -> f16, rounded; beyond its range they saturate, NaN stays NaN.
__device__ __forceinline__ uint32_t f16_of_bf16(uint32_t two) {
  uint32_t v;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;"
      : "=r"(v)
      : "f"(__uint_as_float(two & 0xffff0000u)), "f"(__uint_as_float(two << 16)));
  return v;
}

// B fragments [k step][n tile][2] of two steps of 16 and two tiles of 8.
using Fragments = uint32_t[2][2][2];

// For q.k: tokens [token, token + 16) are the columns, dimensions [32 k2, + 32) the two steps.
template <typename C, typename Layout>
__device__ __forceinline__ void load_k(Fragments& b, uint32_t tile, int token, int k2, int lane) {
  const int row = token + lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
  uint32_t r[4];
  if constexpr (kIsFp8<C>) {  // a segment is 16 dimensions: lane c has 4 c … 4 c + 3
    ldmatrix_x4(r, tile + Layout::at(row, 2 * k2 + half));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i % 2][i / 2][0] = widen_fp8(r[i]);
      b[i % 2][i / 2][1] = widen_fp8(r[i] >> 16);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      ldmatrix_x4(r, tile + Layout::at(row, 4 * k2 + 2 * k + half));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[k][i / 2][i % 2] = r[i];
    }
  }
}

// For P.V: columns are the unit of 16 dimensions `unit`, tokens [token, token + 32) the two steps.
// With fp8, tile 0 holds the even dimensions and tile 1 the odd ones.
template <typename C, typename Layout>
__device__ __forceinline__ void load_v(Fragments& b, uint32_t tile, int token, int unit, int lane) {
  uint32_t r[4];
  if constexpr (kIsFp8<C>) {
    ldmatrix_x4_trans(r, tile + Layout::at(token + lane, unit));
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 8 tokens each
      const uint32_t even_odd = __byte_perm(r[i], 0, 0x3120);
      b[i / 2][0][i % 2] = widen_fp8(even_odd);
      b[i / 2][1][i % 2] = widen_fp8(even_odd >> 16);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      ldmatrix_x4_trans(r, tile + Layout::at(token + 16 * k + lane % 16, 2 * unit + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[k][i / 2][i % 2] = r[i];
    }
  }
}

// 16 elements of q as the two 16-byte segments of its row in shared memory: for fp8 caches as f16,
// in the order in which load_k's lanes hold the dimensions.
template <typename T, typename C>
__device__ __forceinline__ void as_operands(uint4 (&v)[2]) {
  if constexpr (!std::is_same_v<T, Operand<T, C>>) {
#pragma unroll
    for (uint4& s : v) s = {f16_of_bf16(s.x), f16_of_bf16(s.y), f16_of_bf16(s.z), f16_of_bf16(s.w)};
  }
  if constexpr (kIsFp8<C>) {
    const uint4 low{v[0].x, v[0].z, v[1].x, v[1].z}, high{v[0].y, v[0].w, v[1].y, v[1].w};
    v[0] = low;
    v[1] = high;
  }
}

// An accumulator of 16 rows and the 16 columns of a unit: two tiles of 8.
using Unit = float[2][4];

// One row (half 0: g, 1: g + 8) of a unit times `scale`, to `row`: the unit's first column.
template <typename T, typename C>
__device__ __forceinline__ void store_unit(T* row, const Unit& o, int half, float scale) {
  const int c = threadIdx.x % 4;
  float v[2][2];
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) v[n][i] = __fmul_rn(o[n][2 * half + i], scale);
  if constexpr (kIsFp8<C>) {
    *reinterpret_cast<uint2*>(row + 4 * c) =
        uint2{pack2_out<T>(v[0][0], v[1][0]), pack2_out<T>(v[0][1], v[1][1])};
  } else {
    *reinterpret_cast<uint32_t*>(row + 2 * c) = pack2_out<T>(v[0][0], v[0][1]);
    *reinterpret_cast<uint32_t*>(row + 8 + 2 * c) = pack2_out<T>(v[1][0], v[1][1]);
  }
}

// The same in fp32, as it is.
template <typename C>
__device__ __forceinline__ void store_unit_f32(float* row, const Unit& o, int half) {
  const int c = threadIdx.x % 4;
  const float *even = o[0] + 2 * half, *odd = o[1] + 2 * half;
  if constexpr (kIsFp8<C>) {
    *reinterpret_cast<float4*>(row + 4 * c) = float4{even[0], odd[0], even[1], odd[1]};
  } else {
    *reinterpret_cast<float2*>(row + 2 * c) = float2{even[0], even[1]};
    *reinterpret_cast<float2*>(row + 8 + 2 * c) = float2{odd[0], odd[1]};
  }
}

// -- The paged cache ------------------------------------------------------------------------------

// A warp starts copying kRows rows of kRowBytes from rows kSourceBytes apart into rows [row, …) of
// a tile; those at or beyond `valid` become zero.
template <int kRows, int kRowBytes, int kSourceBytes>
__device__ __forceinline__ void copy_rows(uint32_t tile, int row, const void* from, int valid) {
  constexpr int kSegments = kRowBytes / 16;
  const int lane = opaque_lane();
#pragma unroll
  for (int base = 0; base < kRows * kSegments; base += 32) {
    const int i = base + lane;
    if (kRows * kSegments % 32 != 0 && i >= kRows * kSegments) break;
    const int r = i / kSegments, segment = i % kSegments;
    cp_async16(tile + segment_offset<kRowBytes>(row + r, segment),
               static_cast<const char*>(from) + r * kSourceBytes + segment * 16, r < valid);
  }
}

}  // namespace ni::cuda
