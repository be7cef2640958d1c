// What the groups of bench_cuda share: tables, memory filled with random data, time on the card.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/check_cuda.h"
#include "cuda/kernels.h"

namespace ni::cuda::bench {

constexpr double kMissing = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kMiB = 1 << 20;

// Llama 3.1 8B; blocks as the engine's.
constexpr int32_t kHeads = 32, kKvHeads = 8, kHeadDim = 128, kBlockSize = 16;
constexpr int64_t kQkvCols = (kHeads + 2 * kKvHeads) * kHeadDim;

// -- Tables ---------------------------------------------------------------------------------------

struct Cell {
  std::string text;
  double number = kMissing;
  bool is_text = false;

  Cell(const char* t) : text(t), is_text(true) {}
  Cell(std::string t) : text(std::move(t)), is_text(true) {}
  template <typename T>
    requires std::is_arithmetic_v<T>
  Cell(T v) : number(static_cast<double>(v)) {}

  std::string markdown() const;
  std::string json() const;
};

struct Table {
  std::string name, title;
  std::vector<std::string> columns;
  std::vector<std::vector<Cell>> rows;

  void print() const;
  std::string json() const;
};

// -- Memory ---------------------------------------------------------------------------------------

template <typename T>
class Device {
 public:
  explicit Device(int64_t n) : n_(n) {
    void* data = nullptr;
    check_cuda(cudaMalloc(&data, bytes()), "memory for a benchmark");
    data_.reset(static_cast<T*>(data));
  }
  explicit Device(const std::vector<T>& v) : Device(static_cast<int64_t>(v.size())) {
    check_cuda(cudaMemcpy(data(), v.data(), bytes(), cudaMemcpyHostToDevice), "upload");
  }
  T* data() const { return data_.get(); }
  size_t bytes() const { return static_cast<size_t>(n_) * sizeof(T); }

 private:
  struct Free {
    void operator()(T* p) const { cudaFree(p); }
  };
  int64_t n_;
  std::unique_ptr<T, Free> data_;
};

const std::vector<float>& normals();  // about a million

// n random elements: normals(), converted, over and over.
template <typename T, typename Convert>
Device<T> random_of(int64_t n, const Convert& convert) {
  const auto pool = static_cast<int64_t>(normals().size());
  std::vector<T> head(static_cast<size_t>(std::min(n, pool)));
  for (size_t i = 0; i < head.size(); ++i) head[i] = convert(normals()[i]);
  Device<T> out(n);
  check_cuda(cudaMemcpy(out.data(), head.data(), head.size() * sizeof(T), cudaMemcpyHostToDevice),
             "upload");
  for (int64_t have = std::min(n, pool); have < n; have *= 2)
    check_cuda(cudaMemcpy(out.data() + have, out.data(),
                          static_cast<size_t>(std::min(have, n - have)) * sizeof(T),
                          cudaMemcpyDeviceToDevice),
               "filling memory");
  return out;
}

Device<bf16> random_bf16(int64_t n, float scale = 1);
Device<float> random_f32(int64_t n, float scale = 1);

std::vector<int32_t> permutation(int32_t n);

// -- Time -----------------------------------------------------------------------------------------

class Timer {
 public:
  Timer();
  Timer(const Timer&) = delete;
  ~Timer();
  cudaStream_t stream() const { return stream_; }

  using Call = std::function<void(int64_t i)>;

  // Microseconds of a call, where i runs through [0, copies) over and over.
  double us(int64_t copies, const Call& call);
  // The same with a graph of `calls` of them.
  double us_of(int64_t calls, int64_t copies, const Call& call);
  // The same without a graph, for long calls: a copy is slower as a node of a graph.
  double us_on_stream(const Call& call);

 private:
  static constexpr int kRounds = 9, kWarmups = 2;
  static constexpr int64_t kCalls = 200;
  static constexpr double kGraphUs = 1500;

  void record(int i);
  double between(int i, int j);

  cudaStream_t stream_ = nullptr;
  cudaEvent_t events_[kRounds + 1] = {};
};

struct Bench {
  std::string name;
  Card card;
  int64_t l2_bytes = 0;
  Timer timer;
  double copy_gbs = 0;  // bytes read and written
  std::vector<Table> tables;

  Bench();
  // Of what lies in device memory: no copy is in L2 when its turn comes again.
  int64_t cold_copies(int64_t bytes) const {
    return bytes > 8 * l2_bytes ? 1 : 5 * l2_bytes / bytes + 1;
  }
  int64_t activation_copies(int64_t bytes) const {
    return bytes > l2_bytes / 2 ? cold_copies(bytes) : 1;
  }
  double gbs(double bytes, double us) const { return bytes / us * 1e-3; }
  double share(double bytes, double us) const { return 100 * gbs(bytes, us) / copy_gbs; }
  void finish(Table table);
};

// -- Groups ---------------------------------------------------------------------------------------

void bench_rows(Bench& b);
void bench_linear(Bench& b);
void bench_skinny(Bench& b);
void bench_large(Bench& b);
void bench_decode(Bench& b);
void bench_prefill(Bench& b);
void bench_sampler(Bench& b);

double product_tflops(Bench& b);  // of a large bf16 product

}  // namespace ni::cuda::bench
