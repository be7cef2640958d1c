// What the CPU operators reach, beside what the machine gives in the same run: read bandwidth and
// multiply-add rate. Bytes are those of the weights (linear), of K and V (attention) or of the
// rows; a multiply-add counts as two operations. The least time of repeated calls: on a machine
// that others use, too, that is the one that says what the code can do.
//   bench_ops [isa …]      default: every instruction set but reference
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/cpu_backend.h"

namespace ni {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of one call: the least over at least 0.3 s.
template <typename Fn>
double time_of(const Fn& fn) {
  fn();
  double best = 1e9;
  const double start = now();
  for (int calls = 0; calls < 5 || now() - start < 0.3; ++calls) {
    const double t = now();
    fn();
    best = std::min(best, now() - t);
  }
  return best;
}

void report(const std::string& what, double seconds, double bytes, double flops) {
  std::printf("  %-44s %9.1f us %8.1f GB/s %8.1f GFLOP/s\n", what.c_str(), seconds * 1e6,
              bytes / seconds / 1e9, flops / seconds / 1e9);
}

std::vector<float> random_floats(int64_t n) {
  std::mt19937 rng(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = uniform(rng);
  return v;
}

Tensor matrix(std::vector<float>& v, int64_t rows, int64_t cols) {
  return {v.data(), DType::f32, {rows, cols}};
}

// Reads with all threads, a different 64 MiB of 512 each time.
void bench_read(CpuBackend& backend, ThreadPool& pool) {
  const int64_t words = 64 << 20, part = words / 8;
  const Buffer buffer = backend.alloc(static_cast<size_t>(words) * 8);
  auto* data = reinterpret_cast<uint64_t*>(buffer.data());
  for (int64_t i = 0; i < words; i += 512) data[i] = 1;  // own pages, not the shared zero page
  std::atomic<uint64_t> sink{0};
  int64_t turn = 0;
  const double t = time_of([&] {
    const uint64_t* from = data + turn++ % 8 * part;
    pool.parallel_for(part, 1, [&](int64_t begin, int64_t end, int) {
      uint64_t sum[32] = {};
      for (int64_t i = begin; i + 32 <= end; i += 32)
        for (int64_t j = 0; j < 32; ++j) sum[j] += from[i + j];
      for (const uint64_t s : sum) sink += s;
    });
  });
  report("machine: read 64 MiB", t, static_cast<double>(part) * 8, 0);
}

// The matrix kernel on one tile that stays in the L1 cache.
void bench_peak(const KernelTable& kernels, ThreadPool& pool, DType dtype) {
  const int64_t k = 128, rows = kernels.block_rows;
  const double repeats = 200;
  std::vector<std::vector<float>> x(static_cast<size_t>(pool.size())), w(x), out(x);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i].resize(static_cast<size_t>(rows * k));
    w[i].resize(static_cast<size_t>(kPanel * k));
    out[i].resize(static_cast<size_t>(rows * kPanel));
  }
  const double t = time_of([&] {
    pool.parallel_for(pool.size(), 1, [&](int64_t, int64_t, int worker) {
      const auto i = static_cast<size_t>(worker);
      const LinearTile tile{x[i].data(), w[i].data(), dtype, static_cast<int>(rows), kPanel,
                            k,           nullptr,     false, out[i].data(),          kPanel};
      for (int r = 0; r < static_cast<int>(repeats); ++r) kernels.linear(tile);
    });
  });
  const auto flops = 2.0 * static_cast<double>(rows * kPanel * k * pool.size()) * repeats;
  report(std::string("machine: multiply-add in L1, ") + dtype_name(dtype), t, 0, flops);
}

void bench_linear(CpuBackend& backend, DType dtype, int64_t n, int64_t k) {
  // Enough copies of the weight that none is found in the cache again.
  const WeightSpec spec{n, k, dtype, false};
  const auto bytes = static_cast<int64_t>(backend.weight_bytes(spec));
  const int64_t copies = std::max<int64_t>(2, (int64_t{256} << 20) / bytes);
  const Buffer memory = backend.alloc(static_cast<size_t>(bytes * copies));
  std::vector<float> source = random_floats(n * k);
  std::vector<LinearWeight> weights;
  for (int64_t i = 0; i < copies; ++i) {
    weights.push_back({spec, memory.data() + i * bytes, nullptr});
    backend.load_rows(weights.back(), 0, matrix(source, n, k));
  }
  for (const int64_t m : {1, 2, 8, 32, 512}) {
    std::vector<float> x = random_floats(m * k), out(static_cast<size_t>(m * n));
    size_t i = 0;
    const double t = time_of([&] {
      backend.linear(matrix(x, m, k), weights[i++ % weights.size()], {}, matrix(out, m, n));
    });
    report(std::string("linear ") + dtype_name(dtype) + " " + std::to_string(n) + " x " +
               std::to_string(k) + ", M " + std::to_string(m),
           t, static_cast<double>(bytes), 2.0 * static_cast<double>(m * n * k));
  }
}

