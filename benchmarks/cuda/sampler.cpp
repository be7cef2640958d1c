#include "bench.h"
#include "cuda/linear.h"

namespace ni::cuda::bench {
namespace {

std::vector<SamplingRow> sampling_rows(int64_t rows, SamplingRow row) {
  std::vector<SamplingRow> all;
  for (int64_t r = 0; r < rows; ++r) {
    row.seed = static_cast<uint64_t>(r);
    row.position = static_cast<int32_t>(100 + r);
    all.push_back(row);
  }
  return all;
}

// So many rows that are sampled alike.
struct Sampling {
  int64_t rows, vocab;
  bool plain;
  Device<SamplingRow> sampling;
  Device<StepInputs> step;
  Device<int32_t> ids, ranks;
  Device<float> logprobs;
  Device<char> workspace;

  Sampling(int64_t num_rows, int64_t num_tokens, const SamplingRow& row)
      : rows(num_rows),
        vocab(num_tokens),
        plain(row.top_k == 0 && row.top_p == 1 && row.min_p == 0),
        sampling(sampling_rows(rows, row)),
        step(1),
        ids(rows),
        ranks(rows),
        logprobs(rows),
        workspace(static_cast<int64_t>(sample_workspace_bytes(rows, vocab))) {
    StepInputs in;
    in.num_logits = static_cast<int32_t>(rows);
    in.sampling = sampling.data();
    check_cuda(cudaMemcpy(step.data(), &in, sizeof(in), cudaMemcpyHostToDevice), "upload");
  }
  void run(float* logits, bool has_units, const Bench& b) const {
    const SampleOutputs out{ids.data(), logprobs.data(), ranks.data(), nullptr, nullptr, 0};
    sample(logits, vocab, rows, vocab, step.data(), 0, has_units, plain, out, workspace.data(),
           b.timer.stream());
  }
  LogitUnits units() const { return {sample_units(workspace.data()), step.data(), 0, plain}; }
};

double sample_us(Bench& b, int64_t rows, int64_t vocab, const SamplingRow& row) {
  const int64_t size = rows * vocab, copies = b.activation_copies(4 * size);
  const Device<float> logits = random_f32(size * copies, 3);
  const Sampling sampling(rows, vocab, row);
  return b.timer.us(copies, [&](int64_t i) { sampling.run(logits.data() + i * size, false, b); });
}

// The end of a step: last norm (part of the product where that is possible, or apart), logits and
// sampler, beside reading lm_head once.
void bench_heads(Bench& b, const SamplingRow& greedy, const SamplingRow& warm) {
  struct Head {
    const char* model;
    int64_t vocab, hidden;
  };
  constexpr int64_t kMaxRows = 256, kCopies = 3;
  Table table{"head",
              "Last norm, logits and sampler of a step, beside reading lm_head once at the rate of "
              "the copy",
              {"model", "rows", "sampling", "us", "norm apart us", "lm_head with units us",
               "lm_head us", "read us", "% over reading"},
              {}};
  const cudaStream_t stream = b.timer.stream();
  for (const auto& [model, vocab, hidden] : {Head{"Qwen3 0.6B", 151936, 1024},
                                             {"Llama 3.2 1B", 128256, 2048},
                                             {"Llama 3.1 8B", 128256, 4096}}) {
    const int64_t size = vocab * hidden;
    const Device<bf16> memory = random_bf16(kCopies * size, 0.02f);
    std::vector<LinearWeight> weights;
    for (int64_t i = 0; i < kCopies; ++i)
      weights.push_back({{vocab, hidden, DType::bf16, false}, memory.data() + i * size, nullptr});
    Linear linear(b.card, {DType::bf16, true, ""}, stream);
    linear.prepare({&weights[0]}, kMaxRows);
    const Device<bf16> x = random_bf16(kMaxRows * hidden), normed(kMaxRows * hidden);
    const Device<float> ones(std::vector<float>(static_cast<size_t>(hidden), 1.0f));
    const Device<float> logits(kMaxRows * vocab);
    const NormWeight norm_weight{ones.data(), nullptr};
    LinearArgs with_norm;
    with_norm.norm = &norm_weight;
    const double read = 2 * static_cast<double>(size) / b.copy_gbs * 1e-3;
    for (const int64_t rows : {1, 2, 4, 8, 16, 64, 256}) {
      const auto matrix = [&](bf16* data) { return Tensor(data, DType::bf16, {rows, hidden}); };
      const Tensor out(logits.data(), DType::f32, {rows, vocab});
      for (const auto& [name, row] : {std::pair{"greedy", greedy}, {"temperature 0.6", warm}}) {
        const Sampling sampling(rows, vocab, row);
        const auto product = [&](int64_t i, bf16* from, const LinearArgs& a) {
          return linear.run(matrix(from), weights[static_cast<size_t>(i)], a, out, stream, true,
                            sampling.units());
        };
        const double apart = b.timer.us(kCopies, [&](int64_t i) {
          norm(x.data(), hidden, nullptr, 0, rows, hidden, norm_weight, with_norm.norm_args,
               DType::bf16, normed.data(), hidden, true, stream);
          sampling.run(logits.data(), product(i, normed.data(), {}), b);
        });
        const bool fuses = linear.fuses(weights[0], with_norm, rows);
        const double us = !fuses ? apart : b.timer.us(kCopies, [&](int64_t i) {
          sampling.run(logits.data(), product(i, x.data(), with_norm), b);
        });
        const double summed_up =
            b.timer.us(kCopies, [&](int64_t i) { product(i, normed.data(), {}); });
        const double alone = b.timer.us(kCopies, [&](int64_t i) {
          linear.run(matrix(normed.data()), weights[static_cast<size_t>(i)], {}, out, stream);
        });
        table.rows.push_back(
            {model, rows, name, us, apart, summed_up, alone, read, 100 * (us / read - 1)});
      }
    }
  }
  b.finish(std::move(table));
}
}  // namespace

void bench_sampler(Bench& b) {
  constexpr int64_t kQwenVocab = 151936;
  SamplingRow greedy, warm, both;
  greedy.temperature = 0;
  warm.temperature = 0.6f;
  both.top_k = 50;
  both.top_p = 0.9f;
  Table table{
      "sampler",
      "Sampler alone (vocabulary 151936), beside reading the logits once at the rate of the copy",
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
  bench_heads(b, greedy, warm);
}
}  // namespace ni::cuda::bench
