// Kernels along one row: norms, RoPE, activations, conversions, softmax weights.
#pragma once

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ni {
namespace {

// f(vector of x, index, count): whole vectors, then one partly filled (missing lanes are zero).
template <typename Fn>
NI_INLINE void for_vectors(const float* x, int64_t n, const Fn& f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(v_load(x + i), i, kWidth);
  if (i < n) f(v_load_part(x + i, n - i), i, static_cast<int>(n - i));
}
NI_INLINE Vec load_n(const float* p, int n) {
  return n == kWidth ? v_load(p) : v_load_part(p, n);
}
NI_INLINE void store_n(float* p, Vec a, int n) {
  if (n == kWidth)
    v_store(p, a);
  else
    v_store_part(p, a, n);
}

// Sum of (x - mean)^2 in four interleaved chains per lane.
NI_INLINE float sum_squares(const float* x, int64_t n, float mean) {
  Vec sum[4] = {v_set(0), v_set(0), v_set(0), v_set(0)};
  const Vec shift = v_set(mean);
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      const Vec d = v_sub(v_load(x + i + j * kWidth), shift);
      sum[j] = v_fma(d, d, sum[j]);
    }
  }
  float rest = 0;
  for (; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3]))) + rest;
}

void norm(float* x, const float* add, int64_t n, const NormWeight& w, const NormArgs& a,
          float* out) {
  if (add != nullptr)
    for_vectors(x, n,
                [&](Vec v, int64_t i, int m) { store_n(x + i, v_add(v, load_n(add + i, m)), m); });
  float mean = 0;
  if (a.kind == NormKind::layer) {
    Vec sum = v_set(0);
    for_vectors(x, n, [&](Vec v, int64_t, int) { sum = v_add(sum, v); });
    mean = v_sum(sum) / static_cast<float>(n);
  }
  const float variance = sum_squares(x, n, mean) / static_cast<float>(n);
  const Vec factor = v_set(1.0f / sqrtf(variance + a.eps)), shift = v_set(mean);
  for_vectors(x, n, [&](Vec v, int64_t i, int m) {
    const Vec y = v_mul(v_mul(v_sub(v, shift), factor), load_n(w.weight + i, m));
    store_n(out + i, w.bias != nullptr ? v_add(y, load_n(w.bias + i, m)) : y, m);
  });
}

void rotate(float* x, int half, const float* cos, const float* sin) {
  for_vectors(x, half, [&](Vec a, int64_t i, int m) {
    const Vec b = load_n(x + half + i, m), c = load_n(cos + i, m), s = load_n(sin + i, m);
    store_n(x + i, v_sub(v_mul(a, c), v_mul(b, s)), m);
    store_n(x + half + i, v_add(v_mul(b, c), v_mul(a, s)), m);
  });
}

// x / (1 + e^-y)
NI_INLINE Vec times_sigmoid(Vec x, Vec y) {
  const Vec one = v_set(1);
  return v_div(x, v_add(one, v_exp(v_sub(v_set(0), y))));
}

NI_INLINE Vec activate(Vec x, Activation act) {
  switch (act) {
    case Activation::silu:
      return times_sigmoid(x, x);
    case Activation::gelu_tanh: {  // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
      const Vec cubic = v_fma(v_mul(x, x), v_set(0.044715f), v_set(1));
      return times_sigmoid(x, v_mul(v_mul(x, cubic), v_set(1.59576912f)));
    }
    case Activation::gelu: {
      float lane[kWidth];
      v_store(lane, x);
      for (int i = 0; i < kWidth; ++i) lane[i] = 0.5f * lane[i] * erfcf(-0.707106781f * lane[i]);
      return v_load(lane);
    }
    default:
      return v_max(v_set(0), x);  // NaN stays
  }
}

void activation(const float* x, const float* up, int64_t n, Activation act, float* out) {
  for_vectors(x, n, [&](Vec v, int64_t i, int m) {
    const Vec y = activate(v, act);
    store_n(out + i, up != nullptr ? v_mul(y, load_n(up + i, m)) : y, m);
  });
}

void scale(float* x, int64_t n, float factor) {
  for_vectors(x, n, [&](Vec v, int64_t i, int m) { store_n(x + i, v_mul(v, v_set(factor)), m); });
}

template <typename E>
NI_INLINE void load_typed(const E* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) v_store(dst + i, v_load(src + i));
  for (; i < n; ++i) dst[i] = load_scalar(src + i);
}

void load_floats(const void* src, DType dtype, int64_t n, float* dst) {
  switch (dtype) {
    case DType::bf16:
      return load_typed(static_cast<const bf16*>(src), n, dst);
    case DType::f16:
      return load_typed(static_cast<const f16*>(src), n, dst);
    default:
      return load_typed(static_cast<const float*>(src), n, dst);
  }
}

template <typename E>
NI_INLINE void store_typed(const float* src, int64_t n, E* dst) {
  for (int64_t i = 0; i < n; ++i) store_scalar(dst + i, src[i]);
}

void store_floats(const float* src, int64_t n, DType dtype, void* dst) {
  switch (dtype) {
    case DType::bf16:
      return store_typed(src, n, static_cast<bf16*>(dst));
    case DType::f16:
      return store_typed(src, n, static_cast<f16*>(dst));
    default:
      return store_typed(src, n, static_cast<float*>(dst));
  }
}

float max(const float* x, int64_t n) {
  const float lowest = -__builtin_inff();
  Vec top = v_set(lowest);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) top = v_max(v_load(x + i), top);
  float m = v_max_lane(top);
  for (; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

double exp_sum(const float* x, int64_t n, float max, float factor, float* p) {
  const Vec shift = v_set(max), f = v_set(factor);
  double total = 0;
  constexpr int64_t kChunk = 1024;  // short fp32 sums, added up in double
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    Vec sum = v_set(0);
    for_vectors(x + begin, n - begin < kChunk ? n - begin : kChunk, [&](Vec v, int64_t i, int m) {
      // v_max turns NaN into a number whose exp is 0.
      Vec e = v_exp(v_max(v_mul(v_sub(v, shift), f), v_set(-100)));
      if (m < kWidth) {  // missing lanes are no elements
        float part[kWidth] = {};
        v_store_part(part, e, m);
        e = v_load(part);
      }
      sum = v_add(sum, e);
      if (p != nullptr) store_n(p + begin + i, e, m);
    });
    total += static_cast<double>(v_sum(sum));
  }
  return total;
}

}  // namespace
}  // namespace ni