// `seqs` sequences with `context` tokens in the cache, of which the last `queries` are computed.
void bench_attention(CpuBackend& backend, DType dtype, int32_t seqs, int32_t context,
                     int32_t queries) {
  const int32_t heads = 16, kv_heads = 8, d = 128, bs = 16, stride = (context + bs - 1) / bs;
  KvView kv{nullptr, nullptr, dtype, seqs * stride, bs, kv_heads, d};
  const Buffer memory = backend.alloc(static_cast<size_t>(kv.block_bytes() * kv.num_blocks));
  kv.k = memory.data();
  kv.v = memory.data() + memory.bytes() / 2;
  std::memset(memory.data(), 0x3c, memory.bytes());
  std::vector<int32_t> table, starts, contexts(static_cast<size_t>(seqs), context);
  for (int32_t b = 0; b < kv.num_blocks; ++b) table.push_back(b);
  std::shuffle(table.begin(), table.end(), std::mt19937(1));
  for (int32_t s = 0; s <= seqs; ++s) starts.push_back(s * queries);
  StepInputs in;
  in.num_tokens = seqs * queries;
  in.num_seqs = seqs;
  in.cu_seqlens_q = starts.data();
  in.context_lens = contexts.data();
  in.block_tables = table.data();
  in.block_table_stride = stride;
  const int64_t cols = (heads + 2 * kv_heads) * d;
  std::vector<float> qkv = random_floats(in.num_tokens * cols),
                     out(static_cast<size_t>(in.num_tokens * heads * d));
  const double t = time_of([&] {
    backend.attention(matrix(qkv, in.num_tokens, cols), in, {heads, 0.088f, 0}, kv,
                      matrix(out, in.num_tokens, heads * d));
  });
  const double pairs = static_cast<double>(seqs) * queries * (context - (queries - 1) / 2.0);
  report(std::string("attention ") + dtype_name(dtype) + ", " + std::to_string(seqs) + " x " +
             std::to_string(queries) + " of " + std::to_string(context),
         t, 2.0 * seqs * context * kv_heads * d * static_cast<double>(dtype_size(dtype)),
         4.0 * pairs * heads * d);
}

void bench_rows(CpuBackend& backend) {
  for (const int64_t rows : {1, 512}) {
    const int64_t n = 1024;
    std::vector<float> x = random_floats(rows * n), r(x), out(x), w = random_floats(n);
    const double t = time_of([&] {
      backend.add_norm(matrix(x, rows, n), matrix(r, rows, n), {w.data(), nullptr}, {},
                       matrix(out, rows, n));
    });
    report("add_norm 1024, M " + std::to_string(rows), t, static_cast<double>(16 * rows * n), 0);
    std::vector<float> up = random_floats(rows * 6144), gate(static_cast<size_t>(rows * 3072));
    const double a = time_of([&] {
      backend.activation(matrix(up, rows, 6144), Activation::silu, true, matrix(gate, rows, 3072));
    });
    report("silu and multiply 3072, M " + std::to_string(rows), a,
           static_cast<double>(12 * rows * 3072), 0);
  }
}

void bench_sample(CpuBackend& backend) {
  const int64_t vocab = 151936;
  std::vector<float> logits = random_floats(vocab);
  for (float& v : logits) v *= 10;
  SamplingRow greedy, plain, nucleus, both;
  greedy.temperature = 0;
  nucleus.top_p = 0.9f;
  both.top_k = 50;
  both.top_p = 0.9f;
  both.num_logprobs = 5;
  for (const auto& [name, row] : {std::pair{"greedy", greedy},
                                  {"temperature", plain},
                                  {"top-p 0.9", nucleus},
                                  {"top-k 50, top-p 0.9, 5 logprobs", both}}) {
    int32_t id, rank, top[5];
    float logprob, tops[5];
    StepInputs in;
    in.num_logits = 1;
    in.sampling = &row;
    const double t = time_of([&] {
      backend.sample(matrix(logits, 1, vocab), in, 0, {&id, &logprob, &rank, top, tops, 5});
    });
    report(std::string("sample 151936, ") + name, t, static_cast<double>(4 * vocab), 0);
  }
}

void bench(const std::string& isa) {
  BackendOptions options;
  options.isa = isa;
  CpuBackend backend(options);
  std::printf("%s\n", backend.info().name.c_str());
  ThreadPool pool(0);
  const KernelTable& kernels = select_kernels(isa);
  bench_read(backend, pool);
  bench_peak(kernels, pool, DType::f32);
  bench_peak(kernels, pool, DType::bf16);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
    bench_linear(backend, dtype, 3072, 1024);
  bench_linear(backend, DType::bf16, 1024, 3072);
  for (const DType dtype : {DType::bf16, DType::f32}) {
    bench_attention(backend, dtype, 1, 1024, 1);
    bench_attention(backend, dtype, 8, 4096, 1);
    bench_attention(backend, dtype, 1, 512, 512);
    bench_attention(backend, dtype, 1, 4096, 512);
  }
  bench_rows(backend);
  bench_sample(backend);
  bench_read(backend, pool);
}

}  // namespace
}  // namespace ni

int main(int argc, char** argv) {
  std::vector<std::string> isas(argv + 1, argv + argc);
  if (isas.empty())
    for (const ni::KernelTable* table : ni::usable_kernels())
      if (std::string(table->isa) != "reference") isas.emplace_back(table->isa);
  try {
    for (const std::string& isa : isas) ni::bench(isa);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_ops: %s\n", e.what());
    return 1;
  }
}
