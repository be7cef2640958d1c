// Double-precision references of the operators, and what the operator tests share: arrays with
// guarded surroundings, random data, the parameters every suite runs over.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/registry.h"
#include "backend/staged_backend.h"
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

// What the operator suites run on: every instruction set, the staging layer over a CPU, and a card,
// if there is one, with either type of activations.
inline std::vector<std::string> device_names() {
  std::vector<std::string> names = isas();
  names.emplace_back("staged_cpu");
  if (!cuda_device_names().empty()) names.insert(names.end(), {"cuda_bf16", "cuda_f16"});
  return names;
}

inline std::string test_name(const testing::TestParamInfo<std::string>& info) {
  return info.param;
}

inline bool on_cuda(const std::string& device) {
  return device.rfind("cuda_", 0) == 0;
}

inline DType activation_type(const std::string& device) {
  if (!on_cuda(device)) return DType::f32;
  return device == "cuda_f16" ? DType::f16 : DType::bf16;
}

// Types of weights that a device can take.
inline std::vector<DType> weight_types(const std::string& device) {
  if (on_cuda(device)) return {activation_type(device)};
  return {DType::f32, DType::bf16, DType::f16};
}

inline std::vector<DType> cache_types(const std::string& device) {
  if (on_cuda(device)) return {activation_type(device), DType::fp8_e4m3};
  return {DType::f32, DType::bf16, DType::f16};
}

inline std::unique_ptr<Backend> make_device(const std::string& device, int threads = 2) {
  BackendOptions options;
  options.activation_dtype = activation_type(device);
  if (on_cuda(device)) return std::make_unique<StagedBackend>(make_backend("cuda", options));
  if (device == "staged_cpu") return std::make_unique<StagedBackend>(make_cpu("portable", threads));
  return make_cpu(device, threads);
}

// One of a kind for the whole program: a card's backend takes a while to make.
inline Backend& shared_device(const std::string& device, int threads = 2) {
  // Never destroyed: at the program's end the libraries that a backend needs may be gone before.
  static auto& made = *new std::map<std::pair<std::string, int>, std::unique_ptr<Backend>>;
  std::unique_ptr<Backend>& backend = made[{device, on_cuda(device) ? 0 : threads}];
  if (backend == nullptr) backend = make_device(device, threads);
  return *backend;
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
  if (dtype == DType::fp8_e4m3) return to_float(to_fp8(v));
  return v;
}

inline std::vector<float> rounded(std::vector<float> v, DType dtype) {
  for (float& x : v) x = rounded(x, dtype);
  return v;
}

// Distance between neighbouring numbers of a narrow type around v; 0 for float32, whose rounding
// the bounds of arithmetic include.
inline double ulp(double v, DType dtype) {
  if (dtype == DType::f32) return 0;
  const int bits = dtype == DType::bf16 ? 7 : dtype == DType::f16 ? 10 : 3;
  const int lowest = dtype == DType::bf16 ? -126 : dtype == DType::f16 ? -14 : -6;
  const int exponent = v == 0 ? lowest : std::max(std::ilogb(v), lowest);
  return std::ldexp(1.0, exponent - bits);
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
    } else if (dtype == DType::fp8_e4m3) {
      const fp8 h = to_fp8(v[i]);
      std::memcpy(to, &h, 1);
    } else {
      std::memcpy(to, &v[i], 4);
    }
  }
  return bytes;
}

inline float decode(const char* from, DType dtype) {
  const auto as = [&](auto v) {
    std::memcpy(&v, from, sizeof(v));
    return to_float(v);
  };
  if (dtype == DType::bf16) return as(bf16{});
  if (dtype == DType::f16) return as(f16{});
  if (dtype == DType::fp8_e4m3) return as(fp8{});
  return as(0.0f);
}

// Memory of a backend that starts as a copy of host bytes.
class BackendBytes {
 public:
  BackendBytes(Backend& backend, const std::vector<char>& bytes)
      : backend_(backend), memory_(backend.alloc(bytes.size())), size_(bytes.size()) {
    backend.upload(bytes.data(), memory_.data(), size_);
  }
  void* data() const { return memory_.data(); }
  std::vector<char> read() const {
    std::vector<char> bytes(size_);
    backend_.synchronize();
    backend_.download(memory_.data(), bytes.data(), size_);
    return bytes;
  }

 private:
  Backend& backend_;
  Buffer memory_;
  size_t size_;
};

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
  TestWeight(Backend& backend, int64_t out_features, int64_t in_features, DType dtype, DType source,
             const std::vector<float>& values) {
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

// `type`: of the result, if it was rounded to a narrow one; then 2 of its units may be off as well.
inline void expect_close(float got, const Expected& want, const std::string& where,
                         DType type = DType::f32) {
  EXPECT_LE(std::abs(static_cast<double>(got) - want.value),
            20 * kEps * want.magnitude + 2 * ulp(want.value, type) + 1e-37)
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

// Softmax attention of one query over tokens [begin, end); k and v: [tokens][head_dim]. softcap: 0:
// none. narrow: the relative error of probabilities that are rounded before they meet v.
inline std::vector<Expected> attend(const float* q, const std::vector<std::vector<float>>& k,
                                    const std::vector<std::vector<float>>& v, int begin, int end,
                                    double scale, double softcap = 0, double narrow = 0) {
  const size_t d = v[0].size();
  std::vector<double> p(static_cast<size_t>(end));
  double top = -std::numeric_limits<double>::infinity(), spread = 1, sum = 0;
  for (int t = begin; t < end; ++t) {
    const Expected s = dot(q, k[static_cast<size_t>(t)].data(), static_cast<int64_t>(d));
    const double score = s.value * scale;
    double& x = p[static_cast<size_t>(t)];
    x = softcap > 0 ? softcap * std::tanh(score / softcap) : score;
    top = std::max(top, x);
    spread = std::max(
        spread, s.magnitude * scale + softcap);  // an error of a score is a relative one of exp
  }
  for (int t = begin; t < end; ++t) sum += std::exp(p[static_cast<size_t>(t)] - top);
  std::vector<Expected> out(d, Expected{0, 0});
  for (int t = begin; t < end; ++t) {
    const double weight = std::exp(p[static_cast<size_t>(t)] - top) / sum;
    for (size_t i = 0; i < d; ++i) {
      const double product = weight * static_cast<double>(v[static_cast<size_t>(t)][i]);
      out[i].value += product;
      out[i].magnitude += std::abs(product) * (1 + spread + narrow / (20 * kEps));
    }
  }
  return out;
}

}  // namespace ni::test
