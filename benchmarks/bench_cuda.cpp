// What the CUDA kernels reach, beside the ceilings of the card in the same run: the rate of a copy,
// and that of a large bf16 product. One table a group; --json also writes the numbers to a file.
//   bench_cuda [--json FILE] [rows|linear|decode|prefill|sampler|launch …]     default: all
//
// A time is the median over replays of a graph of many calls, over the number of calls, so kernels
// overlap as they do in a captured step (programmatic dependent launch). Data are random. What a
// step finds in device memory alternates between enough copies that L2 does not hold it: weights,
// caches, embedding rows, and activations larger than half of L2. Smaller activations stay: in a
// step, too, the operator before has just written them.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/attn_items.h"
#include "cuda/attention_plan.h"
#include "cuda/check_cuda.h"
#include "cuda/linear.h"

namespace ni::cuda {

// The two kernels behind attention_prefill() (cuda/attention.cuh, which only nvcc reads). False:
// not for this card.
bool attention_prefill_sm90(const AttnParams& p, int32_t num_items, const Card& card,
                            cudaStream_t stream);
void attention_prefill_mma(const AttnParams& p, int32_t num_items, const Card& card,
                           cudaStream_t stream);

namespace {

constexpr double kMissing = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kMiB = 1 << 20;

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

  std::string markdown() const {
    if (is_text) return text;
    if (std::isnan(number)) return "-";
    const double size = std::abs(number);
    const int digits = number == std::floor(number) || size >= 100 ? 0 : size >= 10 ? 1 : 2;
    return format("%.*f", digits);
  }
  std::string json() const {
    if (is_text) return "\"" + text + "\"";
    return std::isfinite(number) ? format("%.*g", 6) : "null";
  }

 private:
  std::string format(const char* how, int digits) const {
    char out[64];
    std::snprintf(out, sizeof(out), how, digits, number);
    return out;
  }
};

struct Table {
  std::string name, title;
  std::vector<std::string> columns;
  std::vector<std::vector<Cell>> rows;

  void print() const {
    std::printf("\n%s\n\n|", title.c_str());
    for (const std::string& c : columns) std::printf(" %s |", c.c_str());
    std::printf("\n|");
    for (size_t i = 0; i < columns.size(); ++i) std::printf(i == 0 ? "---|" : "--:|");
    std::printf("\n");
    for (const auto& row : rows) {
      std::printf("|");
      for (const Cell& c : row) std::printf(" %s |", c.markdown().c_str());
      std::printf("\n");
    }
    std::fflush(stdout);
  }
  std::string json() const {
    std::string out = "\"" + name + "\": [";
    for (size_t r = 0; r < rows.size(); ++r) {
      out += r == 0 ? "\n    {" : ",\n    {";
      for (size_t c = 0; c < columns.size(); ++c)
        out += (c == 0 ? "\"" : ", \"") + columns[c] + "\": " + rows[r][c].json();
      out += "}";
    }
    return out + "\n  ]";
  }
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

// n random elements: about a million, converted from a normal distribution, over and over.
template <typename T, typename Convert>
Device<T> random_of(int64_t n, const Convert& convert) {
  constexpr int64_t kPool = 1'000'008;  // no power of two: rows of a matrix differ
  static const std::vector<float> normals = [] {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> v(kPool);
    for (float& x : v) x = normal(rng);
    return v;
  }();
  std::vector<T> head(static_cast<size_t>(std::min(n, kPool)));
  for (size_t i = 0; i < head.size(); ++i) head[i] = convert(normals[i]);
  Device<T> out(n);
  check_cuda(cudaMemcpy(out.data(), head.data(), head.size() * sizeof(T), cudaMemcpyHostToDevice),
             "upload");
  for (int64_t have = std::min(n, kPool); have < n; have *= 2)
    check_cuda(cudaMemcpy(out.data() + have, out.data(),
                          static_cast<size_t>(std::min(have, n - have)) * sizeof(T),
                          cudaMemcpyDeviceToDevice),
               "filling memory");
  return out;
}

Device<bf16> random_bf16(int64_t n, float scale = 1) {
  return random_of<bf16>(n, [&](float v) { return to_bf16(scale * v); });
}
Device<float> random_f32(int64_t n, float scale = 1) {
  return random_of<float>(n, [&](float v) { return scale * v; });
}

std::vector<int32_t> permutation(int32_t n) {
  std::vector<int32_t> v(static_cast<size_t>(n));
  std::iota(v.begin(), v.end(), 0);
  std::shuffle(v.begin(), v.end(), std::mt19937(1));
  return v;
}

// -- Time -----------------------------------------------------------------------------------------

class Timer {
 public:
  Timer() {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
    for (cudaEvent_t& e : events_) check_cuda(cudaEventCreate(&e), "an event");
  }
  Timer(const Timer&) = delete;
  ~Timer() {
    for (cudaEvent_t e : events_) cudaEventDestroy(e);
    cudaStreamDestroy(stream_);
  }
  cudaStream_t stream() const { return stream_; }

