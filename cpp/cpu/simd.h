// Vec: as many floats as the instruction set of this translation unit takes at once. Only
// kernels.cpp includes this; everything is local to it, so that no function compiled with wide
// instructions can be linked into other code. Multiply-adds are written out: the compiler must not
// fuse some and not others.
#pragma once

#include <cstdint>

#include "core/types.h"

#if defined(NI_ISA_avx2) || defined(NI_ISA_avx512) || defined(NI_ISA_avx512_bf16)
#include <immintrin.h>
#endif

#define NI_INLINE static inline __attribute__((always_inline))

namespace ni {
namespace {

#if defined(NI_ISA_avx512) || defined(NI_ISA_avx512_bf16)

constexpr int kWidth = 16;
constexpr int kAccumulators = 24;      // of 32 registers
constexpr int kWideAccumulators = 24;  // where four or more vectors of weights are held beside them
using Vec = __m512;

NI_INLINE Vec v_set(float x) {
  return _mm512_set1_ps(x);
}
NI_INLINE Vec v_load(const float* p) {
  return _mm512_loadu_ps(p);
}
NI_INLINE void v_store(float* p, Vec a) {
  _mm512_storeu_ps(p, a);
}
NI_INLINE Vec v_add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
NI_INLINE Vec v_sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
NI_INLINE Vec v_mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
NI_INLINE Vec v_div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
NI_INLINE Vec v_fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
// Both return b where either is NaN.
NI_INLINE Vec v_max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
NI_INLINE Vec v_min(Vec a, Vec b) {
  return _mm512_min_ps(a, b);
}
NI_INLINE Vec v_round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT);
}
// 2^n for integral n in [-126, 127].
NI_INLINE Vec v_exp2i(Vec n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}
// 0 where x < limit, else a.
NI_INLINE Vec v_zero_below(Vec a, Vec x, Vec limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), a);
}

NI_INLINE Vec v_load(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
NI_INLINE Vec v_load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Of kWidth pairs of bf16 the first or the second.
NI_INLINE Vec v_load_first(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
NI_INLINE Vec v_load_second(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)));
}

#elif defined(NI_ISA_avx2)

constexpr int kWidth = 8;
constexpr int kAccumulators = 12;     // of 16 registers
constexpr int kWideAccumulators = 8;  // where four or more vectors of weights are held beside them
using Vec = __m256;

NI_INLINE Vec v_set(float x) {
  return _mm256_set1_ps(x);
}
NI_INLINE Vec v_load(const float* p) {
  return _mm256_loadu_ps(p);
}
NI_INLINE void v_store(float* p, Vec a) {
  _mm256_storeu_ps(p, a);
}
NI_INLINE Vec v_add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
NI_INLINE Vec v_sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
NI_INLINE Vec v_mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
NI_INLINE Vec v_div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}
NI_INLINE Vec v_fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
NI_INLINE Vec v_max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
NI_INLINE Vec v_min(Vec a, Vec b) {
  return _mm256_min_ps(a, b);
}
NI_INLINE Vec v_round(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NI_INLINE Vec v_exp2i(Vec n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
NI_INLINE Vec v_zero_below(Vec a, Vec x, Vec limit) {
  return _mm256_and_ps(a, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ));
}

NI_INLINE Vec v_load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
NI_INLINE Vec v_load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
NI_INLINE Vec v_load_first(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(h, 16));
}
NI_INLINE Vec v_load_second(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(h, _mm256_set1_epi32(-65536)));
}

#else  // portable: the compiler's own vectors; SSE2 or NEON

constexpr int kWidth = 4;
constexpr int kAccumulators = 12;
constexpr int kWideAccumulators = 8;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
typedef uint32_t UintVec __attribute__((vector_size(16)));

NI_INLINE Vec v_set(float x) {
  return Vec{x, x, x, x};
}
NI_INLINE Vec v_load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
NI_INLINE void v_store(float* p, Vec a) {
  __builtin_memcpy(p, &a, sizeof(a));
}
NI_INLINE Vec v_add(Vec a, Vec b) {
  return a + b;
}
NI_INLINE Vec v_sub(Vec a, Vec b) {
  return a - b;
}
NI_INLINE Vec v_mul(Vec a, Vec b) {
  return a * b;
}
NI_INLINE Vec v_div(Vec a, Vec b) {
  return a / b;
}
// The baseline has no fused multiply-add: two roundings.
NI_INLINE Vec v_fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
NI_INLINE Vec v_max(Vec a, Vec b) {
  return a > b ? a : b;
}
NI_INLINE Vec v_min(Vec a, Vec b) {
  return a < b ? a : b;
}
NI_INLINE Vec v_round(Vec a) {  // |a| < 2^22
  const Vec magic = v_set(12582912.0f);
  return (a + magic) - magic;
}
NI_INLINE Vec v_exp2i(Vec n) {
  return reinterpret_cast<Vec>((__builtin_convertvector(n, IntVec) + 127) << 23);
}
NI_INLINE Vec v_zero_below(Vec a, Vec x, Vec limit) {
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(a) & ~(x < limit));
}

