// The kernels as plain loops: what the fast ones must compute, and the place to start reading.
#pragma once

#include <cmath>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ni {
namespace {

constexpr int kBlockRows = 4;
constexpr bool kBf16Dot = false;

// Element i of an array of any floating-point type.
float load(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::bf16) return load_scalar(static_cast<const bf16*>(data) + i);
  if (dtype == DType::f16) return load_scalar(static_cast<const f16*>(data) + i);
  return static_cast<const float*>(data)[i];
}

void pack_rows(const float* x, int64_t stride, int rows, int64_t k, bool /*to_bf16*/, void* out) {
  auto* packed = static_cast<float*>(out);
  for (int64_t i = 0; i < k + k % 2; ++i)
    for (int r = 0; r < rows; ++r) packed[i * rows + r] = i < k ? x[r * stride + i] : 0.0f;
}

// out[r][n] = sum over k of x[r][k] * w[n][k] (+ bias[n])
void linear(const LinearTile& t) {
  const auto* x = static_cast<const float*>(t.x);
  for (int r = 0; r < t.rows; ++r) {
    for (int n = 0; n < t.cols; ++n) {
      float sum = 0;
      for (int64_t k = 0; k < t.k; ++k) {
        const int64_t at =
            t.dtype == DType::bf16 ? ((k / 2) * kPanel + n) * 2 + k % 2 : k * kPanel + n;
        sum += x[k * t.rows + r] * load(t.w, t.dtype, at);
      }
      if (t.bias != nullptr) sum += t.bias[n];
      float& out = t.out[r * t.out_stride + n];
      out = t.accumulate ? out + sum : sum;
    }
  }
}

// softmax(q K^T) V by the online rule: when a larger score appears, what was summed shrinks.
void attention(const AttnTile& t) {
  for (int r = 0; r < t.rows; ++r) {
    float* o = t.o + r * t.v_dim;
    for (int i = t.begin[r]; i < t.end[r]; ++i) {
      const int sub = i / kSubTile, slot = i % kSubTile;
      float score = 0;
      for (int d = 0; d < t.head_dim; ++d)
        score += t.q[d * t.rows + r] * load(t.k[sub], t.dtype, d * kSubTile + slot);
      if (score > t.m[r]) {
        const float shrink = expf(t.m[r] - score);
        for (int d = 0; d < t.v_dim; ++d) o[d] *= shrink;
        t.l[r] *= shrink;
        t.m[r] = score;
      }
      const float p = expf(score - t.m[r]);
      t.l[r] += p;
      for (int d = 0; d < t.v_dim; ++d) o[d] += p * load(t.v[sub], t.dtype, slot * t.v_dim + d);
    }
  }
}

void norm(float* x, const float* add, int64_t n, const NormWeight& w, const NormArgs& a,
          float* out) {
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (add != nullptr) x[i] += add[i];
    if (a.kind == NormKind::layer) mean += x[i];
  }
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double factor = 1 / sqrt(squares / static_cast<double>(n) + a.eps);
  for (int64_t i = 0; i < n; ++i) {
    const double y = (x[i] - mean) * factor * w.weight[i];
    out[i] = static_cast<float>(w.bias != nullptr ? y + w.bias[i] : y);
  }
}

void rotate(float* x, int half, const float* cos, const float* sin) {
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

void activation(const float* x, const float* up, int64_t n, Activation act, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i];
    double y = 0;
    switch (act) {
      case Activation::silu:
        y = v / (1 + exp(-v));
        break;
      case Activation::gelu_tanh:
        y = 0.5 * v * (1 + tanh(0.79788456080286536 * (v + 0.044715 * v * v * v)));
        break;
      case Activation::gelu:
        y = 0.5 * v * erfc(-v * 0.70710678118654752);
        break;
      case Activation::relu:
        y = v < 0 ? 0 : v;
        break;
    }
    out[i] = static_cast<float>(up != nullptr ? y * up[i] : y);
  }
}

void scale(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void load_floats(const void* src, DType dtype, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = load(src, dtype, i);
}

void store_floats(const float* src, int64_t n, DType dtype, void* dst) {
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == DType::bf16)
      store_scalar(static_cast<bf16*>(dst) + i, src[i]);
    else if (dtype == DType::f16)
      store_scalar(static_cast<f16*>(dst) + i, src[i]);
    else
      static_cast<float*>(dst)[i] = src[i];
  }
}

float max(const float* x, int64_t n) {
  float m = -__builtin_inff();
  for (int64_t i = 0; i < n; ++i)
    if (x[i] > m) m = x[i];
  return m;
}

double exp_sum(const float* x, int64_t n, float max, float factor, float* p) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float e = x[i] == x[i] ? expf((x[i] - max) * factor) : 0.0f;
    if (p != nullptr) p[i] = e;
    sum += static_cast<double>(e);
  }
  return sum;
}

}  // namespace
}  // namespace ni