  // Microseconds of a call fn(i), where i runs through [0, copies) over and over.
  template <typename Fn>
  double us(int64_t copies, const Fn& fn) {
    check_cuda(cudaDeviceSynchronize(), "a benchmark");  // fills do not use our stream
    fn(int64_t{0});                                      // loads the kernel
    record(0);
    fn(copies - 1);
    record(1);
    const double once = std::max(1.0, between(0, 1));
    const int64_t least = std::max<int64_t>(copies, 4);
    return us_of(std::clamp(static_cast<int64_t>(kGraphUs / once), least, std::max(least, kCalls)),
                 copies, fn);
  }

  // The same with a graph of `calls` of them.
  template <typename Fn>
  double us_of(int64_t calls, int64_t copies, const Fn& fn) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    for (int64_t i = 0; i < calls; ++i) fn(i % copies);
    check_cuda(cudaStreamEndCapture(stream_, &graph), "capture");
    check_cuda(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    // All at once, so that the card never waits for the host.
    for (int i = -kWarmups; i < kRounds; ++i) {
      if (i >= 0) record(i);
      check_cuda(cudaGraphLaunch(exec, stream_), "cudaGraphLaunch");
    }
    record(kRounds);
    std::vector<double> times;
    for (int i = 0; i < kRounds; ++i) times.push_back(between(i, i + 1));
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
    return times[kRounds / 2] / static_cast<double>(calls);
  }

 private:
  static constexpr int kRounds = 9, kWarmups = 2;
  static constexpr int64_t kCalls = 200;
  static constexpr double kGraphUs = 1500;

  void record(int i) { check_cuda(cudaEventRecord(events_[i], stream_), "cudaEventRecord"); }
  double between(int i, int j) {
    float ms = 0;
    check_cuda(cudaEventSynchronize(events_[j]), "a benchmark");
    check_cuda(cudaEventElapsedTime(&ms, events_[i], events_[j]), "cudaEventElapsedTime");
    return 1000.0 * static_cast<double>(ms);
  }

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

