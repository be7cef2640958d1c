#include "bench.h"

namespace ni::cuda::bench {
namespace {

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
  const bool plain = row.top_k == 0 && row.top_p == 1 && row.min_p == 0;
  return b.timer.us(copies, [&](int64_t i) {
    sample(logits.data() + i * size, vocab, rows, vocab, step.data(), 0, plain, out,
           workspace.data(), b.card, b.timer.stream());
  });
}
}  // namespace

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
}  // namespace ni::cuda::bench
