// The matrix kernel: a block of rows times a panel of 32 outputs.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ni {
namespace {

#if defined(NI_ISA_avx512_bf16)
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

constexpr int kBlockRows = kAccumulators / 2;
constexpr int kPanelVecs = kPanel / kWidth;

// Vectors that R rows keep in registers at once: at least 2, at most `limit`.
constexpr int vectors_for(int rows, int limit) {
  int n = 2;
  while (n * 2 <= limit && n * 2 * rows <= kWideAccumulators) n *= 2;
  return n;
}

// acc[r][v] += x[r * XS] * w[v]
template <int R, int NV, int XS = 1>
NI_INLINE void multiply_add(Vec (&acc)[R][NV], const float* x, const Vec (&w)[NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec xr = v_set(x[r * XS]);
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[r][v] = v_fma(xr, w[v], acc[r][v]);
  }
}

// One element type of weights at a time: acc += x W over the whole of k. `w` points at the first of
// the NV vectors in the panel's row k = 0.
template <int R, int NV, typename W>
NI_INLINE void sum_panel(Vec (&acc)[R][NV], const void* packed, const W* w, int64_t k) {
  const auto* x = static_cast<const float*>(packed);
  for (int64_t i = 0; i < k; ++i, x += R, w += kPanel) {
    Vec wv[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) wv[v] = v_load(w + v * kWidth);
    multiply_add<R, NV>(acc, x, wv);
  }
}

template <int R, int NV>
NI_INLINE void sum_panel(Vec (&acc)[R][NV], const void* packed, const bf16* w, int64_t k) {
#if defined(NI_ISA_avx512_bf16)
  const auto* x = static_cast<const int32_t*>(packed);  // pairs of bf16
  for (int64_t i = 0; i < k; i += 2, x += R, w += 2 * kPanel) {
    __m512bh wv[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v)
      wv[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + v * 2 * kWidth));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto xr = reinterpret_cast<__m512bh>(_mm512_set1_epi32(x[r]));
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], wv[v], xr);
    }
  }
#else
  const auto* x = static_cast<const float*>(packed);
  for (int64_t i = 0; i < k; i += 2, x += 2 * R, w += 2 * kPanel) {
    Vec wv[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) wv[v] = v_load_first(w + v * 2 * kWidth);
    multiply_add<R, NV>(acc, x, wv);
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) wv[v] = v_load_second(w + v * 2 * kWidth);
    multiply_add<R, NV>(acc, x + R, wv);
  }
#endif
}

// Bias, residual and the store of one row's vector at column `col`.
NI_INLINE void finish(const LinearTile& t, int row, int col, Vec sum) {
  const int n = t.cols - col;
  if (n <= 0) return;
  float* out = t.out + row * t.out_stride + col;
  const bool whole = n >= kWidth;
  if (t.bias != nullptr)
    sum = v_add(sum, whole ? v_load(t.bias + col) : v_load_part(t.bias + col, n));
  if (t.accumulate) sum = v_add(whole ? v_load(out) : v_load_part(out, n), sum);
  if (whole)
    v_store(out, sum);
  else
    v_store_part(out, sum, n);
}

template <int R, typename W>
void linear_rows(const LinearTile& t) {
  constexpr int NV = vectors_for(R, kPanelVecs);
  constexpr int kStep = __is_same(W, bf16) ? 2 * kWidth : kWidth;  // elements of a vector
  for (int part = 0; part < kPanelVecs; part += NV) {
    Vec acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] = v_set(0);
    sum_panel<R, NV>(acc, t.x, static_cast<const W*>(t.w) + part * kStep, t.k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) finish(t, r, (part + v) * kWidth, acc[r][v]);
  }
}

template <typename W, int R = kBlockRows>
void linear_typed(const LinearTile& t) {
  if (t.rows == R) return linear_rows<R, W>(t);
  if constexpr (R > 1) linear_typed<W, R - 1>(t);
}

void linear(const LinearTile& t) {
  switch (t.dtype) {
    case DType::bf16:
      return linear_typed<bf16>(t);
    case DType::f16:
      return linear_typed<f16>(t);
    default:
      return linear_typed<float>(t);
  }
}

void pack_rows(const float* x, int64_t stride, int rows, int64_t k, bool to_bf16, void* out) {
  const int64_t padded = k + k % 2;
  if (to_bf16) {
    auto* packed = static_cast<bf16*>(out);
    for (int r = 0; r < rows; ++r)
      for (int64_t i = 0; i < padded; ++i)
        store_scalar(packed + (i / 2 * rows + r) * 2 + i % 2, i < k ? x[r * stride + i] : 0.0f);
  } else {
    auto* packed = static_cast<float*>(out);
    for (int r = 0; r < rows; ++r)
      for (int64_t i = 0; i < padded; ++i) packed[i * rows + r] = i < k ? x[r * stride + i] : 0.0f;
  }
}

}  // namespace
}  // namespace ni
