// No memory is allocated in a steady step, and a step's memory is bounded. This suite replaces
// operator new, so it is an executable of its own.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "engine_helpers.h"

namespace {

std::atomic<bool> counting{false};
std::atomic<int> allocations{0};

void* counted(size_t bytes, size_t alignment) {
  if (counting.load(std::memory_order_relaxed)) ++allocations;
  void* p = alignment == 0
                ? std::malloc(bytes == 0 ? 1 : bytes)
                : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace

[[gnu::noinline]] void* operator new(size_t n) {
  return counted(n, 0);
}
[[gnu::noinline]] void* operator new[](size_t n) {
  return counted(n, 0);
}
[[gnu::noinline]] void* operator new(size_t n, std::align_val_t a) {
  return counted(n, static_cast<size_t>(a));
}
[[gnu::noinline]] void* operator new[](size_t n, std::align_val_t a) {
  return counted(n, static_cast<size_t>(a));
}
[[gnu::noinline]] void* operator new(size_t n, const std::nothrow_t&) noexcept {
  if (counting.load(std::memory_order_relaxed)) ++allocations;
  return std::malloc(n == 0 ? 1 : n);
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete[](void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete[](void* p, size_t) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete[](void* p, std::align_val_t) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, size_t, std::align_val_t) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete[](void* p, size_t, std::align_val_t) noexcept {
  std::free(p);
}

namespace ni {
namespace {

// A model runner with its scheduler, stepped without an engine around them.
class Runner {
 public:
  Runner(std::unique_ptr<Backend> backend, bool overlap)
      : overlap_(overlap),
        blocks_(block_config()),
        scheduler_(scheduler_config(), blocks_),
        runner_(std::move(backend), tiny_model(), Engine::runner_config(config(overlap))) {
    for (const auto& [name, shape] : Weights(tiny_model(), DType::f32).slots()) {
      std::vector<float> values(static_cast<size_t>(shape[0] * (shape.size() == 2 ? shape[1] : 1)));
      for (size_t i = 0; i < values.size(); ++i) values[i] = 0.3f * random_value(1, i);
      runner_.load_weight(name, shape.size() == 2
                                    ? Tensor(values.data(), DType::f32, {shape[0], shape[1]})
                                    : Tensor(values.data(), DType::f32, {shape[0]}));
    }
    runner_.finish_loading();
  }

  void add(Request r) { scheduler_.add(std::make_shared<const Request>(std::move(r))); }

  // One step, and with overlap the end of the one before; returns the allocations of launch and
  // collect, and those of scheduling it ahead.
  int step(const std::function<void(const StepPlan&)>& look = nullptr) {
    allocations = 0;
    EXPECT_TRUE(scheduler_.can_run_ahead());
    counting = in_flight_;
    const StepPlan& plan = in_flight_ ? scheduler_.schedule_ahead() : scheduler_.schedule();
    counting = false;
    if (plan.empty()) return -1;
    if (look) look(plan);
    counting = true;
    runner_.launch(plan);
    const bool first = overlap_ && !std::exchange(in_flight_, true);
    const StepResult* result = first ? nullptr : &runner_.collect();
    counting = false;
    if (first) return allocations;
    scheduler_.update(result->samples.data(), updates_);
    updates_.clear();
    return allocations;
  }

 private:
  static EngineConfig config(bool overlap) {
    EngineConfig c = tiny_config();
    c.block_size = 4;
    c.max_num_seqs = 8;
    c.overlap = overlap;
    c.graph_sizes = {4, 8};
    return c;
  }
  static BlockManagerConfig block_config() {
    BlockManagerConfig c;
    c.num_blocks = tiny_config().num_blocks;
    c.block_size = 4;
    return c;
  }
  static SchedulerConfig scheduler_config() {
    SchedulerConfig c;
    c.max_num_seqs = 8;
    c.max_num_batched_tokens = 256;
    c.max_model_len = 256;
    c.vocab_size = 131;
    return c;
  }

  bool overlap_;
  bool in_flight_ = false;
  BlockManager blocks_;
  Scheduler scheduler_;
  ModelRunner runner_;
  std::vector<SequenceUpdate> updates_;
};

Request busy_request(uint64_t id, bool penalties = true) {
  // The prompt holds every token that may come: the lists of token counts keep their lengths.
  const std::vector<int32_t> allowed = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  std::vector<int32_t> prompt = random_prompt(id, 20);
  prompt.insert(prompt.end(), allowed.begin(), allowed.end());
  Request r = make_request(id, std::move(prompt), 100);
  r.params.temperature = id % 2 == 0 ? 0.0f : 0.9f;
  r.params.top_k = 40;
  r.params.top_p = 0.9f;
  if (penalties) r.params.repetition_penalty = 1.1f;
  r.params.logprobs = 5;
  r.params.logit_bias = {{3, 1.0f}};
  r.params.bad_words = {{4}};
  r.params.allowed_token_ids = allowed;
  return r;
}

class StepMemory : public ::testing::TestWithParam<int> {};

// Contexts grow through many blocks, and not even that allocates: on the engine's thread and on
// those of the pool.
TEST_P(StepMemory, NoAllocationInASteadyDecodeStep) {
  int backend_allocations = 0;
  Runner runner(
      std::make_unique<HookedBackend>(
          [&](std::string_view op) { backend_allocations += op == "alloc"; }, nullptr, GetParam()),
      false);
  for (uint64_t id = 1; id <= 8; ++id) runner.add(busy_request(id));
  for (int i = 0; i < 5; ++i) ASSERT_GE(runner.step(), 0);
  const int before = backend_allocations;
  int total = 0;
  for (int i = 0; i < 90; ++i) {
    const int count = runner.step([](const StepPlan& plan) { EXPECT_EQ(plan.num_decodes, 8); });
    ASSERT_GE(count, 0);
    total += count;
  }
  EXPECT_EQ(total, 0);
  EXPECT_EQ(backend_allocations, before);
}

INSTANTIATE_TEST_SUITE_P(Threads, StepMemory, ::testing::Values(1, 3));

// The same for steps that are scheduled ahead, captured and replayed, with work lists.
TEST(OverlapMemory, NoAllocationInAStepThatOverlapsTheOneBefore) {
  int backend_allocations = 0;
  auto backend = std::make_unique<GraphBackend>(
      1, [&](std::string_view op) { backend_allocations += op == "alloc"; });
  const GraphBackend* watched = backend.get();
  Runner runner(std::move(backend), true);
  for (uint64_t id = 1; id <= 7; ++id) runner.add(busy_request(id, false));
  for (int i = 0; i < 5; ++i) ASSERT_GE(runner.step(), 0);
  const int before = backend_allocations, eager = watched->eager;
  int total = 0;
  for (int i = 0; i < 90; ++i) {
    const int count = runner.step([](const StepPlan& plan) { EXPECT_EQ(plan.num_decodes, 7); });
    ASSERT_GE(count, 0);
    total += count;
  }
  EXPECT_EQ(total, 0);
  EXPECT_EQ(backend_allocations, before);
  EXPECT_EQ(watched->eager, eager);
}

TEST(StepMemoryInverse, TheCounterCounts) {
  allocations = 0;
  counting = true;
  ::operator delete(::operator new(4));  // unlike new and delete, never left out
  std::vector<int> v(100);
  counting = false;
  EXPECT_EQ(allocations, 2);
  EXPECT_EQ(v.size(), 100u);
}

// What is allocated until the end of the first steps is what was planned before loading.
TEST(MemoryPlan, IsWhatIsAllocated) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    EngineConfig config = tiny_config();
    config.overlap = dtype == DType::bf16;
    config.dtype = config.kv_cache_dtype = dtype;
    const RunnerConfig runner = Engine::runner_config(config);
    auto backend = std::make_unique<HookedBackend>(nullptr);
    const HookedBackend* watched = backend.get();
    const MemoryPlan plan = ModelRunner::plan_memory(*backend, tiny_model(), runner);
    const std::unique_ptr<Engine> engine = make_engine(config, std::move(backend));
    Request r = make_request(1, random_prompt(1, 200), 20);
    r.params.prompt_logprobs = 2;
    engine->submit(r);
    run_all(*engine);
    EXPECT_EQ(watched->allocated, plan.weights + plan.activations +
                                      plan.kv_block * static_cast<size_t>(config.num_blocks));
  }
}

// Prompt log-probabilities of a long prompt with a big vocabulary: 64 rows of logits at a time, on
// a card 256 to 512, whatever max_num_seqs is.
TEST(LogitsMemory, IsBoundedWhateverThePromptLength) {
  ModelConfig model = tiny_model();
  model.vocab_size = 5003;
  RunnerConfig config;
  config.block_size = 16;
  config.num_blocks = 64;
  config.max_model_len = 512;
  config.max_num_batched_tokens = 512;
  const std::unique_ptr<Backend> cpu = cpu_backend();
  const GraphBackend card;
  // Rows of logits that are planned for: memory per entry of the vocabulary.
  const auto planned = [&](const Backend& backend, int max_num_seqs) {
    config.max_num_seqs = max_num_seqs;
    const auto activations = [&](int vocab) {
      model.vocab_size = vocab;
      return ModelRunner::plan_memory(backend, model, config).activations;
    };
    return (activations(8016) - activations(4016)) / (4000 * 4);
  };
  for (const int seqs : {1, 16, 64, 512}) EXPECT_EQ(planned(*cpu, seqs), 64u) << seqs;
  for (const auto& [seqs, rows] : std::map<int, size_t>{{1, 256}, {256, 256}, {300, 300}})
    EXPECT_EQ(planned(card, seqs), rows);
  EXPECT_EQ(planned(card, 2000), 512u);  // more than lm_head has plans for
  config.max_num_batched_tokens = 8;
  EXPECT_EQ(planned(*cpu, 4), 12u);  // all that there can be
  EXPECT_EQ(planned(card, 4), 12u);

  int largest = 0;
  int64_t scored = 0;
  EngineConfig engine_config = tiny_config();
  engine_config.max_model_len = 512;
  engine_config.max_num_seqs = 1;
  engine_config.max_num_batched_tokens = 512;
  model.vocab_size = 5003;
  auto hooked = std::make_unique<HookedBackend>(
      nullptr, [&](std::string_view op, const StepInputs*, Tensor out) {
        if (op != "sample") return;
        largest = std::max(largest, static_cast<int>(out.rows()));
        scored += out.rows();
      });
  const std::unique_ptr<Engine> engine = make_engine(engine_config, std::move(hooked), model);
  Request r = make_request(1, random_prompt(1, 500), 1);
  r.params.prompt_logprobs = 1;
  engine->submit(r);
  EXPECT_EQ(run_all(*engine).at({1, 0}).prompt_logprobs.size(), 499u);
  EXPECT_EQ(largest, 64);
  EXPECT_EQ(scored, 500);
}

// Memory for the results of a step does not follow from max_logprobs times all rows of a prompt:
// such prompts come in shorter chunks.
TEST(LogprobsMemory, IsBoundedWhateverMaxLogprobs) {
  EngineConfig config = tiny_config();
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 8192;
  config.max_model_len = 256;
  const GraphBackend card;
  const auto results = [&](int max_logprobs) {
    const auto activations = [&](int most) {
      config.max_logprobs = most;
      return ModelRunner::plan_memory(card, tiny_model(), Engine::runner_config(config))
          .activations;
    };
    return activations(max_logprobs) - activations(0);
  };
  EXPECT_EQ(results(20), size_t{8192 + 4} * 20 * 8);  // all rows
  constexpr size_t kVocab = 152064;
  EXPECT_LE(results(kVocab), (size_t{256} << 20) + 4 * kVocab * 8);
  config.enable_chunked_prefill = false;  // then they cannot
  EXPECT_EQ(results(4096), size_t{8192 + 4} * 4096 * 8);

  // The step that comes before the cache is sized keeps to it, too, and so do requests.
  config = tiny_config();
  config.max_num_seqs = 2;
  config.max_num_batched_tokens = 64;
  config.max_logprobs = 1 << 21;  // 16 rows
  auto engine = make_engine(config, std::make_unique<GraphBackend>());
  Request r = make_request(1, random_prompt(1, 100), 4);
  r.params.prompt_logprobs = 0;
  engine->submit(r);
  const Results limited = run_all(*engine);
  config.max_logprobs = 20;
  engine = make_engine(config);
  engine->submit(r);
  const Results free = run_all(*engine);
  EXPECT_EQ(limited.at({1, 0}).tokens, free.at({1, 0}).tokens);
  EXPECT_EQ(limited.at({1, 0}).prompt_logprobs.size(), 99u);
}

}  // namespace
}  // namespace ni
