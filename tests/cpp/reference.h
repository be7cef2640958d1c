// Double-precision references of the operators, and what the operator tests share: arrays with
// guarded surroundings, random data, the parameters every suite runs over.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/cpu_backend.h"

namespace ni::test {

inline constexpr double kEps = 1.1920928955078125e-7;  // of float

inline std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_kernels()) names.emplace_back(table->isa);
  return names;
}

inline std::unique_ptr<CpuBackend> make_cpu(const std::string& isa, int threads = 2) {
  BackendOptions options;
  options.isa = isa;
  options.num_threads = threads;
  return std::make_unique<CpuBackend>(options);
}

inline std::vector<float> random_floats(size_t n, uint32_t seed, float scale = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = normal(rng);
  return v;
}

inline float rounded(float v, DType dtype) {
  if (dtype == DType::bf16) return to_float(to_bf16(v));
  if (dtype == DType::f16) return to_float(to_f16(v));
  return v;
}

// The bytes of `v` in another element type.
inline std::vector<char> encode(const std::vector<float>& v, DType dtype) {
  std::vector<char> bytes(v.size() * dtype_size(dtype));
  for (size_t i = 0; i < v.size(); ++i) {
    char* to = bytes.data() + i * dtype_size(dtype);
    if (dtype == DType::bf16) {
      const bf16 h = to_bf16(v[i]);
      std::memcpy(to, &h, 2);
    } else if (dtype == DType::f16) {
      const f16 h = to_f16(v[i]);
      std::memcpy(to, &h, 2);
    } else {
      std::memcpy(to, &v[i], 4);
    }
  }
  return bytes;
}

// A float matrix whose rows are further apart than they are long; every element outside the rows
// holds a sentinel. Elements inside start as NaN, so that one that is not written shows.
class Guarded {
 public:
  Guarded(int64_t rows, int64_t cols, int64_t gap = 5)
      : rows_(rows),
        cols_(cols),
        stride_(cols + gap),
        data_(static_cast<size_t>((rows + 2) * stride_), kSentinel) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) at(r, c) = std::numeric_limits<float>::quiet_NaN();
  }
  Guarded(int64_t rows, int64_t cols, const std::vector<float>& values) : Guarded(rows, cols) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) at(r, c) = values[static_cast<size_t>(r * cols + c)];
  }
  float& at(int64_t r, int64_t c) { return data_[static_cast<size_t>((r + 1) * stride_ + c)]; }
  const float* row(int64_t r) { return &at(r, 0); }
  Tensor tensor() {
    Tensor t(&at(0, 0), DType::f32, {rows_, cols_});
    t.row_stride = stride_;
    return t;
  }
  // Nothing was written outside the rows.
  bool intact() {
    int64_t inside = 0, sentinels = 0;
    for (const float v : data_) sentinels += v == kSentinel;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < cols_; ++c) inside += at(r, c) == kSentinel;
    return sentinels - inside == (rows_ + 2) * stride_ - rows_ * cols_;
  }
  bool same_row(int64_t r, Guarded& other, int64_t s) {
    return std::memcmp(row(r), other.row(s), static_cast<size_t>(cols_) * sizeof(float)) == 0;
  }

 private:
  static constexpr float kSentinel = 12345.678f;
  int64_t rows_, cols_, stride_;
  std::vector<float> data_;
};

// A weight loaded into a backend. Source rows are deliberately misaligned and come in two parts.
struct TestWeight {
  TestWeight(CpuBackend& backend, int64_t out_features, int64_t in_features, DType dtype,
             DType source, const std::vector<float>& values) {
    weight.spec = {out_features, in_features, dtype, false};
    memory = backend.alloc(backend.weight_bytes(weight.spec));
    weight.data = memory.data();
    const std::vector<char> bytes = encode(values, source);
    std::vector<char> shifted(bytes.size() + 1);
    std::copy(bytes.begin(), bytes.end(), shifted.begin() + 1);
    const int64_t cut = out_features / 3;
    const auto row_bytes = in_features * static_cast<int64_t>(dtype_size(source));
    backend.load_rows(weight, 0, Tensor(shifted.data() + 1, source, {cut, in_features}));
    backend.load_rows(
        weight, cut,
        Tensor(shifted.data() + 1 + cut * row_bytes, source, {out_features - cut, in_features}));
  }
  Buffer memory;
  LinearWeight weight;
};

// A value with the error that fp32 arithmetic may make: 20 eps times the sum of magnitudes.
struct Expected {
  double value, magnitude;
};

inline void expect_close(float got, const Expected& want, const std::string& where) {
  EXPECT_LE(std::abs(static_cast<double>(got) - want.value), 20 * kEps * want.magnitude + 1e-37)
      << where;
  EXPECT_FALSE(std::isnan(got)) << where;
}

inline Expected dot(const float* a, const float* b, int64_t n) {
  Expected sum{0, 0};
  for (int64_t i = 0; i < n; ++i) {
    const double product = static_cast<double>(a[i]) * static_cast<double>(b[i]);
    sum.value += product;
    sum.magnitude += std::abs(product);
  }
  return sum;
}

inline double activate(double x, Activation act) {
  switch (act) {
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    default:
      return std::max(x, 0.0);
  }
}

inline std::vector<double> normalise(const std::vector<double>& x, const std::vector<float>& w,
                                     const std::vector<float>* bias, NormKind kind, double eps) {
  const auto n = static_cast<double>(x.size());
  double mean = 0, squares = 0;
  if (kind == NormKind::layer)
    for (const double v : x) mean += v / n;
  for (const double v : x) squares += (v - mean) * (v - mean);
  std::vector<double> y(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    y[i] = (x[i] - mean) / std::sqrt(squares / n + eps) * static_cast<double>(w[i]) +
           (bias != nullptr ? static_cast<double>((*bias)[i]) : 0.0);
  return y;
}

// Softmax attention of one query over tokens [begin, end); k and v: [tokens][head_dim].
inline std::vector<Expected> attend(const float* q, const std::vector<std::vector<float>>& k,
                                    const std::vector<std::vector<float>>& v, int begin, int end,
                                    double scale) {
  const size_t d = v[0].size();
  std::vector<double> p(static_cast<size_t>(end));
  double top = -std::numeric_limits<double>::infinity(), spread = 1, sum = 0;
  for (int t = begin; t < end; ++t) {
    const Expected s = dot(q, k[static_cast<size_t>(t)].data(), static_cast<int64_t>(d));
    p[static_cast<size_t>(t)] = s.value * scale;
    top = std::max(top, s.value * scale);
    spread = std::max(spread, s.magnitude * scale);  // an error of a score is a relative one of exp
  }
  for (int t = begin; t < end; ++t) sum += std::exp(p[static_cast<size_t>(t)] - top);
  std::vector<Expected> out(d, Expected{0, 0});
  for (int t = begin; t < end; ++t) {
    const double weight = std::exp(p[static_cast<size_t>(t)] - top) / sum;
    for (size_t i = 0; i < d; ++i) {
      const double product = weight * static_cast<double>(v[static_cast<size_t>(t)][i]);
      out[i].value += product;
      out[i].magnitude += std::abs(product) * (1 + spread);
    }
  }
  return out;
}

}  // namespace ni::test
