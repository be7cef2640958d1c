#include "cuda/linear.h"

#include <cmath>

#include "bench.h"

namespace ni::cuda::bench {
namespace {

Tensor matrix(const bf16* data, int64_t rows, int64_t cols) {
  return {const_cast<bf16*>(data), DType::bf16, {rows, cols}};
}

// A product that nothing asks for in bf16: prepare() takes the last weight for lm_head.
struct LastWeight {
  Device<bf16> data = random_bf16(64 * 64);
  LinearWeight w{{64, 64, DType::bf16, false}, data.data(), nullptr};
};

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
  a.settled = true;
  return a;
}
}  // namespace

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
  constexpr int64_t kRows[] = {1, 8, 16, 32, 64}, kMaxRows = 64;
  Table table{"skinny",
              "linear_skinny (us)",
              {"weight", "M = 1", "8", "16", "32", "64", "GB/s at M = 1"},
              {}};
  for (const Shape& s : kShapes) {
    const Device<bf16> memory = random_bf16(b.cold_copies(2 * s.n * s.k) * s.n * s.k, 0.02f);
    const std::vector<LinearWeight> weights = weights_in(b, memory, s);
    const Device<bf16> x = random_bf16(kMaxRows * s.k), out(kMaxRows * s.n);
    std::vector<Cell> row = {concat(s.n, " x ", s.k)};
    for (const int64_t m : kRows)
      row.push_back(b.timer.us(static_cast<int64_t>(weights.size()), [&](int64_t w) {
        linear_skinny(skinny_args(x, weights[static_cast<size_t>(w)], m, out), b.card,
                      b.timer.stream());
      }));
    row.push_back(b.gbs(static_cast<double>(2 * s.n * s.k), row[1].number));
    table.rows.push_back(std::move(row));
  }
  b.finish(std::move(table));
}

}  // namespace ni::cuda::bench