  Bench() {
    cudaDeviceProp p{};
    check_cuda(cudaGetDeviceProperties(&p, 0), "cudaGetDeviceProperties");
    name = p.name;
    card = {10 * p.major + p.minor, p.multiProcessorCount,
            static_cast<int>(p.sharedMemPerBlockOptin),
            static_cast<int>(p.sharedMemPerMultiprocessor)};
    l2_bytes = p.l2CacheSize;
  }
  // Of what lies in device memory: no copy is in L2 when its turn comes again.
  int64_t cold_copies(int64_t bytes) const {
    return bytes > 8 * l2_bytes ? 1 : 5 * l2_bytes / bytes + 1;
  }
  int64_t activation_copies(int64_t bytes) const {
    return bytes > l2_bytes / 2 ? cold_copies(bytes) : 1;
  }
  double gbs(double bytes, double us) const { return bytes / us * 1e-3; }
  double share(double bytes, double us) const { return 100 * gbs(bytes, us) / copy_gbs; }
  void finish(Table table) {
    table.print();
    tables.push_back(std::move(table));
  }
};

Tensor matrix(const bf16* data, int64_t rows, int64_t cols) {
  return {const_cast<bf16*>(data), DType::bf16, {rows, cols}};
}

// A product that nothing asks for in bf16: prepare() takes the last weight for lm_head.
struct LastWeight {
  Device<bf16> data = random_bf16(64 * 64);
  LinearWeight w{{64, 64, DType::bf16, false}, data.data(), nullptr};
};

// -- Ceilings -------------------------------------------------------------------------------------

double product_tflops(Bench& b) {
  constexpr int64_t kSize = 8192;
  const Device<bf16> x = random_bf16(kSize * kSize), w = random_bf16(kSize * kSize, 0.02f);
  const Device<bf16> out(kSize * kSize);
  const LinearWeight weight{{kSize, kSize, DType::bf16, false}, w.data(), nullptr};
  const LastWeight last;
  Linear linear(b.card, {DType::bf16, false, ""}, b.timer.stream());
  linear.prepare({&weight, &last.w}, kSize);
  const double us = b.timer.us(1, [&](int64_t) {
    linear.run(matrix(x.data(), kSize, kSize), weight, {}, matrix(out.data(), kSize, kSize),
               b.timer.stream());
  });
  return 2.0 * std::pow(static_cast<double>(kSize), 3) / us * 1e-6;
}

void bench_ceilings(Bench& b) {
  const double tflops = product_tflops(b);  // also brings the clocks up
  constexpr int64_t kBytes = 1024 * kMiB;
  const Device<bf16> from = random_bf16(kBytes / 2), to(kBytes / 2);
  const double us = b.timer.us(1, [&](int64_t) {
    check_cuda(
        cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, b.timer.stream()),
        "a copy");
  });
  b.copy_gbs = b.gbs(2.0 * kBytes, us);
  b.finish({"ceilings",
            "Ceilings",
            {"ceiling", "value", "unit"},
            {{"copy of 1 GiB, read and written", b.copy_gbs, "GB/s"},
             {"bf16 product of 8192 x 8192 x 8192, fastest plan", tflops, "TFLOP/s"}}});
}

// -- Operators on rows ----------------------------------------------------------------------------

constexpr int64_t kHidden = 4096, kFfn = 14336, kVocab = 128256;  // Llama 3.1 8B
constexpr int32_t kHeads = 32, kKvHeads = 8, kHeadDim = 128, kBlockSize = 16;
constexpr int64_t kQkvCols = (kHeads + 2 * kKvHeads) * kHeadDim;

double norm_us(Bench& b, int64_t rows, int64_t n, bool add) {
  const int64_t size = rows * n, copies = b.activation_copies(size * (add ? 6 : 4));
  const Device<bf16> x = random_bf16(size * copies), residual = random_bf16(size * copies);
  const Device<bf16> out(size * copies);
  const Device<float> weight = random_f32(n);
  return b.timer.us(copies, [&](int64_t i) {
    norm(x.data() + i * size, n, add ? residual.data() + i * size : nullptr, n, rows, n,
         {weight.data(), nullptr}, {}, DType::bf16, out.data() + i * size, n, b.timer.stream());
  });
}

double activation_us(Bench& b, int64_t rows) {
  const int64_t size = rows * kFfn, copies = b.activation_copies(size * 6);
  const Device<bf16> x = random_bf16(2 * size * copies), out(size * copies);
  return b.timer.us(copies, [&](int64_t i) {
    activation(x.data() + i * 2 * size, 2 * kFfn, rows, kFfn, Activation::silu, true, DType::bf16,
               out.data() + i * size, kFfn, b.timer.stream());
  });
}

double embed_us(Bench& b, int64_t rows) {
  constexpr int64_t kCopies = 64;  // of the ids: other rows of the table every time
  const int64_t size = rows * kHidden, out_copies = b.activation_copies(2 * size);
  const Device<bf16> table = random_bf16(kVocab * kHidden), out(size * out_copies);
  std::mt19937 rng(1);
  std::vector<int32_t> ids(static_cast<size_t>(rows * kCopies));
  for (int32_t& id : ids) id = static_cast<int32_t>(rng() % kVocab);
  const Device<int32_t> tokens(ids);
  return b.timer.us(kCopies, [&](int64_t i) {
    embed(tokens.data() + i * rows, nullptr, nullptr, rows, table.data(), nullptr, kHidden, kHidden,
          1, DType::bf16, out.data() + i % out_copies * size, kHidden, b.timer.stream());
  });
}

// Up to 256 rows are tokens of different sequences (blocks), more are those of a prompt.
double rope_us(Bench& b, int64_t rows) {
  constexpr int32_t kBlocks = 4096, kMaxPositions = 8192;
  const KvView shape{nullptr, nullptr, DType::bf16, kBlocks, kBlockSize, kKvHeads, kHeadDim};
  const Device<bf16> k(kBlocks * shape.block_elements()), v(kBlocks * shape.block_elements());
  KvView kv = shape;
  kv.k = k.data();
  kv.v = v.data();
  kv.k_tile = 1;
  const int64_t step = rows > 256 ? 1 : kBlockSize;
  const int64_t copies = std::min<int64_t>(64, kBlocks * kBlockSize / (rows * step));
  const std::vector<int32_t> blocks = permutation(kBlocks);
  std::vector<int64_t> slots;
  std::vector<int32_t> positions;
  for (int64_t t = 0; t < rows * copies; ++t) {
    const int64_t at = t * step;
    slots.push_back(blocks[static_cast<size_t>(at / kBlockSize)] * int64_t{kBlockSize} +
                    at % kBlockSize);
    positions.push_back(static_cast<int32_t>(at % kMaxPositions));
  }
  const Device<int64_t> slot_mapping(slots);
  const Device<int32_t> position(positions);
  std::vector<float> cosines, sines;
  for (int64_t i = 0; i < kMaxPositions * kHeadDim / 2; ++i) {
    const double angle =
        static_cast<double>(i / (kHeadDim / 2)) / (1.0 + static_cast<double>(i % (kHeadDim / 2)));
    cosines.push_back(static_cast<float>(std::cos(angle)));
    sines.push_back(static_cast<float>(std::sin(angle)));
  }
  const Device<float> cos(cosines), sin(sines);
  RopeArgs rope;
  rope.cos = cos.data();
  rope.sin = sin.data();
  rope.rotary_dim = kHeadDim;
  const int64_t size = rows * kQkvCols, qkv_copies = b.activation_copies(2 * size);
  const Device<bf16> qkv = random_bf16(size * qkv_copies);
  return b.timer.us(copies, [&](int64_t i) {
    rope_kv_write(qkv.data() + i % qkv_copies * size, kQkvCols, rows, kHeads,
                  position.data() + i * rows, slot_mapping.data() + i * rows, rope, kv, DType::bf16,
                  true, b.timer.stream());
  });
}

void bench_rows(Bench& b) {
  Table table{"rows",
              "Operators on rows (hidden 4096, Llama 3.1 8B)",
              {"operator", "rows", "us", "GB/s", "% of copy"},
              {}};
  const auto add = [&](const char* name, int64_t rows, int64_t bytes_of_row, double us) {
    const auto bytes = static_cast<double>(rows * bytes_of_row);
    table.rows.push_back({name, rows, us, b.gbs(bytes, us), b.share(bytes, us)});
  };
  constexpr int64_t kSizes[] = {1, 64, 256, 4096};
  for (const int64_t t : kSizes) add("norm", t, 4 * kHidden, norm_us(b, t, kHidden, false));
  for (const int64_t t : kSizes) add("add and norm", t, 8 * kHidden, norm_us(b, t, kHidden, true));
  for (const int64_t t : kSizes) add("rope and KV write", t, 4 * kQkvCols, rope_us(b, t));
  for (const int64_t t : kSizes) add("silu and multiply", t, 6 * kFfn, activation_us(b, t));
  for (const int64_t t : kSizes) add("embed", t, 4 * kHidden, embed_us(b, t));
  b.finish(std::move(table));
}

// -- Matrix products ------------------------------------------------------------------------------

struct Shape {
  const char* model;
  int64_t n, k;
};
constexpr Shape kShapes[] = {{"Llama 3.1 8B", 6144, 4096},  {"Llama 3.1 8B", 4096, 4096},
                             {"Llama 3.1 8B", 28672, 4096}, {"Llama 3.1 8B", 4096, 14336},
                             {"Qwen3 0.6B", 4096, 1024},    {"Qwen3 0.6B", 1024, 2048},
                             {"Qwen3 0.6B", 6144, 1024},    {"Qwen3 0.6B", 1024, 3072}};

// Copies of one shape, one after the other in `memory`.
std::vector<LinearWeight> weights_in(const Bench& b, const Device<bf16>& memory, const Shape& s) {
  std::vector<LinearWeight> weights;
  for (int64_t i = 0; i < b.cold_copies(2 * s.n * s.k); ++i)
    weights.push_back({{s.n, s.k, DType::bf16, false}, memory.data() + i * s.n * s.k, nullptr});
  return weights;
}

SkinnyArgs skinny_args(const Device<bf16>& x, const LinearWeight& w, int64_t rows,
                       const Device<bf16>& out) {
  SkinnyArgs a;
  a.x = x.data();
  a.rows = rows;
  a.w = w.data;
  a.x_stride = a.w_stride = a.in_features = w.spec.in_features;
  a.out = out.data();
  a.out_stride = a.out_features = w.spec.out_features;
  return a;
}

void bench_linear(Bench& b) {
  constexpr int64_t kMaxRows = 1024, kWidest = 28672, kDeepest = 14336;
  int64_t elements = 0;
  for (const Shape& s : kShapes)
    elements = std::max(elements, b.cold_copies(2 * s.n * s.k) * s.n * s.k);
  const Device<bf16> memory = random_bf16(elements, 0.02f);
  const Device<bf16> x = random_bf16(kMaxRows * kDeepest), out(kMaxRows * kWidest);
  std::vector<std::vector<LinearWeight>> shapes;
  for (const Shape& s : kShapes) shapes.push_back(weights_in(b, memory, s));
  const LastWeight last;
  std::vector<const LinearWeight*> all;
  for (const auto& weights : shapes)
    for (const LinearWeight& w : weights) all.push_back(&w);
  all.push_back(&last.w);
  const cudaStream_t stream = b.timer.stream();
  Linear invariant(b.card, {DType::bf16, true, ""}, stream);
  Linear fastest(b.card, {DType::bf16, false, ""}, stream);
  invariant.prepare(all, kMaxRows);
  fastest.prepare(all, kMaxRows);

  Table table{
      "linear",
      "Matrix products (bf16; GB/s and TFLOP/s are those of the invariant plan; invariance: "
      "what it costs)",
      {"weight", "model", "M", "skinny us", "invariant us", "fastest us", "GB/s", "% of copy",
       "TFLOP/s", "invariance %"},
      {}};
  for (size_t s = 0; s < shapes.size(); ++s) {
    const auto [model, n, k] = kShapes[s];
    const std::vector<LinearWeight>& weights = shapes[s];
    const auto copies = static_cast<int64_t>(weights.size());
    for (const int64_t m : {1, 8, 16, 64, 256, 1024}) {
      const auto time_of = [&](Linear& linear) {
        return b.timer.us(copies, [&](int64_t i) {
          linear.run(matrix(x.data(), m, k), weights[static_cast<size_t>(i)], {},
                     matrix(out.data(), m, n), stream);
        });
      };
      double skinny = kMissing;
      if (m <= 64)
        skinny = b.timer.us(copies, [&](int64_t i) {
          linear_skinny(skinny_args(x, weights[static_cast<size_t>(i)], m, out), b.card, stream);
        });
      const double ours = time_of(invariant), best = time_of(fastest);
      const auto bytes = static_cast<double>(2 * (n * k + m * (n + k)));
      table.rows.push_back({concat(n, " x ", k), model, m, skinny, ours, best, b.gbs(bytes, ours),
                            b.share(bytes, ours), 2e-6 * static_cast<double>(m * n * k) / ours,
                            100 * (ours / best - 1)});
    }
  }
  b.finish(std::move(table));
}

// Our kernel for few rows alone.
void bench_skinny(Bench& b) {
  Table table{"skinny", "linear_skinny (us)", {"weight", "M = 1", "8", "16", "GB/s at M = 1"}, {}};
  for (const Shape& s : kShapes) {
    const Device<bf16> memory = random_bf16(b.cold_copies(2 * s.n * s.k) * s.n * s.k, 0.02f);
    const std::vector<LinearWeight> weights = weights_in(b, memory, s);
    const Device<bf16> x = random_bf16(16 * s.k), out(16 * s.n);
    double us[3];
    for (int i = 0; i < 3; ++i)
      us[i] = b.timer.us(static_cast<int64_t>(weights.size()), [&](int64_t w) {
        linear_skinny(skinny_args(x, weights[static_cast<size_t>(w)], i == 0 ? 1 : 8 * i, out),
                      b.card, b.timer.stream());
      });
    table.rows.push_back({concat(s.n, " x ", s.k), us[0], us[1], us[2],
                          b.gbs(static_cast<double>(2 * s.n * s.k), us[0])});
  }
  b.finish(std::move(table));
}

// -- Attention ------------------------------------------------------------------------------------

// FlashAttention-3 on an H200, same heads, bf16, paged cache with blocks of 16.
constexpr const char* kPeer = "FlashAttention-3 on an H200";

// Sequences of equal length in a paged cache of several layers, laid out as the engine does:
// [block][layer][K, V][kv head][slot][d]; blocks are shuffled.
class Sequences {
 public:
  Sequences(int32_t seqs, int32_t query, int32_t context, DType dtype, int64_t layers)
      : tables_(permutation(seqs * blocks_of(context))) {
    std::vector<int32_t> starts;
    for (int32_t s = 0; s <= seqs; ++s) starts.push_back(s * query);
    const std::vector<int32_t> contexts(static_cast<size_t>(seqs), context);
    std::vector<AttnItem> decode, prefill;
    build_attn_items(starts.data(), contexts.data(), seqs,
                     {kKvChunk, kPrefillRows, kDecodeRows, kMaxItems}, decode, prefill);
    starts_ = Device<int32_t>(starts);
    contexts_ = Device<int32_t>(contexts);
    num_items_ = static_cast<int32_t>(decode.size() + prefill.size());
    items_ = Device<AttnItem>(decode.empty() ? prefill : decode);
    StepInputs in;
    in.num_tokens = seqs * query;
    in.num_seqs = seqs;
    in.max_query_len = query;
    in.max_context_len = context;
    in.block_table_stride = blocks_of(context);
    in.num_decode_items = static_cast<int32_t>(decode.size());
    in.num_prefill_items = static_cast<int32_t>(prefill.size());
    in.cu_seqlens_q = starts_.data();
    in.context_lens = contexts_.data();
    in.block_tables = tables_.data();
    in.decode_items = in.prefill_items = items_.data();
    step_ = Device<StepInputs>(std::vector<StepInputs>{in});

    KvView& kv = params_.kv;
    kv = {nullptr, nullptr, dtype, seqs * blocks_of(context), kBlockSize, kKvHeads, kHeadDim};
    kv.k_tile = 1;
    kv.block_stride = 2 * layers * kv.block_elements();
    const int64_t elements = kv.num_blocks * kv.block_stride;
    if (dtype == DType::bf16) {
      cache16_ = random_bf16(elements);
      kv.k = cache16_.data();
    } else {
      cache8_ = random_of<fp8>(elements, [](float v) { return to_fp8(v); });
      kv.k = cache8_.data();
    }
    q_ = random_bf16(in.num_tokens * kQkvCols);
    out_ = Device<bf16>(in.num_tokens * kHeads * kHeadDim);
    params_.q = q_.data();
    params_.q_stride = kQkvCols;
    params_.out = out_.data();
    params_.out_stride = kHeads * kHeadDim;
    params_.args = {kHeads, 1 / std::sqrt(static_cast<float>(kHeadDim)), 0, 0};
    params_.step = step_.data();
  }