typedef uint16_t HalfVec __attribute__((vector_size(8)));
NI_INLINE UintVec v_load_halves(const void* p) {
  HalfVec h;
  __builtin_memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, UintVec);
}
NI_INLINE Vec v_load(const bf16* p) {
  return reinterpret_cast<Vec>(v_load_halves(p) << 16);
}
// The exponent is rebiased by a multiplication, which takes subnormals along.
NI_INLINE Vec v_load(const f16* p) {
  const UintVec h = v_load_halves(p), magnitude = h & 0x7fffu;
  const UintVec scaled =
      reinterpret_cast<UintVec>(reinterpret_cast<Vec>(magnitude << 13) * v_set(0x1p112f));
  const UintVec special = reinterpret_cast<UintVec>(magnitude >= 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<Vec>(scaled | special | ((h & 0x8000u) << 16));
}
NI_INLINE Vec v_load_first(const bf16* p) {
  UintVec u;
  __builtin_memcpy(&u, p, sizeof(u));
  return reinterpret_cast<Vec>(u << 16);
}
NI_INLINE Vec v_load_second(const bf16* p) {
  UintVec u;
  __builtin_memcpy(&u, p, sizeof(u));
  return reinterpret_cast<Vec>(u & 0xffff0000u);
}

#endif

// -- 16-bit floats, one at a time (core/types.h has the same as shared inline functions, which this
// file must not use) -----------------------------------------------------------------------------
NI_INLINE float as_float(uint32_t u) {
  return __builtin_bit_cast(float, u);
}
NI_INLINE uint32_t as_bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

NI_INLINE float load_scalar(const float* p) {
  return *p;
}
NI_INLINE float load_scalar(const bf16* p) {
  return as_float(static_cast<uint32_t>(p->bits) << 16);
}
NI_INLINE float load_scalar(const f16* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const uint32_t exponent = (p->bits >> 10) & 0x1fu, mantissa = p->bits & 0x3ffu;
  if (exponent == 0)  // zero or subnormal
    return as_float(as_bits(static_cast<float>(mantissa) * 0x1p-24f) | sign);
  return as_float(sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13));
}

// Round to nearest, ties to even.
NI_INLINE void store_scalar(float* p, float x) {
  *p = x;
}
NI_INLINE void store_scalar(bf16* p, float x) {
  const uint32_t u = as_bits(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = nan ? (u | 0x400000u) : u + 0x7fffu + ((u >> 16) & 1u);
  p->bits = static_cast<uint16_t>(rounded >> 16);
}
NI_INLINE void store_scalar(f16* p, float x) {
  const uint32_t u = as_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477fe000u) {  // the largest: an infinity in the cache would turn the rows of
    h = 0x7bffu;                  // other tokens of its tile into NaN (0 * inf)
  } else if (a < 0x38800000u) {   // subnormal: adding 0.5 leaves round(|x| * 2^24) in the low bits
    h = as_bits(as_float(a) + 0.5f) - 0x3f000000u;
  } else {
    h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | h);
}

// -- Parts of a vector ---------------------------------------------------------------------------
// n < kWidth elements; the others are zero.
NI_INLINE Vec v_load_part(const float* p, int64_t n) {
  float part[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return v_load(part);
}
NI_INLINE void v_store_part(float* p, Vec a, int64_t n) {
  float part[kWidth];
  v_store(part, a);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// Sum and maximum over the lanes, halving: a fixed order.
NI_INLINE float v_sum(Vec a) {
  float x[kWidth];
  v_store(x, a);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}
NI_INLINE float v_max_lane(Vec a) {
  float x[kWidth];
  v_store(x, a);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
  return x[0];
}

// exp within 2 ulp; 0 below -86.6 (2.5e-38), infinity above 88.8; exp(0) is exactly 1; NaN stays.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r by the Taylor polynomial of degree 7.
NI_INLINE Vec v_exp(Vec x) {
  const Vec lowest = v_set(-86.6f);
  const Vec c = v_min(v_set(88.8f), v_max(lowest, x));
  const Vec n = v_round(v_mul(c, v_set(1.44269504f)));
  Vec r = v_fma(n, v_set(-0.693359375f), c);  // ln 2 in two parts; the first product is exact
  r = v_fma(n, v_set(2.12194440e-4f), r);
  Vec p = v_set(1.0f / 5040);
  p = v_fma(p, r, v_set(1.0f / 720));
  p = v_fma(p, r, v_set(1.0f / 120));
  p = v_fma(p, r, v_set(1.0f / 24));
  p = v_fma(p, r, v_set(1.0f / 6));
  p = v_fma(p, r, v_set(0.5f));
  p = v_fma(p, r, v_set(1.0f));
  p = v_fma(p, r, v_set(1.0f));
  // 2^n as 2 * 2^(n - 1): n reaches 128.
  return v_zero_below(v_mul(v_add(p, p), v_exp2i(v_sub(n, v_set(1.0f)))), x, lowest);
}

}  // namespace
}  // namespace ni
