// Promise 1: tokens and log-probabilities of a request are bitwise the same whatever else runs. A
// few needles run alone first, then in many kinds of company, and must come out the same.
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "engine_helpers.h"

namespace ni {
namespace {

constexpr uint64_t kFirstNeedle = 1000;
constexpr uint64_t kNeedlePrompt = 77;
constexpr int kPromptLength = 71;

std::vector<Request> needles() {
  std::vector<Request> out;
  for (int i = 0; i < 4; ++i) {
    Request r = make_request(kFirstNeedle + static_cast<uint64_t>(i),
                             random_prompt(kNeedlePrompt, kPromptLength), 20);
    r.params.logprobs = 4;
    r.params.seed = 5;
    out.push_back(r);
  }
  out[1].params.temperature = 0.8f;
  out[1].params.top_p = 0.95f;
  out[1].params.top_k = 60;
  out[1].params.min_p = 0.001f;
  out[1].params.repetition_penalty = 1.2f;
  out[1].params.frequency_penalty = 0.3f;
  out[2].params.n = 3;
  out[2].params.temperature = 1.0f;
  out[2].params.bad_words = {{3, 4}, {9}};
  out[3].params.prompt_logprobs = 3;
  out[3].params.logit_bias = {{7, 1.5f}};
  return out;
}

// What runs beside the needles, and on what engine.
struct Scenario {
  const char* name;
  int neighbours = 0;
  int max_num_seqs = 64;
  int budget = 256;
  int num_blocks = 1024;
  int block_size = 16;
  int num_threads = 1;
  bool prefix_hit = false;
  bool abort_neighbours = false;
  bool needles_last = false;
  bool static_batching = false;
  bool paged = true;
  bool chunked = true;
  bool overlap = false;
  bool graphs = false;
};

EngineConfig config_of(const Scenario& s, EngineConfig c) {
  c.max_num_seqs = s.max_num_seqs;
  c.max_num_batched_tokens = s.budget;
  c.num_blocks = s.num_blocks;
  c.block_size = s.block_size;
  c.num_threads = s.num_threads;
  c.static_batching = s.static_batching;
  c.paged = s.paged;
  c.enable_chunked_prefill = s.chunked;
  c.overlap = s.overlap;
  for (int size = 1; s.graphs && size <= s.max_num_seqs; size *= 2) c.graph_sizes.push_back(size);
  return c;
}

Request neighbour(uint64_t id, std::mt19937_64& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  // Every third shares a beginning with the needles.
  const uint64_t key = id % 3 == 0 ? kNeedlePrompt : 10000 + id;
  Request r = make_request(id, random_prompt(key, 1 + below(70)), 1 + below(40));
  r.params.temperature = below(2) == 0 ? 0.0f : 1.0f;
  r.params.seed = id;
  r.params.n = id % 5 == 0 ? 2 : 1;
  if (id % 7 == 0) r.params.prompt_logprobs = 0;
  return r;
}

struct Company {
  Results results;
  int preempted = 0;    // times a needle was
  int cut = 0;          // steps that computed a part of a needle's prompt and did not finish it
  int max_decodes = 0;  // in a step with a needle
};

// Runs the needles in the company that the scenario names.
Company run_in_company(Engine& engine, const Scenario& s, uint64_t key) {
  std::mt19937_64 random(key);
  Company out;
  if (s.prefix_hit) {
    engine.submit(make_request(1, random_prompt(kNeedlePrompt, kPromptLength)));
    run_all(engine);
  }
  std::vector<Request> queue;
  for (int i = 0; i < s.neighbours; ++i)
    queue.push_back(neighbour(static_cast<uint64_t>(i) + 2, random));
  for (Request& r : needles()) {
    const size_t place = s.needles_last ? queue.size() : random() % (queue.size() + 1);
    queue.insert(queue.begin() + static_cast<ptrdiff_t>(place), std::move(r));
  }
  // Half of them at once, the others while those run.
  size_t next = 0;
  out.results = run_all(engine, [&](int step) {
    const size_t until = step == 0 ? queue.size() - queue.size() / 2 : next + 2;
    for (; next < std::min(until, queue.size()); ++next) engine.submit(queue[next]);
    if (s.abort_neighbours && step % 3 == 1)
      engine.abort(2 + random() % static_cast<uint64_t>(s.neighbours), -1, FinishReason::abort);
  });
  EXPECT_EQ(next, queue.size());
  for (const StepRecord& record : engine.trace(0)) {
    for (const StepPlan::Event& e : record.preempted) out.preempted += e.request_id >= kFirstNeedle;
    for (const StepRecord::Entry& e : record.entries) {
      if (e.request_id < kFirstNeedle) continue;
      out.cut += e.num_samples == 0;
      out.max_decodes = std::max(out.max_decodes, record.num_decodes);
    }
  }
  EXPECT_TRUE(engine.stats().healthy);
  EXPECT_TRUE(all_blocks_back(engine.stats()));
  return out;
}

Results run_alone(const std::function<std::unique_ptr<Engine>()>& make) {
  Results out;
  for (const Request& r : needles()) {
    const std::unique_ptr<Engine> engine = make();
    engine->submit(r);
    out.merge(run_all(*engine));
  }
  return out;
}

// Choices of needles that differ in anything that is promised.
int count_differences(const Results& alone, const Results& company) {
  int differences = 0;
  for (const auto& [key, a] : alone) {
    const auto found = company.find(key);
    if (found == company.end()) {
      ++differences;
      continue;
    }
    const Got& b = found->second;
    differences += a.tokens != b.tokens || a.logprobs != b.logprobs ||
                   a.prompt_logprobs != b.prompt_logprobs || a.reason != b.reason;
  }
  return differences;
}

void expect_same(const Results& alone, const Results& company) {
  for (const auto& [key, a] : alone) {
    SCOPED_TRACE(concat("needle ", key.first - kFirstNeedle, ", choice ", key.second));
    const Got& b = company.at(key);
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_TRUE(a.logprobs == b.logprobs);
    EXPECT_TRUE(a.prompt_logprobs == b.prompt_logprobs);
    EXPECT_EQ(a.reason, b.reason);
    EXPECT_EQ(b.error, "");
  }
}

struct Numbers {
  std::string isa;
  DType dtype, kv;
};

void PrintTo(const Numbers& n, std::ostream* out) {
  *out << n.isa;
}

std::string name_of(const ::testing::TestParamInfo<Numbers>& info) {
  return concat(info.param.isa, "_", dtype_name(info.param.dtype), "_kv_",
                dtype_name(info.param.kv));
}

std::vector<Numbers> best_numbers() {
  const std::string best = cpu_isas().front();
  return {{best, DType::f32, DType::f32},
          {best, DType::bf16, DType::bf16},
          {best, DType::bf16, DType::f32},
          {best, DType::f16, DType::f16}};
}

std::vector<Numbers> all_numbers() {
  std::vector<Numbers> out = best_numbers();
  const std::string best = out.front().isa;
  for (const std::string& isa : cpu_isas())
    if (isa != best) out.push_back({isa, DType::bf16, DType::bf16});
  return out;
}

class Needle : public ::testing::TestWithParam<Numbers> {
 protected:
  std::unique_ptr<Engine> make(const Scenario& s, const ModelConfig& model = tiny_model()) {
    EngineConfig c = config_of(s, tiny_config());
    c.isa = GetParam().isa;
    c.dtype = GetParam().dtype;
    c.kv_cache_dtype = GetParam().kv;
    return make_engine(c, nullptr, model);
  }
  Results alone(const ModelConfig& model = tiny_model()) {
    const Scenario s{.name = "alone"};
    return run_alone([&] { return make(s, model); });
  }
};

TEST_P(Needle, SameBytesInEveryCompany) {
  const Results expected = alone();
  for (const auto& [key, got] : expected) ASSERT_EQ(got.tokens.size(), 20u);
  // The needles are not one request four times: what is compared has something to compare.
  std::set<std::vector<int32_t>> distinct;
  for (const auto& [key, got] : expected) distinct.insert(got.tokens);
  ASSERT_GE(distinct.size(), 4u);

  const std::vector<Scenario> scenarios = {
      {.name = "the needles together"},
      {.name = "threads", .num_threads = 3},
      {.name = "a few", .neighbours = 5, .num_threads = 2},
      {.name = "many", .neighbours = 60, .budget = 512, .num_threads = 2, .abort_neighbours = true},
      {.name = "chunks of few rows", .neighbours = 6, .max_num_seqs = 9, .budget = 9},
      {.name = "odd chunks", .neighbours = 6, .max_num_seqs = 16, .budget = 37},
      {.name = "prefix hit", .neighbours = 4, .prefix_hit = true},
      {.name = "prefix hit and chunks",
       .neighbours = 8,
       .max_num_seqs = 12,
       .budget = 17,
       .block_size = 4,
       .prefix_hit = true},
      {.name = "preemption",
       .neighbours = 9,
       .num_blocks = 40,
       .block_size = 4,
       .abort_neighbours = true,
       .needles_last = true},
      {.name = "preemption and chunks",
       .neighbours = 9,
       .max_num_seqs = 16,
       .budget = 23,
       .num_blocks = 44,
       .block_size = 4,
       .num_threads = 2,
       .needles_last = true},
      {.name = "block of one", .neighbours = 5, .block_size = 1, .prefix_hit = true},
      {.name = "static", .neighbours = 9, .static_batching = true},
      {.name = "unpaged", .neighbours = 9, .num_blocks = 10, .paged = false},
      {.name = "whole prompts", .neighbours = 9, .budget = 110, .chunked = false},
      {.name = "overlap", .neighbours = 20, .abort_neighbours = true, .overlap = true},
      {.name = "overlap with preemption and chunks",
       .neighbours = 9,
       .max_num_seqs = 16,
       .budget = 23,
       .num_blocks = 44,
       .block_size = 4,
       .num_threads = 2,
       .needles_last = true,
       .overlap = true}};
  uint64_t key = 0;
  for (const Scenario& s : scenarios) {
    SCOPED_TRACE(s.name);
    const std::unique_ptr<Engine> engine = make(s);
    const Company company = run_in_company(*engine, s, ++key);
    expect_same(expected, company.results);
    // The scenario has happened.
    const std::string name = s.name;
    if (name.find("preemption") != std::string::npos) {
      EXPECT_GT(company.preempted, 0);
    }
    if (name.find("chunks") != std::string::npos) {
      EXPECT_GT(company.cut, 0);
    }
    if (name == "many") {
      EXPECT_GT(company.max_decodes, 30);
    }
    if (s.prefix_hit) {
      EXPECT_GT(company.results.at({kFirstNeedle, 0}).num_cached, 0);
    }
  }
}

// Steps that are padded, captured and replayed.
TEST(CapturedNeedle, SameBytesInEveryCompany) {
  const auto make = [](const Scenario& s) { return make_engine(config_of(s, tiny_config())); };
  const Results expected = run_alone([&] { return make({.name = "alone"}); });
  const std::vector<Scenario> scenarios = {
      {.name = "the needles together"},
      {.name = "a few", .neighbours = 5, .num_threads = 2},
      {.name = "many", .neighbours = 60, .budget = 512, .abort_neighbours = true},
      {.name = "prefix hit",
       .neighbours = 8,
       .max_num_seqs = 12,
       .budget = 17,
       .block_size = 4,
       .prefix_hit = true},
      {.name = "preemption",
       .neighbours = 9,
       .max_num_seqs = 16,
       .budget = 23,
       .num_blocks = 44,
       .block_size = 4,
       .needles_last = true},
      {.name = "unpaged", .neighbours = 9, .num_blocks = 10, .paged = false}};
  uint64_t key = 0;
  for (Scenario s : scenarios) {
    for (const bool overlap : {false, true}) {
      SCOPED_TRACE(concat(s.name, overlap ? ", overlap" : ""));
      s.graphs = true;
      s.overlap = overlap;
      auto backend = std::make_unique<GraphBackend>(s.num_threads);
      const GraphBackend* watched = backend.get();
      const std::unique_ptr<Engine> engine =
          make_engine(config_of(s, tiny_config()), std::move(backend));
      const int captured = watched->captured;
      // With and without a cut in the sampler, for each step that may be in flight.
      const auto sizes = static_cast<int>(engine->config().graph_sizes.size());
      EXPECT_EQ(captured, (overlap ? 4 : 2) * sizes);
      expect_same(expected, run_in_company(*engine, s, ++key).results);
      EXPECT_EQ(watched->captured, captured);  // all of it before the first step
      EXPECT_GT(watched->replayed, 15);
      EXPECT_GE(watched->replayed_rows.size(), 2u);
    }
  }
}

// The cutting into pieces is the same code for every instruction set.
class WideNeedle : public Needle {};

// Wide enough that every operator is cut into pieces for several threads, in decode steps too.
TEST_P(WideNeedle, SameBytesOnAnyNumberOfThreads) {
  ModelConfig model = tiny_model();
  model.vocab_size = 1003;
  model.hidden_size = 160;
  model.intermediate_size = 200;
  model.head_dim = 32;
  const Results expected = alone(model);
  for (const int threads : {2, 3}) {
    SCOPED_TRACE(threads);
    const Scenario s{
        .name = "threads", .neighbours = 3, .budget = 100 + threads, .num_threads = threads};
    const std::unique_ptr<Engine> engine = make(s, model);
    expect_same(expected, run_in_company(*engine, s, static_cast<uint64_t>(threads)).results);
  }
}

INSTANTIATE_TEST_SUITE_P(Numbers, WideNeedle, ::testing::ValuesIn(best_numbers()), name_of);
INSTANTIATE_TEST_SUITE_P(Numbers, Needle, ::testing::ValuesIn(all_numbers()), name_of);

// Inverse tests: the proof above bites when a reduction depends on the batch.
int differences_with(const HookedBackend::After& tamper) {
  const auto make = [&](const Scenario& s) {
    return make_engine(config_of(s, tiny_config()),
                       std::make_unique<HookedBackend>(nullptr, tamper));
  };
  const Scenario by_itself{.name = "alone"}, few{.name = "a few", .neighbours = 5};
  const Results expected = run_alone([&] { return make(by_itself); });
  const std::unique_ptr<Engine> engine = make(few);
  return count_differences(expected, run_in_company(*engine, few, 3).results);
}

void scale(Tensor out, float factor) {
  for (int64_t r = 0; r < out.rows(); ++r)
    for (int64_t i = 0; i < out.cols(); ++i) out.as<float>()[r * out.row_stride + i] *= factor;
}

TEST(NeedleInverse, FindsNothingWhenTheBackendIsLeftAlone) {
  EXPECT_EQ(differences_with([](std::string_view, const StepInputs*, Tensor) {}), 0);
}

TEST(NeedleInverse, FindsAMatrixProductThatDependsOnTheNumberOfRows) {
  const int found = differences_with([](std::string_view op, const StepInputs*, Tensor out) {
    // As another order of summation would: by a few units in the last place.
    if (op == "linear") scale(out, 1.0f + 1.2e-7f * static_cast<float>(out.rows() % 8));
  });
  EXPECT_EQ(found, 6);  // every choice of every needle
}

TEST(NeedleInverse, FindsAnAttentionThatDependsOnTheLongestContext) {
  const int found = differences_with([](std::string_view op, const StepInputs* in, Tensor out) {
    // As a split of the cache chosen for the whole batch would.
    if (op == "attention") scale(out, in->max_context_len > 80 ? 1.0f + 2.4e-7f : 1.0f);
  });
  EXPECT_GT(found, 0);
}

}  // namespace
}  // namespace ni