  static constexpr int32_t kMaxItems = 2048;  // as CudaBackend asks for
  static int32_t blocks_of(int32_t context) { return (context + kBlockSize - 1) / kBlockSize; }

  AttnParams layer(int64_t i) const {
    AttnParams p = params_;
    const int64_t part = p.kv.block_elements() * static_cast<int64_t>(dtype_size(p.kv.dtype));
    p.kv.k = static_cast<char*>(params_.kv.k) + 2 * i * part;
    p.kv.v = static_cast<char*>(p.kv.k) + part;
    return p;
  }
  int32_t num_items() const { return num_items_; }

 private:
  AttnParams params_;
  int32_t num_items_ = 0;
  Device<int32_t> tables_;
  Device<int32_t> starts_{1}, contexts_{1};
  Device<AttnItem> items_{1};
  Device<StepInputs> step_{1};
  Device<bf16> cache16_{1}, q_{1}, out_{1};
  Device<fp8> cache8_{1};
};

void bench_decode(Bench& b) {
  struct Case {
    int32_t seqs, context;
    double peer_us;
  };
  constexpr Case kCases[] = {{1, 1024, 12.9},  {1, 4096, 15.7},  {1, 16384, 32.2}, {8, 1024, 19.0},
                             {8, 4096, 42.8},  {8, 16384, 133},  {64, 1024, 77},   {64, 4096, 256},
                             {256, 1024, 284}, {256, 4096, 1004}};
  const size_t bytes =
      decode_workspace_bytes(Sequences::kMaxItems, Sequences::kMaxItems, kHeads, kHeadDim);
  const Device<char> workspace(static_cast<int64_t>(bytes));
  check_cuda(cudaMemset(workspace.data(), 0, bytes), "cudaMemset");
  Table table{"decode",
              concat("Paged decode attention (32/8 heads of 128, blocks of 16), beside ", kPeer),
              {"cache", "batch", "context", "us", "GB/s", "% of copy", "FA3 us", "FA3 / us"},
              {}};
  for (const DType dtype : {DType::bf16, DType::fp8_e4m3}) {
    for (const auto& [seqs, context, peer] : kCases) {
      const int64_t read = int64_t{2} * seqs * context * kKvHeads * kHeadDim *
                           static_cast<int64_t>(dtype_size(dtype));
      const int64_t layers = b.cold_copies(read);
      const Sequences sequences(seqs, 1, context, dtype, layers);
      const double us = b.timer.us(layers, [&](int64_t i) {
        attention_decode(sequences.layer(i), 1, Sequences::kMaxItems, workspace.data(), b.card,
                         b.timer.stream());
      });
      const auto moved = static_cast<double>(read + int64_t{4} * seqs * kHeads * kHeadDim);
      const double peer_us = dtype == DType::bf16 ? peer : kMissing;
      table.rows.push_back({dtype_name(dtype), seqs, context, us, b.gbs(moved, us),
                            b.share(moved, us), peer_us, peer_us / us});
    }
  }
  b.finish(std::move(table));
}

void bench_prefill(Bench& b) {
  struct Case {
    int32_t seqs, query;
    double peer_tflops;
  };
  Table table{"prefill",
              concat("Paged prefill attention, causal, bf16, beside ", kPeer, " (TFLOP/s)"),
              {"batch", "tokens", "wgmma us", "mma us", "wgmma", "mma", "FA3", "wgmma / FA3"},
              {}};
  for (const auto& [seqs, query, peer] :
       {Case{1, 4096, 522}, Case{1, 8192, 562}, Case{16, 2048, 461}}) {
    const Sequences sequences(seqs, query, query, DType::bf16, 1);
    const AttnParams p = sequences.layer(0);
    const cudaStream_t stream = b.timer.stream();
    double wgmma = kMissing;
    if (attention_prefill_sm90(p, sequences.num_items(), b.card, stream))
      wgmma = b.timer.us(
          1, [&](int64_t) { attention_prefill_sm90(p, sequences.num_items(), b.card, stream); });
    const double mma = b.timer.us(
        1, [&](int64_t) { attention_prefill_mma(p, sequences.num_items(), b.card, stream); });
    const double rows = query, pairs = seqs * rows * (rows + 1) / 2;
    const double tflop = 4e-6 * pairs * kHeads * kHeadDim;  // a microsecond
    table.rows.push_back(
        {seqs, query, wgmma, mma, tflop / wgmma, tflop / mma, peer, tflop / wgmma / peer});
  }
  b.finish(std::move(table));
}

// -- Sampler --------------------------------------------------------------------------------------

double sample_us(Bench& b, int64_t rows, int64_t vocab, SamplingRow row) {
  const int64_t size = rows * vocab, copies = b.activation_copies(4 * size);
  const Device<float> logits = random_f32(size * copies, 3);
  std::vector<SamplingRow> all;
  for (int64_t r = 0; r < rows; ++r) {
    row.seed = static_cast<uint64_t>(r);
    row.position = static_cast<int32_t>(100 + r);
    all.push_back(row);
  }
  const Device<SamplingRow> sampling(all);
  StepInputs in;
  in.num_logits = static_cast<int32_t>(rows);
  in.sampling = sampling.data();
  const Device<StepInputs> step(std::vector<StepInputs>{in});
  const Device<int32_t> ids(rows), ranks(rows);
  const Device<float> logprobs(rows);
  const Device<char> workspace(static_cast<int64_t>(sample_workspace_bytes(rows, vocab)));
  const SampleOutputs out{ids.data(), logprobs.data(), ranks.data(), nullptr, nullptr, 0};
  return b.timer.us(copies, [&](int64_t i) {
    sample(logits.data() + i * size, vocab, rows, vocab, step.data(), 0, out, workspace.data(),
           b.card, b.timer.stream());
  });
}

void bench_sampler(Bench& b) {
  constexpr int64_t kQwenVocab = 151936;
  SamplingRow greedy, warm, both;
  greedy.temperature = 0;
  warm.temperature = 0.6f;
  both.top_k = 50;
  both.top_p = 0.9f;
  Table table{"sampler",
              "Sampler (vocabulary 151936), beside reading the logits once at the rate of the copy",
              {"rows", "sampling", "us", "read us", "us / read"},
              {}};
  for (const int64_t rows : {1, 64, 256}) {
    const double read = static_cast<double>(4 * rows * kQwenVocab) / b.copy_gbs * 1e-3;
    for (const auto& [name, row] :
         {std::pair{"greedy", greedy}, {"temperature 0.6", warm}, {"top-k 50, top-p 0.9", both}}) {
      const double us = sample_us(b, rows, kQwenVocab, row);
      table.rows.push_back({rows, name, us, read, us / read});
    }
  }
  b.finish(std::move(table));
}

// -- Launches -------------------------------------------------------------------------------------

void bench_launch(Bench& b) {
  constexpr int64_t kNodes = 100, kColumns = 64;
  const Device<bf16> x = random_bf16(kColumns), out(kColumns);
  const Device<float> weight = random_f32(kColumns);
  const auto tiny = [&](int64_t) {
    norm(x.data(), kColumns, nullptr, 0, 1, kColumns, {weight.data(), nullptr}, {}, DType::bf16,
         out.data(), kColumns, b.timer.stream());
  };
  tiny(0);  // loads the kernel
  b.finish({"launch",
            "The price of a launch",
            {"what", "us"},
            {{"node of a graph of 100 (norm of one row of 64)", b.timer.us_of(kNodes, 1, tiny)}}});
}

// -- The program ----------------------------------------------------------------------------------

struct Group {
  const char* name;
  void (*run)(Bench&);
};
constexpr Group kGroups[] = {{"rows", bench_rows},       {"linear", bench_linear},
                             {"skinny", bench_skinny},   {"decode", bench_decode},
                             {"prefill", bench_prefill}, {"sampler", bench_sampler},
                             {"launch", bench_launch}};

void write_json(const Bench& b, const std::string& path) {
  std::ofstream file(path);
  file << "{\n  \"card\": \"" << b.name << "\",\n  \"arch\": " << b.card.arch
       << ",\n  \"multiprocessors\": " << b.card.num_sms << ",\n  \"l2_bytes\": " << b.l2_bytes;
  for (const Table& t : b.tables) file << ",\n  " << t.json();
  file << "\n}\n";
  check_runtime(static_cast<bool>(file.flush()), "cannot write ", path);
}

void run(const std::vector<std::string>& args) {
  std::string json;
  std::vector<std::string> wanted;
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i] == "--json") {
      check_arg(i + 1 < args.size(), "--json needs a file");
      json = args[++i];
      continue;
    }
    check_arg(std::any_of(std::begin(kGroups), std::end(kGroups),
                          [&](const Group& g) { return args[i] == g.name; }),
              "no group ", args[i], "; rows, linear, decode, prefill, sampler and launch are");
    wanted.push_back(args[i]);
  }
  Bench bench;
  std::printf("%s, %d multiprocessors, %lld MiB of L2\n", bench.name.c_str(), bench.card.num_sms,
              static_cast<long long>(bench.l2_bytes / kMiB));
  bench_ceilings(bench);
  for (const Group& g : kGroups)
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), g.name) != wanted.end())
      g.run(bench);
  if (!json.empty()) write_json(bench, json);
}

}  // namespace
}  // namespace ni::cuda

int main(int argc, char** argv) {
  try {
    ni::cuda::run({argv + 1, argv + argc});
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_cuda: %s\n", e.what());
    return 1;
  }
}
