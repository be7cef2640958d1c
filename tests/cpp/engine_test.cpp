// What may go wrong around an engine: cancellation (promise 3), requests and steps that fail
// (promise 4), a stuck device (promise 7), shutdown, counters under chaos (promise 11).
#include "engine/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <new>
#include <random>
#include <set>
#include <thread>

#include "engine_helpers.h"

namespace ni {
namespace {

template <typename Error, typename Fn>
std::string message_of(const Fn& fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::vector<int32_t> argmax_tokens(std::vector<int32_t> tokens, int count) {
  const std::unique_ptr<Engine> engine = make_engine();
  const auto vocab = static_cast<size_t>(engine->model_config().vocab_size);
  std::vector<int32_t> out;
  for (int i = 0; i < count; ++i) {
    const std::vector<float> logits = engine->logits(tokens);
    const auto last = logits.end() - static_cast<ptrdiff_t>(vocab);
    out.push_back(static_cast<int32_t>(std::max_element(last, logits.end()) - last));
    tokens.push_back(out.back());
  }
  return out;
}

TEST(Engine, GreedyTokensAreTheBestOfTheLogits) {
  const std::vector<int32_t> prompt = random_prompt(3, 37);
  const std::unique_ptr<Engine> engine = make_engine();
  engine->submit(make_request(1, prompt, 12));
  const Results results = run_all(*engine);
  const Got& got = results.at({1, 0});
  EXPECT_EQ(got.tokens, argmax_tokens(prompt, 12));
  EXPECT_EQ(got.reason, FinishReason::length);
  EXPECT_EQ(got.ends, 1);
  EXPECT_TRUE(got.done);
}

TEST(Engine, LogprobsComeFromTheRawLogits) {
  const std::vector<int32_t> prompt = random_prompt(4, 30);
  EngineConfig config = tiny_config();
  config.max_num_batched_tokens = 64;
  const std::unique_ptr<Engine> engine = make_engine(config);
  Request r = make_request(1, prompt, 1);
  r.params.temperature = 0.7f;
  r.params.logit_bias = {{5, 3.0f}};
  r.params.logprobs = 3;
  r.params.prompt_logprobs = 2;
  engine->submit(r);
  const Got got = run_all(*engine).at({1, 0});
  const std::vector<float> logits = engine->logits(prompt);
  const size_t vocab = logits.size() / prompt.size();
  ASSERT_EQ(got.prompt_logprobs.size(), prompt.size() - 1);
  ASSERT_EQ(got.logprobs.size(), 1u);
  for (size_t i = 0; i < prompt.size(); ++i) {
    const float* row = logits.data() + i * vocab;
    const TokenLogprobs& p = i + 1 < prompt.size() ? got.prompt_logprobs[i] : got.logprobs[0];
    const int32_t token = i + 1 < prompt.size() ? prompt[i + 1] : got.tokens[0];
    double sum = 0.0;
    int rank = 1;
    for (size_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v]));
    for (size_t v = 0; v < vocab; ++v) rank += row[v] > row[token];
    EXPECT_EQ(p.token_id, token);
    EXPECT_EQ(p.rank, rank);
    EXPECT_NEAR(p.logprob, row[token] - std::log(sum), 1e-5);
    ASSERT_EQ(p.top_ids.size(), i + 1 < prompt.size() ? 2u : 3u);
    EXPECT_EQ(p.top_ids[0], std::max_element(row, row + vocab) - row);
    EXPECT_NEAR(p.top_logprobs[0], row[p.top_ids[0]] - std::log(sum), 1e-5);
  }
}

TEST(Engine, EveryChoiceIsTheSameAloneOrInAGroup) {
  Request r = make_request(1, random_prompt(5, 21), 10);
  r.params.temperature = 1.0f;
  r.params.seed = 99;
  r.params.n = 4;
  const std::unique_ptr<Engine> engine = make_engine();
  engine->submit(r);
  const Results group = run_all(*engine);
  ASSERT_EQ(group.size(), 4u);
  r.params.n = 1;
  const std::unique_ptr<Engine> other = make_engine();
  other->submit(r);
  EXPECT_EQ(run_all(*other).at({1, 0}).tokens, group.at({1, 0}).tokens);
  EXPECT_NE(group.at({1, 0}).tokens, group.at({1, 1}).tokens);
  // 21 tokens: one whole block is shared; the second is copied by all but its last writer.
  EXPECT_EQ(engine->stats().blocks.copies, 3u);
  EXPECT_EQ(engine->stats().prompt_tokens, 21u);
}

TEST(Engine, StopsAtStopTokensAndAtTheContextLimit) {
  const std::vector<int32_t> prompt = random_prompt(6, 20);
  const std::vector<int32_t> expected = argmax_tokens(prompt, 6);
  EngineConfig config = tiny_config();
  config.max_model_len = 24;
  config.eos_token_ids = {expected[2]};
  const std::unique_ptr<Engine> engine = make_engine(config);
  Request eos = make_request(1, prompt, -1), stop = make_request(2, prompt, -1);
  eos.params.ignore_eos = false;
  stop.params.stop_token_ids = {expected[1]};
  engine->submit(eos);
  engine->submit(stop);
  engine->submit(make_request(3, prompt, -1));
  const Results results = run_all(*engine);
  const auto first = [&](size_t n) {
    return std::vector<int32_t>(expected.begin(), expected.begin() + static_cast<ptrdiff_t>(n));
  };
  const size_t eos_at = static_cast<size_t>(
      std::find(expected.begin(), expected.end(), expected[2]) - expected.begin());
  const size_t stop_at = static_cast<size_t>(
      std::find(expected.begin(), expected.end(), expected[1]) - expected.begin());
  EXPECT_EQ(results.at({1, 0}).tokens, first(eos_at + 1));
  EXPECT_EQ(results.at({1, 0}).reason, FinishReason::stop);
  EXPECT_EQ(results.at({1, 0}).stop_token, -1);
  EXPECT_EQ(results.at({2, 0}).tokens, first(stop_at + 1));
  EXPECT_EQ(results.at({2, 0}).stop_token, expected[1]);
  EXPECT_EQ(results.at({3, 0}).tokens, first(4));  // 20 + 4 = max_model_len
  EXPECT_EQ(results.at({3, 0}).reason, FinishReason::length);
}

// -- Promise 3 --------------------------------------------------------------------------------

// Steps by hand: an abort that arrives before step k is done at its beginning.
TEST(Cancel, BlocksAreFreeAfterTheNextStep) {
  for (const int when : {0, 1, 3, 9}) {  // waiting; in the middle of the prompt; decoding
    SCOPED_TRACE(when);
    EngineConfig config = tiny_config();
    config.max_num_seqs = 4;
    config.max_num_batched_tokens = 30;
    const std::unique_ptr<Engine> engine = make_engine(config);
    Request r = make_request(1, random_prompt(8, 100), 50);
    r.params.n = 3;
    engine->submit(r);
    for (int i = 0; i < when; ++i) engine->step();
    if (when > 0) {
      EXPECT_GT(engine->stats().blocks.num_used, 0);
    }
    engine->abort(1, -1, FinishReason::abort);
    engine->step();
    EXPECT_TRUE(all_blocks_back(engine->stats()));
    Results results;
    take(engine->wait_outputs(0), results);
    for (int choice = 0; choice < 3; ++choice) {
      EXPECT_EQ(results.at({1, choice}).reason, FinishReason::abort);
      EXPECT_EQ(results.at({1, choice}).ends, 1);
    }
    const EngineStats stats = engine->stats();
    EXPECT_EQ(stats.aborted, 1u);
    EXPECT_EQ(stats.running + stats.waiting, 0);
    EXPECT_FALSE(engine->step());
  }
}

TEST(Cancel, OneChoiceGivesItsOwnBlocksBack) {
  const std::unique_ptr<Engine> engine = make_engine();
  Request r = make_request(1, random_prompt(8, 40), 60);
  r.params.n = 2;
  r.params.temperature = 1.0f;
  engine->submit(r);
  for (int i = 0; i < 30; ++i) engine->step();
  const int before = engine->stats().blocks.num_used;
  engine->abort(1, 0, FinishReason::stop);
  engine->step();
  // 40 + 30 tokens: 2 shared blocks and 3 of one's own.
  EXPECT_EQ(before, 8);
  EXPECT_EQ(engine->stats().blocks.num_used, 5);
  const Results results = run_all(*engine);
  EXPECT_EQ(results.at({1, 0}).reason, FinishReason::stop);
  EXPECT_FALSE(results.at({1, 0}).done);
  EXPECT_EQ(results.at({1, 1}).tokens.size(), 60u);
  EXPECT_TRUE(results.at({1, 1}).done);
  EXPECT_TRUE(all_blocks_back(engine->stats()));
}

TEST(Cancel, UnknownAndLateAbortsDoNothing) {
  const std::unique_ptr<Engine> engine = make_engine();
  engine->abort(5, -1, FinishReason::abort);
  EXPECT_FALSE(engine->step());
  engine->submit(make_request(1, random_prompt(1, 5), 3));
  engine->abort(1, 7, FinishReason::abort);  // no such choice
  const Results results = run_all(*engine);
  EXPECT_EQ(results.at({1, 0}).reason, FinishReason::length);
  engine->abort(1, -1, FinishReason::abort);
  EXPECT_FALSE(engine->step());
  // The id is free again, and the late abort does not hit its new owner.
  engine->submit(make_request(1, random_prompt(2, 5), 3));
  EXPECT_EQ(run_all(*engine).at({1, 0}).tokens.size(), 3u);
}

// With the engine thread: an abort that arrives while a step is in flight is done right after it.
TEST(Cancel, DuringAStepInFlightItEndsWithTheNextOne) {
  auto door = std::make_shared<Door>();
  std::atomic<int> samples{0};
  auto backend = std::make_unique<HookedBackend>([&, door](std::string_view op) {
    if (op == "sample" && ++samples == 3) door->pass();
  });
  const std::unique_ptr<Engine> engine = make_engine(tiny_config(), std::move(backend));
  engine->start();
  engine->submit(make_request(1, random_prompt(1, 40), 100));
  door->wait_for_somebody();  // in the third step
  engine->abort(1, -1, FinishReason::abort);
  EXPECT_GT(engine->stats().blocks.num_used, 0);
  door->open();
  const Got got = wait_all(*engine, 1).at({1, 0});
  EXPECT_EQ(got.reason, FinishReason::abort);
  EXPECT_EQ(got.tokens.size(), 3u);
  EXPECT_EQ(samples, 3);  // no further step
  EXPECT_TRUE(all_blocks_back(engine->stats()));
}

// -- Promise 4 --------------------------------------------------------------------------------

TEST(BadRequest, IsRefusedAndTheNextOneServed) {
  EngineConfig config = tiny_config();
  config.num_blocks = 4;  // 64 slots
  config.max_waiting = 2;
  const std::unique_ptr<Engine> engine = make_engine(config);
  const auto refused = [&](Request r) {
    return message_of<std::invalid_argument>([&] { engine->submit(std::move(r)); });
  };
  EXPECT_TRUE(contains(refused(make_request(1, {})), "prompt is empty"));
  EXPECT_TRUE(contains(refused(make_request(1, random_prompt(1, 256))), "max_model_len"));
  EXPECT_TRUE(contains(refused(make_request(1, random_prompt(1, 65))), "cache holds only 64"));
  EXPECT_TRUE(contains(refused(make_request(1, random_prompt(1, 60), 10)), "can be at most 5"));
  EXPECT_TRUE(contains(refused(make_request(1, {3, 131})), "prompt[1] is 131"));
  EXPECT_TRUE(contains(refused(make_request(1, {-1})), "prompt[0] is -1"));
  EXPECT_EQ(engine->stats().rejected, 6u);
  engine->submit(make_request(1, random_prompt(1, 60), 5));
  engine->submit(make_request(2, random_prompt(1, 60), -1));
  EXPECT_TRUE(contains(refused(make_request(2, {1})), "request id 2 is already in use"));
  EXPECT_TRUE(contains(message_of<QueueFull>([&] { engine->submit(make_request(3, {1})); }),
                       "max_waiting is 2"));
  EXPECT_TRUE(balanced(engine->stats()));
  const Results results = run_all(*engine);
  EXPECT_EQ(results.size(), 2u);
  EXPECT_EQ(results.at({1, 0}).tokens, results.at({2, 0}).tokens);
  EXPECT_EQ(results.at({2, 0}).tokens.size(), 5u);
  engine->submit(make_request(3, {1}));
  EXPECT_EQ(run_all(*engine).at({3, 0}).tokens.size(), 8u);
  EXPECT_TRUE(balanced(engine->stats()));
}

TEST(SubmitAll, TakesAllOrNone) {
  EngineConfig config = tiny_config();
  config.max_waiting = 3;
  const std::unique_ptr<Engine> engine = make_engine(config);
  const auto requests = [](std::initializer_list<uint64_t> ids) {
    std::vector<Request> all;
    for (const uint64_t id : ids) all.push_back(make_request(id, random_prompt(1, 9), 2));
    return all;
  };
  const auto refused = [&](std::vector<Request> all) {
    return message_of<std::invalid_argument>([&] { engine->submit_all(std::move(all)); });
  };
  std::vector<Request> with_bad = requests({1, 2, 3});
  with_bad[1].prompt[4] = -1;
  EXPECT_TRUE(contains(refused(with_bad), "prompt[4] is -1"));
  EXPECT_TRUE(contains(refused(requests({1, 2, 1})), "request id 1 is already in use"));
  engine->submit_all({});
  EXPECT_EQ(engine->stats().received, 6u);
  EXPECT_EQ(engine->stats().rejected, 6u);
  EXPECT_EQ(engine->stats().waiting, 0);

  engine->submit_all(requests({1, 2}));
  EXPECT_TRUE(contains(refused(requests({3, 2})), "request id 2 is already in use"));
  EXPECT_EQ(message_of<QueueFull>([&] { engine->submit_all(requests({3, 4})); }),
            "the waiting queue is full: 2 requests wait, 2 come, max_waiting is 3");
  engine->submit_all(requests({3}));
  EXPECT_EQ(message_of<QueueFull>([&] { engine->submit(requests({4}).front()); }),
            "the waiting queue is full: 3 requests wait, max_waiting is 3");
  EXPECT_EQ(engine->stats().waiting, 3);
  EXPECT_TRUE(balanced(engine->stats()));
  const Results results = run_all(*engine);
  EXPECT_EQ(results.size(), 3u);
  for (const auto& [choice, got] : results) EXPECT_EQ(got.tokens, results.at({1, 0}).tokens);
  engine->shutdown();
  EXPECT_TRUE(contains(
      message_of<std::runtime_error>([&] { engine->submit_all(requests({5, 6})); }), "shut down"));
  EXPECT_EQ(engine->stats().received, 3u + engine->stats().rejected);
  EXPECT_TRUE(balanced(engine->stats()));
}

EngineConfig card_config() {
  EngineConfig config = tiny_config();
  config.device = "cuda";  // says so; the backend is another
  return config;
}

// The thread, awake between two rounds as on a card, would run the first as soon as it is there.
TEST(SubmitAll, AStepMeetsAllOfThem) {
  constexpr uint64_t kRequests = 64;
  EngineConfig config = card_config();
  config.max_num_seqs = kRequests;
  config.max_num_batched_tokens = 2 * kRequests;
  config.num_blocks = kRequests;
  const std::unique_ptr<Engine> engine = make_engine(config, cpu_backend(1));
  engine->start();
  for (uint64_t round = 0; round < 20; ++round) {
    std::vector<Request> all;
    for (uint64_t i = 0; i < kRequests; ++i)
      all.push_back(make_request(kRequests * round + i, {1, 2}, 1));
    const uint64_t before = engine->stats().steps;
    engine->submit_all(std::move(all));
    wait_all(*engine, kRequests);
    const std::vector<StepRecord> steps = engine->trace(before + 1);
    ASSERT_EQ(steps.size(), 1u);
    EXPECT_EQ(steps[0].entries.size(), kRequests);
  }
}

struct Fault {
  std::string op;
  std::string kind = "error";
  std::atomic<int> countdown{0};  // > 0: the countdown-th call throws

  void operator()(std::string_view name) {
    if (name != op || countdown == 0 || --countdown > 0) return;
    if (kind == "bad_alloc") throw std::bad_alloc();
    if (kind == "logic_error")
      throw std::logic_error("the device caught fire");  // one of its checks
    throw std::runtime_error("the device caught fire");
  }
};

class FailingStep : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {};

TEST_P(FailingStep, FailsItsRequestsAndNothingElse) {
  auto fault = std::make_shared<Fault>();
  fault->op = std::get<0>(GetParam());
  fault->kind = std::get<1>(GetParam());
  EngineConfig config = tiny_config();
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 48;
  const std::unique_ptr<Engine> engine = make_engine(
      config, std::make_unique<HookedBackend>([fault](std::string_view op) { (*fault)(op); }));
  const std::vector<int32_t> prompt = random_prompt(12, 96);
  const std::vector<int32_t> expected = argmax_tokens(prompt, 8);

  // Tokens are where the host reads them; what comes by a download is log-probabilities.
  const auto submit = [&](Request request) {
    if (fault->op == "download") request.params.logprobs = 0;
    engine->submit(std::move(request));
  };

  // The second step fails: 48 tokens of the prompt were computed before, 3 blocks.
  submit(make_request(1, prompt));
  Request waiting = make_request(2, random_prompt(13, 20));
  submit(waiting);
  engine->step();
  fault->countdown = 1;
  engine->step();
  ASSERT_EQ(fault->countdown, 0) << "no such call";
  Results results;
  take(engine->wait_outputs(0), results);
  const Got& failed = results.at({1, 0});
  EXPECT_EQ(failed.reason, FinishReason::error);
  EXPECT_TRUE(contains(failed.error, fault->kind == "bad_alloc" ? "bad_alloc" : "caught fire"));
  EXPECT_TRUE(failed.tokens.empty());
  EXPECT_EQ(failed.ends, 1);
  EXPECT_EQ(engine->stats().failed, 1u);
  EXPECT_EQ(engine->stats().failed_steps, 1u);
  EXPECT_TRUE(engine->stats().healthy);

  // Whoever had no row in it is served.
  results = run_all(*engine);
  EXPECT_EQ(results.at({2, 0}).tokens, argmax_tokens(waiting.prompt, 8));
  EXPECT_TRUE(all_blocks_back(engine->stats()));

  // Only blocks of steps that succeeded are reused.
  submit(make_request(3, prompt));
  results = run_all(*engine);
  EXPECT_EQ(results.at({3, 0}).num_cached, 48);
  EXPECT_EQ(results.at({3, 0}).tokens, expected);
  EXPECT_EQ(results.at({3, 0}).error, "");

  // A fault in a decode step of a whole batch (rows are gathered only where a prompt ends beside
  // it): all in it fail, the next ones do not.
  for (uint64_t id = 4; id < 8; ++id)
    submit(make_request(id, random_prompt(id, id == 7 && fault->op == "gather_rows" ? 96 : 10)));
  engine->step();
  engine->step();
  fault->countdown = 1;
  run_all(*engine);
  EXPECT_EQ(engine->stats().failed, 5u);
  EXPECT_TRUE(all_blocks_back(engine->stats()));
  submit(make_request(8, prompt));
  results = run_all(*engine);
  EXPECT_EQ(results.at({8, 0}).tokens, expected);
  EXPECT_TRUE(balanced(engine->stats()));
}

INSTANTIATE_TEST_SUITE_P(
    Ops, FailingStep,
    ::testing::Combine(::testing::Values("upload", "run_step", "embed", "linear", "rope_kv_write",
                                         "attention", "activation", "gather_rows", "sample",
                                         "download", "mark", "wait"),
                       ::testing::Values("error", "bad_alloc", "logic_error")),
    [](const auto& info) { return std::get<0>(info.param) + "_" + std::get<1>(info.param); });

// -- A reader is woken before a step on a card has ended ----------------------------------------

TEST(Announcement, IsOfStepsWithSamplesThatAreNotCaptured) {
  const auto waits_of = [](const EngineConfig& config) {
    int waits = 0;
    const std::unique_ptr<Engine> engine = make_engine(
        config,
        std::make_unique<HookedBackend>([&](std::string_view op) { waits += op == "wait"; }));
    engine->submit(make_request(1, random_prompt(1, 96), 3));
    EXPECT_EQ(run_all(*engine).at({1, 0}).tokens.size(), 3u);
    EXPECT_EQ(engine->stats().steps, 4u);
    return waits;
  };
  EngineConfig config = card_config();
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 48;
  EXPECT_EQ(waits_of(config), 1 + 2 + 2 + 2);  // half of a prompt, the other, two decodes
  config.graph_sizes = {1};
  EXPECT_EQ(waits_of(config), 1 + 2 + 1 + 1);
  config.device = "cpu";
  EXPECT_EQ(waits_of(config), 4);
}

TEST(Announcement, ComesBeforeTheStepEndsAndLosesNothing) {
  auto door = std::make_shared<Door>();
  std::atomic<int> waits{0};
  const std::unique_ptr<Engine> engine =
      make_engine(card_config(), std::make_unique<HookedBackend>([&, door](std::string_view op) {
                    if (op == "wait" && ++waits == 2) door->pass();
                  }));
  engine->start();
  engine->submit(make_request(1, random_prompt(1, 20), 2));
  door->wait_for_somebody();  // announced, and not there yet
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_TRUE(engine->wait_outputs(0.0).empty());
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::microseconds(900));  // awake
  for (const double timeout : {0.0, 2e-3, 5e-3}) EXPECT_TRUE(engine->wait_outputs(timeout).empty());
  door->open();
  EXPECT_EQ(wait_all(*engine, 1).at({1, 0}).tokens.size(), 2u);
}

TEST(Announcement, FailsLikeTheStep) {
  for (const int which : {1, 2}) {  // the forward pass, all of it
    auto fault = std::make_shared<Fault>();
    fault->op = "wait";
    const std::unique_ptr<Engine> engine = make_engine(
        card_config(),
        std::make_unique<HookedBackend>([fault](std::string_view op) { (*fault)(op); }));
    fault->countdown = which;
    engine->submit(make_request(1, random_prompt(1, 20), 2));
    const Got failed = run_all(*engine).at({1, 0});
    EXPECT_EQ(failed.reason, FinishReason::error);
    EXPECT_TRUE(contains(failed.error, "caught fire")) << failed.error;
    engine->submit(make_request(1, random_prompt(1, 20), 2));
    EXPECT_EQ(run_all(*engine).at({1, 0}).tokens.size(), 2u);
    EXPECT_EQ(engine->stats().failed_steps, 1u);
    EXPECT_TRUE(balanced(engine->stats()));
  }
}

// A device that is lost fails more than the step.
TEST(LostDevice, EndsEverythingAndRefusesNewWork) {
  for (const bool overlap : {false, true}) {
    for (const char* op : {"embed", "wait"}) {
      SCOPED_TRACE(concat(op, overlap ? ", overlap" : ""));
      HookedBackend* device = nullptr;
      auto fault = std::make_shared<Fault>();
      fault->op = op;
      auto backend = std::make_unique<HookedBackend>([&, fault](std::string_view name) {
        if (name == fault->op && fault->countdown == 1) device->lost = true;
        (*fault)(name);
      });
      device = backend.get();
      EngineConfig config = tiny_config();
      config.overlap = overlap;
      config.max_num_seqs = 2;
      const std::unique_ptr<Engine> engine = make_engine(config, std::move(backend));
      for (uint64_t id = 1; id <= 4; ++id) engine->submit(make_request(id, random_prompt(id, 20)));
      for (int i = 0; i < 3; ++i) EXPECT_TRUE(engine->step());
      fault->countdown = 1;
      EXPECT_TRUE(engine->step());
      EXPECT_FALSE(engine->step());
      Results results;
      take(engine->wait_outputs(0), results);
      ASSERT_EQ(results.size(), 4u);
      for (const auto& [key, got] : results) {
        EXPECT_EQ(got.reason, FinishReason::error);
        EXPECT_TRUE(contains(got.error, "caught fire")) << got.error;
        EXPECT_EQ(got.ends, 1);
      }
      const EngineStats stats = engine->stats();
      EXPECT_FALSE(stats.healthy);
      EXPECT_TRUE(balanced(stats));
      EXPECT_EQ(stats.failed, 4u);
      EXPECT_EQ(stats.steps, engine->trace(0).size());
      EXPECT_THROW(engine->submit(make_request(9, {1})), std::runtime_error);
    }
  }
}

// The lists that requests bring (biases here) may make a step's inputs grow. A failure there must
// leave the old memory in use.
TEST(FailingAllocation, InAStepLeavesTheEngineUsable) {
  auto fault = std::make_shared<Fault>();
  fault->op = "alloc";
  const std::unique_ptr<Engine> engine =
      make_engine(tiny_config(),
                  std::make_unique<HookedBackend>([fault](std::string_view op) { (*fault)(op); }));
  const auto submit_all = [&](uint64_t first_id) {
    for (uint64_t id = first_id; id < first_id + 64; ++id) {
      Request r = make_request(id, random_prompt(12, 3));
      for (int i = 0; i < 500; ++i) r.params.logit_bias.push_back({i % 131, 0.0f});
      engine->submit(r);
    }
  };
  fault->countdown = 1;
  submit_all(100);
  run_all(*engine);
  ASSERT_EQ(fault->countdown, 0) << "nothing was allocated";
  EXPECT_EQ(engine->stats().failed, 64u);
  submit_all(200);
  engine->submit(make_request(1, random_prompt(12, 100)));
  const Results results = run_all(*engine);
  EXPECT_EQ(results.at({1, 0}).tokens, argmax_tokens(random_prompt(12, 100), 8));
  EXPECT_EQ(results.at({263, 0}).tokens, argmax_tokens(random_prompt(12, 3), 8));
  EXPECT_EQ(engine->stats().failed, 64u);
}

TEST(FailingForks, EndEachOfThemOnce) {
  auto fault = std::make_shared<Fault>();
  fault->op = "attention";
  const std::unique_ptr<Engine> engine =
      make_engine(tiny_config(),
                  std::make_unique<HookedBackend>([fault](std::string_view op) { (*fault)(op); }));
  for (const int steps : {0, 1, 3}) {  // the prompt, the first own step with its copies, later
    Request r = make_request(static_cast<uint64_t>(steps) + 1, random_prompt(50, 21), 20);
    r.params.n = 3;
    r.params.temperature = 1.0f;
    engine->submit(r);
    for (int i = 0; i < steps; ++i) engine->step();
    fault->countdown = 1;
    const Results results = run_all(*engine);
    for (int c = 0; c < 3; ++c) {
      EXPECT_EQ(results.at({r.id, c}).reason, FinishReason::error);
      EXPECT_EQ(results.at({r.id, c}).ends, 1);
    }
    EXPECT_TRUE(all_blocks_back(engine->stats()));
  }
  EXPECT_EQ(engine->stats().failed, 3u);
  EXPECT_TRUE(balanced(engine->stats()));
}

TEST(FailingForks, APreemptedChoiceEndsWithItsRequest) {
  auto fault = std::make_shared<Fault>();
  fault->op = "attention";
  EngineConfig config = tiny_config();
  config.block_size = 4;
  config.num_blocks = 8;
  const std::unique_ptr<Engine> engine = make_engine(
      config, std::make_unique<HookedBackend>([fault](std::string_view op) { (*fault)(op); }));
  engine->submit(make_request(1, random_prompt(1, 8), 20));
  Request r = make_request(2, random_prompt(2, 4), 9);
  r.params.n = 2;
  r.params.temperature = 1.0f;
  engine->submit(r);
  while (engine->stats().preemptions == 0) ASSERT_TRUE(engine->step());
  ASSERT_EQ(engine->stats().waiting_seqs, 1);
  ASSERT_EQ(engine->stats().running_seqs, 2);
  fault->countdown = 1;
  const Results results = run_all(*engine);
  for (int c = 0; c < 2; ++c) {
    EXPECT_EQ(results.at({2, c}).reason, FinishReason::error);
    EXPECT_TRUE(contains(results.at({2, c}).error, "caught fire"));
    EXPECT_EQ(results.at({2, c}).ends, 1);
  }
  EXPECT_EQ(engine->stats().failed, 2u);
  EXPECT_EQ(engine->stats().steps, engine->trace(0).size());
  EXPECT_EQ(engine->stats().failed_steps, 1u);
  EXPECT_TRUE(all_blocks_back(engine->stats()));
}

// An error of our own bookkeeping: nothing can be trusted any more, but everybody is told. The
// scheduler is made to forget the step that is in flight.
void confuse(Engine& engine) {
  std::vector<SequenceUpdate> lost;
  engine.scheduler().fail(lost);
}

TEST(InternalError, EndsEverythingAndRefusesNewWork) {
  auto door = std::make_shared<Door>();
  std::atomic<Engine*> victim{nullptr};
  auto backend = std::make_unique<HookedBackend>([&, door](std::string_view op) {
    Engine* engine = victim;
    if (op != "sample" || engine == nullptr) return;
    door->pass();
    confuse(*engine);
  });
  EngineConfig config = tiny_config();
  config.max_num_seqs = 2;
  const std::unique_ptr<Engine> engine = make_engine(config, std::move(backend));
  engine->start();
  victim = engine.get();
  for (uint64_t id = 1; id <= 3; ++id) engine->submit(make_request(id, random_prompt(id, 20)));
  door->wait_for_somebody();
  engine->submit(make_request(4, random_prompt(4, 20)));  // still in the inbox when it happens
  engine->abort(3, -1, FinishReason::abort);
  door->open();
  const Results results = wait_all(*engine, 4);
  ASSERT_EQ(results.size(), 4u);
  for (const auto& [key, got] : results) {
    EXPECT_EQ(got.reason, FinishReason::error);
    EXPECT_TRUE(contains(got.error, "update without a step")) << got.error;
    EXPECT_EQ(got.ends, 1);
  }
  const EngineStats stats = engine->stats();
  EXPECT_FALSE(stats.healthy);
  EXPECT_TRUE(balanced(stats));
  EXPECT_EQ(stats.failed, 4u);
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_TRUE(contains(
      message_of<std::runtime_error>([&] { engine->submit(make_request(9, {1})); }), "has failed"));
  EXPECT_TRUE(balanced(engine->stats()));
  EXPECT_TRUE(engine->wait_outputs(0.01).empty());
  engine->shutdown();
  EXPECT_TRUE(engine->wait_outputs(-1).empty());
  EXPECT_TRUE(balanced(engine->stats()));
}

TEST(InternalError, SteppedByHandDoesTheSame) {
  Engine* victim = nullptr;
  const std::unique_ptr<Engine> engine =
      make_engine(tiny_config(), std::make_unique<HookedBackend>([&](std::string_view op) {
                    if (op == "sample" && victim != nullptr) confuse(*victim);
                  }));
  engine->submit(make_request(1, random_prompt(1, 20)));
  engine->step();
  victim = engine.get();
  EXPECT_TRUE(engine->step());
  victim = nullptr;
  EXPECT_FALSE(engine->step());
  Results results;
  take(engine->wait_outputs(0), results);
  EXPECT_EQ(results.at({1, 0}).tokens.size(), 1u);
  EXPECT_EQ(results.at({1, 0}).reason, FinishReason::error);
  EXPECT_FALSE(engine->stats().healthy);
}

// -- Overlap ----------------------------------------------------------------------------------

// Requests of all kinds, some of which end at tokens that nobody could foresee.
std::vector<Request> mixed_requests(uint64_t key, bool plain) {
  std::mt19937_64 random(key);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  std::vector<Request> out;
  for (uint64_t id = 1; id <= 40; ++id) {
    Request r = make_request(id, random_prompt(random() % 6, 1 + below(50)), 1 + below(40));
    r.params.temperature = below(3) == 0 ? 0.0f : 1.0f;
    r.params.seed = id;
    r.params.ignore_eos = below(3) == 0;
    r.params.min_tokens = below(2) == 0 ? std::min(r.params.max_tokens, below(6)) : 0;
    r.params.logprobs = below(3) - 1;
    if (below(3) == 0) r.params.stop_token_ids = {below(131), below(131), below(131)};
    if (below(4) == 0) r.params.bad_words = {{below(131)}};
    if (!plain) {
      r.params.n = below(4) == 0 ? 3 : 1;
      if (below(6) == 0) r.params.prompt_logprobs = 1;
      if (below(6) == 0) r.params.presence_penalty = 0.7f;
      if (below(6) == 0) r.params.bad_words.push_back({below(131), below(131)});
    }
    out.push_back(r);
  }
  return out;
}

EngineConfig overlap_config(bool overlap) {
  EngineConfig config = tiny_config();
  config.block_size = 4;
  config.num_blocks = 90;
  config.max_model_len = 100;
  config.max_num_seqs = 12;
  config.max_num_batched_tokens = 40;
  config.eos_token_ids = {0, 7, 9, 12, 33, 90};
  config.overlap = overlap;
  return config;
}

struct Outcome {
  Results results;
  EngineStats stats;
  int in_vain = 0;
  int ahead = 0;  // steps that were launched before the one before them was waited for
};

Outcome run_mixed(bool overlap, const EngineConfig& config, const std::vector<Request>& requests,
                  const std::function<void(Engine&, int step)>& disturb = nullptr) {
  Outcome run;
  int in_flight = 0;
  const std::unique_ptr<Engine> engine =
      make_engine(config, std::make_unique<HookedBackend>([&](std::string_view op) {
                    if (op == "mark") run.ahead += ++in_flight == 2;
                    if (op == "wait") --in_flight;
                  }));
  EXPECT_EQ(config.overlap, overlap);
  size_t next = 0;
  run.results = run_all(*engine, [&](int step) {
    for (int i = 0; i < 2 && next < requests.size(); ++i) engine->submit(requests[next++]);
    if (disturb) disturb(*engine, step);
  });
  run.stats = engine->stats();
  for (const StepRecord& r : engine->trace(0))
    for (const StepRecord::Entry& e : r.entries) run.in_vain += e.in_vain;
  EXPECT_TRUE(run.stats.healthy);
  EXPECT_TRUE(balanced(run.stats));
  EXPECT_TRUE(all_blocks_back(run.stats));
  EXPECT_EQ(run.stats.steps, engine->trace(0).size());
  return run;
}

void expect_equal(const Results& a, const Results& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [key, got] : a) {
    SCOPED_TRACE(concat("request ", key.first, ", choice ", key.second));
    const Got& other = b.at(key);
    EXPECT_EQ(got.tokens, other.tokens);
    EXPECT_TRUE(got.logprobs == other.logprobs);
    EXPECT_TRUE(got.prompt_logprobs == other.prompt_logprobs);
    EXPECT_EQ(got.reason, other.reason);
    EXPECT_EQ(got.stop_token, other.stop_token);
    EXPECT_EQ(other.ends, 1);
    EXPECT_EQ(other.error, "");
  }
}

TEST(Overlap, GivesTheSameBytes) {
  for (const bool plain : {true, false}) {
    for (const bool tight : {false, true}) {
      for (const bool cached : {true, false}) {
        SCOPED_TRACE(concat("plain ", plain, ", tight ", tight, ", cached ", cached));
        EngineConfig config = overlap_config(false);
        config.enable_prefix_caching = cached;
        config.num_blocks = tight ? 40 : 400;
        // With other keys the last requests, which alone can be ahead, may take three steps.
        const std::vector<Request> requests = mixed_requests(20 + plain + 2 * tight, plain);
        const Outcome expected = run_mixed(false, config, requests);
        config.overlap = true;
        const Outcome run = run_mixed(true, config, requests);
        expect_equal(expected.results, run.results);
        EXPECT_EQ(expected.ahead, 0);
        EXPECT_EQ(expected.in_vain, 0);
        EXPECT_GT(run.ahead, plain ? 50 : 3);
        EXPECT_GT(run.in_vain, plain ? 5 : -1);
        EXPECT_EQ(run.stats.generated_tokens, expected.stats.generated_tokens);
        EXPECT_EQ(run.stats.finished, 40u);
        if (tight) {
          EXPECT_GT(run.stats.preemptions, 0u);
        }
        if (cached) {
          EXPECT_GT(run.stats.cached_tokens, 0u);
        }
      }
    }
  }
}

TEST(Overlap, GivesTheSameBytesInStaticBatches) {
  EngineConfig config = overlap_config(false);
  config.static_batching = true;
  const std::vector<Request> requests = mixed_requests(8, true);
  const Outcome expected = run_mixed(false, config, requests);
  config.overlap = true;
  const Outcome run = run_mixed(true, config, requests);
  expect_equal(expected.results, run.results);
  EXPECT_GT(run.ahead, 50);
}

// Whatever is aborted at whatever time: the others get their bytes, and every block comes back.
TEST(Overlap, AbortsInEveryPhase) {
  const std::vector<Request> requests = mixed_requests(11, false);
  const Outcome expected = run_mixed(false, overlap_config(false), requests);
  for (uint64_t key = 1; key <= 8; ++key) {
    SCOPED_TRACE(key);
    std::mt19937_64 random(key);
    std::set<uint64_t> disturbed;
    const Outcome run =
        run_mixed(true, overlap_config(true), requests, [&](Engine& engine, int step) {
          if (step % 2 == 1) return;
          const uint64_t id = 1 + random() % 40;
          engine.abort(id, static_cast<int>(random() % 4) - 1, FinishReason::abort);
          disturbed.insert(id);
        });
    for (const auto& [key_, got] : expected.results) {
      const Got& other = run.results.at(key_);
      EXPECT_EQ(other.ends, 1);
      if (other.reason == FinishReason::abort) {
        EXPECT_TRUE(disturbed.contains(key_.first));
        ASSERT_LE(other.tokens.size(), got.tokens.size());
        EXPECT_TRUE(std::equal(other.tokens.begin(), other.tokens.end(), got.tokens.begin()));
      } else {
        EXPECT_EQ(other.tokens, got.tokens);
        EXPECT_EQ(other.reason, got.reason);
      }
    }
    EXPECT_GT(run.stats.aborted, 3u);
  }
}

// Rows that score a prompt lie before a neighbour's sample, also when their request is gone.
TEST(Overlap, AnAbortedScoredPromptLeavesItsNeighbourAlone) {
  const auto run = [](bool overlap, bool abort) {
    const auto engine = make_engine(overlap_config(overlap));
    Request scored = make_request(1, random_prompt(5, 20), 8);
    scored.params.prompt_logprobs = 1;
    engine->submit(scored);
    engine->submit(make_request(2, random_prompt(6, 12), 30));
    engine->step();
    if (abort) engine->abort(1, -1, FinishReason::abort);
    const Results results = run_all(*engine);
    return results.at({2, 0}).tokens;
  };
  const std::vector<int32_t> expected = run(false, false);
  ASSERT_EQ(expected.size(), 30u);
  EXPECT_EQ(run(true, false), expected);
  EXPECT_EQ(run(true, true), expected);
}

// Blocks are free at the beginning of the turn that finds the abort.
TEST(Overlap, BlocksOfAnAbortAreFreeAfterTheNextStep) {
  for (const int when : {0, 1, 2, 5, 9}) {
    SCOPED_TRACE(when);
    EngineConfig config = tiny_config();
    config.max_num_batched_tokens = 64;
    config.overlap = true;
    const std::unique_ptr<Engine> engine = make_engine(config);
    engine->submit(make_request(1, random_prompt(8, 100), 50));
    for (int i = 0; i < when; ++i) engine->step();
    engine->abort(1, -1, FinishReason::abort);
    engine->step();
    EXPECT_TRUE(all_blocks_back(engine->stats()));
    Results results;
    take(engine->wait_outputs(0), results);
    EXPECT_EQ(results.at({1, 0}).reason, FinishReason::abort);
    EXPECT_EQ(results.at({1, 0}).ends, 1);
    EXPECT_FALSE(engine->step());
    EXPECT_TRUE(balanced(engine->stats()));
  }
}

// Prompt log-probabilities of a step in flight are nobody's any more.
TEST(Overlap, NothingComesAfterTheEnd) {
  EngineConfig config = tiny_config();
  config.overlap = true;
  const std::unique_ptr<Engine> engine = make_engine(config);
  Request r = make_request(1, random_prompt(8, 60), 50);
  r.params.prompt_logprobs = 1;
  engine->submit(r);
  EXPECT_TRUE(engine->step());
  engine->abort(1, -1, FinishReason::abort);
  EXPECT_TRUE(engine->step());
  const std::vector<Output> outputs = engine->wait_outputs(0);
  ASSERT_EQ(outputs.size(), 1u);
  EXPECT_EQ(outputs[0].finish_reason, FinishReason::abort);
  EXPECT_TRUE(outputs[0].prompt_logprobs.empty());
  EXPECT_FALSE(engine->step());
}

// A step that cannot be launched fails alone; one whose results do not come takes the one behind it
// along.
TEST(Overlap, FailingStepsFailTheirRequestsOnly) {
  const std::vector<int32_t> prompt = random_prompt(12, 60);
  const std::vector<int32_t> expected = argmax_tokens(prompt, 8);
  for (const char* op : {"upload", "embed", "attention", "sample", "download", "mark", "wait"}) {
    SCOPED_TRACE(op);
    auto fault = std::make_shared<Fault>();
    fault->op = op;
    EngineConfig config = tiny_config();
    config.max_num_seqs = 3;
    config.overlap = true;
    const std::unique_ptr<Engine> engine = make_engine(
        config,
        std::make_unique<HookedBackend>([fault](std::string_view name) { (*fault)(name); }));
    for (uint64_t id = 1; id <= 4; ++id) {
      Request request =
          id == 4 ? make_request(4, prompt) : make_request(id, random_prompt(id, 30), 20);
      if (fault->op == "download") request.params.logprobs = 0;  // tokens come without one
      engine->submit(request);
    }
    for (int i = 0; i < 4; ++i) engine->step();
    fault->countdown = 1;
    const Results results = run_all(*engine);
    ASSERT_EQ(fault->countdown, 0) << "no such call";
    for (uint64_t id = 1; id <= 3; ++id) {
      EXPECT_EQ(results.at({id, 0}).reason, FinishReason::error);
      EXPECT_TRUE(contains(results.at({id, 0}).error, "caught fire"));
      EXPECT_EQ(results.at({id, 0}).ends, 1);
    }
    EXPECT_EQ(results.at({4, 0}).tokens, expected);
    EXPECT_EQ(engine->stats().failed_steps, std::string(op) == "wait" ? 2u : 1u);
    EXPECT_EQ(engine->stats().steps, engine->trace(0).size());
    EXPECT_EQ(engine->stats().failed, 3u);
    EXPECT_TRUE(engine->stats().healthy);
    EXPECT_TRUE(balanced(engine->stats()));
    EXPECT_TRUE(all_blocks_back(engine->stats()));
    engine->submit(make_request(5, prompt));
    EXPECT_EQ(run_all(*engine).at({5, 0}).tokens, expected);
  }
}

TEST(Overlap, LogitsAndResetWaitForWhatIsInFlight) {
  EngineConfig config = tiny_config();
  config.overlap = true;
  const std::unique_ptr<Engine> engine = make_engine(config);
  engine->submit(make_request(1, random_prompt(1, 40), 3));
  engine->step();
  const std::vector<int32_t> prompt = random_prompt(2, 20);
  EXPECT_EQ(engine->logits(prompt), make_engine()->logits(prompt));
  Results results;
  take(engine->wait_outputs(0), results);
  EXPECT_EQ(results.at({1, 0}).tokens.size(), 1u);
  engine->step();
  engine->abort(1, -1, FinishReason::abort);
  engine->step();
  EXPECT_TRUE(engine->reset_prefix_cache());
  EXPECT_FALSE(engine->step());
  EXPECT_TRUE(balanced(engine->stats()));
}

// -- The size of the cache --------------------------------------------------------------------

// A device of a fixed size of which only this engine takes anything.
class SmallDevice : public HookedBackend {
 public:
  explicit SmallDevice(size_t total) : HookedBackend(nullptr), info_(HookedBackend::info()) {
    info_.memory_total = total;
  }
  const BackendInfo& info() const override { return info_; }
  size_t memory_available() const override {
    asked_at = allocated;
    return info_.memory_total - allocated;
  }
  mutable size_t asked_at = 0;  // bytes that were allocated

 private:
  BackendInfo info_;
};

TEST(CacheSize, FollowsFromTheMemoryThatIsLeft) {
  EngineConfig config = tiny_config();
  config.num_blocks = 0;
  config.memory_fraction = 0.8;
  const size_t block =
      ModelRunner::plan_memory(*cpu_backend(), tiny_model(), Engine::runner_config(config))
          .kv_block;
  auto backend = std::make_unique<SmallDevice>(6 << 20);
  const SmallDevice* device = backend.get();
  auto engine = std::make_unique<Engine>(config, tiny_model(), std::move(backend));
  EXPECT_THROW(engine->submit(make_request(1, {1})), std::invalid_argument);  // too early
  EXPECT_EQ(engine->num_blocks(), 0);
  load_random(*engine);
  const double budget = 0.8 * (6 << 20) - static_cast<double>(device->asked_at);
  const int expected = static_cast<int>(budget / static_cast<double>(block));
  ASSERT_GT(expected, 16);       // 256 tokens
  ASSERT_LT(expected, 16 * 64);  // nor is it the most that can be of use
  EXPECT_EQ(engine->num_blocks(), expected);
  EXPECT_EQ(engine->stats().blocks.num_blocks, expected);
  EXPECT_EQ(engine->stats().blocks.num_free, expected);
  engine->submit(make_request(1, random_prompt(3, 37), 12));
  EXPECT_EQ(run_all(*engine).at({1, 0}).tokens, argmax_tokens(random_prompt(3, 37), 12));
}

TEST(CacheSize, IsNeverMoreThanIsOfUseNorLessThanOneSequence) {
  EngineConfig config = tiny_config();
  config.num_blocks = 0;
  config.memory_fraction = 0.5;
  const auto make = [&](size_t total) {
    auto engine =
        std::make_unique<Engine>(config, tiny_model(), std::make_unique<SmallDevice>(total));
    load_random(*engine);
    return engine;
  };
  EXPECT_EQ(make(size_t{1} << 30)->num_blocks(), 16 * 64);
  config.paged = false;
  EXPECT_EQ(make(size_t{1} << 30)->num_blocks(), 64);
  config.paged = true;
  const std::string message = message_of<std::runtime_error>([&] { make(2 << 20); });
  EXPECT_TRUE(contains(message, "GB are free")) << message;
  EXPECT_TRUE(contains(message, "max_model_len (256 tokens)")) << message;
  EXPECT_TRUE(contains(message, "lower max_model_len to 80 or")) << message;
  EXPECT_TRUE(contains(message, "raise gpu_memory_utilization (0.5)")) << message;
  config.max_model_len = 80;
  EXPECT_GE(make(2 << 20)->num_blocks(), 5);
  config.memory_fraction = 1.5;
  EXPECT_THROW(make(1 << 30), std::invalid_argument);
}

TEST(Config, FlowsIntoTheBackendsOptions) {
  EngineConfig config;
  config.device_index = 3;
  config.dtype = DType::f16;
  config.batch_invariant = false;
  config.plan_cache = "/tmp/plans";
  BackendOptions options = Engine::backend_options(config);
  EXPECT_EQ(options.device_index, 3);
  EXPECT_EQ(options.activation_dtype, DType::f16);
  EXPECT_FALSE(options.batch_invariant);
  EXPECT_EQ(options.plan_cache, "/tmp/plans");
  EXPECT_FALSE(options.enable_graphs);
  config.graph_sizes = {1, 2};
  EXPECT_TRUE(Engine::backend_options(config).enable_graphs);
  config = tiny_config();
  config.graph_sizes = {65};
  EXPECT_TRUE(contains(message_of<std::invalid_argument>([&] { make_engine(config); }),
                       "graph_sizes must be in [1, 64]"));
  config = tiny_config();
  config.kv_cache_dtype = DType::fp8_e4m3;
  EXPECT_TRUE(contains(message_of<std::invalid_argument>([&] { make_engine(config); }), "fp8"));
  config = tiny_config();
  config.max_num_seqs = 256;
  config.max_num_batched_tokens = 512;
  class NarrowBackend : public HookedBackend {
   public:
    NarrowBackend() : HookedBackend(nullptr), info_(HookedBackend::info()) {
      info_.tiling = {.kv_chunk = 16, .q_tile = 8, .decode_rows = 4, .max_items = 100};
    }
    const BackendInfo& info() const override { return info_; }

   private:
    BackendInfo info_;
  };
  EXPECT_TRUE(contains(message_of<std::invalid_argument>([&] {
                         const Engine engine(config, tiny_model(),
                                             std::make_unique<NarrowBackend>());
                       }),
                       "it can be at most 100"));
}

// -- Shutdown ---------------------------------------------------------------------------------

TEST(Shutdown, EndsWaitingAndRunningRequests) {
  for (const int kind : {0, 1, 2, 3}) {
    SCOPED_TRACE(kind);
    const bool threaded = kind % 2 == 1;
    EngineConfig config = tiny_config();
    config.max_num_seqs = 2;
    config.overlap = kind / 2 == 1;
    const std::unique_ptr<Engine> engine = make_engine(config);
    if (threaded) engine->start();
    for (uint64_t id = 1; id <= 5; ++id)
      engine->submit(make_request(id, random_prompt(id, 20), 200));
    if (!threaded) engine->step();
    engine->shutdown();
    engine->shutdown();
    const Results results = wait_all(*engine, 5);
    ASSERT_EQ(results.size(), 5u);
    for (const auto& [key, got] : results) {
      EXPECT_EQ(got.reason, FinishReason::abort);
      EXPECT_EQ(got.ends, 1);
    }
    EXPECT_TRUE(engine->wait_outputs(-1).empty());
    EXPECT_TRUE(balanced(engine->stats()));
    EXPECT_EQ(engine->stats().aborted, 5u);
    EXPECT_TRUE(all_blocks_back(engine->stats()));
    EXPECT_TRUE(
        contains(message_of<std::runtime_error>([&] { engine->submit(make_request(9, {1})); }),
                 "shut down"));
    EXPECT_THROW(engine->start(), std::invalid_argument);
    engine->abort(1, -1, FinishReason::abort);
    EXPECT_TRUE(balanced(engine->stats()));
  }
}

TEST(Shutdown, WakesWhoeverWaits) {
  const std::unique_ptr<Engine> engine = make_engine();
  engine->start();
  std::atomic<int> woken{0};
  std::vector<std::thread> waiters;
  for (int i = 0; i < 3; ++i)
    waiters.emplace_back([&] {
      EXPECT_TRUE(engine->wait_outputs(-1).empty());
      ++woken;
    });
  std::vector<std::thread> closers;
  for (int i = 0; i < 3; ++i) closers.emplace_back([&] { engine->shutdown(); });
  for (std::thread& t : closers) t.join();
  for (std::thread& t : waiters) t.join();
  EXPECT_EQ(woken, 3);
}

TEST(Shutdown, TheDestructorDoesItToo) {
  std::unique_ptr<Engine> engine = make_engine();
  engine->start();
  for (uint64_t id = 1; id <= 5; ++id) engine->submit(make_request(id, random_prompt(id, 20), 200));
  engine.reset();
  EngineConfig config = tiny_config();
  engine = std::make_unique<Engine>(config, tiny_model());  // never loaded, never started
  EXPECT_THROW(engine->start(), std::invalid_argument);
  EXPECT_THROW(engine->step(), std::invalid_argument);
  engine.reset();
}

TEST(Lifecycle, MisuseIsRefused) {
  const std::unique_ptr<Engine> engine = make_engine();
  engine->start();
  EXPECT_THROW(engine->start(), std::invalid_argument);
  EXPECT_THROW(engine->step(), std::invalid_argument);
  EXPECT_THROW(engine->logits({1}), std::invalid_argument);
  EXPECT_THROW(engine->reset_prefix_cache(), std::invalid_argument);
  EngineConfig config = tiny_config();
  config.num_blocks = 0;
  EXPECT_THROW(Engine(config, tiny_model()), std::invalid_argument);
  config = tiny_config();
  config.trace_capacity = -1;
  EXPECT_THROW(Engine(config, tiny_model()), std::invalid_argument);
  config = tiny_config();
  config.max_num_seqs = 0;
  EXPECT_THROW(Engine(config, tiny_model()), std::invalid_argument);
  config = tiny_config();
  config.max_num_batched_tokens = 63;
  EXPECT_THROW(Engine(config, tiny_model()), std::invalid_argument);
  config = tiny_config();
  config.block_size = 12;
  EXPECT_THROW(Engine(config, tiny_model()), std::invalid_argument);
}

TEST(Lifecycle, WaitsForALongTimeoutWithoutOverflow) {
  const std::unique_ptr<Engine> engine = make_engine();
  engine->start();
  std::atomic<bool> back{false};
  std::thread waiter([&] {
    const std::vector<Output> outputs = engine->wait_outputs(1e300);
    back = true;
    EXPECT_FALSE(outputs.empty());
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(back);
  engine->submit(make_request(1, {1, 2, 3}));
  waiter.join();
}

TEST(PrefixCache, CanBeResetWhenIdle) {
  const std::unique_ptr<Engine> engine = make_engine();
  engine->submit(make_request(1, random_prompt(1, 40)));
  engine->step();
  EXPECT_FALSE(engine->reset_prefix_cache());
  run_all(*engine);
  EXPECT_GT(engine->stats().blocks.num_cached, 0);
  EXPECT_TRUE(engine->reset_prefix_cache());
  EXPECT_EQ(engine->stats().blocks.num_cached, 0);
  engine->submit(make_request(1, random_prompt(1, 40)));
  EXPECT_EQ(run_all(*engine).at({1, 0}).num_cached, 0);
}

// A prefix that was cached under one salt is not seen under another.
TEST(PrefixCache, SaltsSeparateRequests) {
  const std::unique_ptr<Engine> engine = make_engine();
  int cached[4];
  const char* salts[] = {"a", "b", "a", ""};
  for (int i = 0; i < 4; ++i) {
    Request r = make_request(1, random_prompt(1, 40));
    r.cache_salt = salts[i];
    engine->submit(r);
    cached[i] = run_all(*engine).at({1, 0}).num_cached;
  }
  EXPECT_EQ(cached[0], 0);
  EXPECT_EQ(cached[1], 0);
  EXPECT_EQ(cached[2], 32);
  EXPECT_EQ(cached[3], 0);
}

// -- Promise 7: what health is made of --------------------------------------------------------

TEST(Stuck, TheEngineStillAnswersAndShowsThatNoStepFinishes) {
  auto door = std::make_shared<Door>();
  std::atomic<bool> armed{false};
  auto backend = std::make_unique<HookedBackend>([&, door](std::string_view op) {
    if (op == "linear" && armed) door->pass();
  });
  EngineConfig config = tiny_config();
  config.max_waiting = 3;
  const std::unique_ptr<Engine> engine = make_engine(config, std::move(backend));
  engine->start();
  engine->submit(make_request(1, random_prompt(1, 20)));
  wait_all(*engine, 1);
  const EngineStats idle = engine->stats();
  EXPECT_GT(idle.last_step_time, 0.0);
  armed = true;
  engine->submit(make_request(2, random_prompt(2, 20)));
  door->wait_for_somebody();
  engine->submit(make_request(3, random_prompt(3, 20)));
  engine->submit(make_request(4, random_prompt(4, 20)));
  engine->abort(2, -1, FinishReason::abort);
  engine->validate(make_request(5, {1}));
  EXPECT_THROW(engine->submit(make_request(5, random_prompt(5, 20))), QueueFull);
  EXPECT_TRUE(engine->wait_outputs(0.01).empty());
  EXPECT_FALSE(engine->trace(0).empty());
  const EngineStats stuck = engine->stats();
  EXPECT_GT(stuck.running + stuck.waiting, 0);  // work is pending
  EXPECT_EQ(stuck.steps, idle.steps);           // and no step finishes
  EXPECT_EQ(stuck.last_step_time, idle.last_step_time);
  EXPECT_GE(stuck.busy_since, idle.last_step_time);  // since this moment
  EXPECT_TRUE(stuck.healthy);
  EXPECT_TRUE(balanced(stuck));
  door->open();
  const Results results = wait_all(*engine, 3);
  EXPECT_EQ(results.at({2, 0}).reason, FinishReason::abort);
  EXPECT_EQ(results.at({3, 0}).tokens.size(), 8u);
  EXPECT_EQ(results.at({4, 0}).tokens.size(), 8u);
  EXPECT_GT(engine->stats().last_step_time, stuck.busy_since);
}

// -- Many threads, and promise 11 -------------------------------------------------------------

TEST(Threads, ManySubmitAtOnceAndEachGetsItsOwnTokens) {
  EngineConfig config = tiny_config();
  config.max_num_seqs = 8;
  config.num_threads = 2;
  const std::unique_ptr<Engine> engine = make_engine(config);
  engine->start();
  constexpr int kThreads = 6, kEach = 8;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        const auto id = static_cast<uint64_t>(t * kEach + i + 1);
        engine->submit(make_request(id, random_prompt(id % 4, 30), 6));
      }
    });
  const Results results = wait_all(*engine, kThreads * kEach);
  for (std::thread& t : threads) t.join();
  ASSERT_EQ(results.size(), static_cast<size_t>(kThreads * kEach));
  for (const auto& [key, got] : results) {
    EXPECT_EQ(got.ends, 1);
    EXPECT_EQ(got.tokens, results.at({key.first % 4 == 0 ? 4 : key.first % 4, 0}).tokens);
  }
}

// Random arrivals, aborts and choices over a tiny cache, while another thread looks at the counters
// all the time. A broken invariant would make the engine unhealthy.
TEST(Chaos, CountersBalanceAtAllTimes) {
  for (const int kind : {0, 1, 2, 3}) {
    SCOPED_TRACE(kind);
    EngineConfig config = tiny_config();
    config.policy = kind % 2 == 0 ? SchedulingPolicy::fcfs : SchedulingPolicy::priority;
    config.overlap = kind / 2 == 1;
    config.num_blocks = 40;
    config.block_size = 4;
    config.max_model_len = 80;
    config.max_num_seqs = 6;
    config.max_num_batched_tokens = 24;
    config.max_waiting = 12;
    config.trace_capacity = 16;
    const std::unique_ptr<Engine> engine = make_engine(config);
    engine->start();

    constexpr int kClients = 3, kEach = 120;
    std::atomic<int> clients{kClients};
    std::atomic<uint64_t> accepted{0}, refused{0};
    std::vector<std::thread> threads;
    for (int client = 0; client < kClients; ++client)
      threads.emplace_back([&, client] {
        std::mt19937_64 random(static_cast<uint64_t>(client) + 1);
        const auto below = [&](int n) {
          return static_cast<int>(random() % static_cast<uint64_t>(n));
        };
        for (int i = 0; i < kEach; ++i) {
          const auto id = static_cast<uint64_t>(client * kEach + i);
          Request r = make_request(id, random_prompt(random() % 5, 1 + below(60)), 1 + below(30));
          r.params.n = 1 + below(3);
          r.params.temperature = 1.0f;
          r.params.prompt_logprobs = below(4) == 0 ? 1 : -1;
          r.priority = below(3);
          try {
            engine->submit(r);
            ++accepted;
          } catch (const std::exception&) {  // full, or it can never fit
            ++refused;
          }
          if (below(3) == 0) {  // half of the time what cannot have ended yet, however slow we are
            const int which = below(2) == 0 ? i : below(i + 1);
            engine->abort(static_cast<uint64_t>(client * kEach + which), below(4) - 1,
                          FinishReason::abort);
          }
          if (below(4) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
        --clients;
      });
    std::atomic<bool> stop{false};
    std::thread watcher([&] {
      uint64_t looks = 0, wrong = 0;
      while (!stop) {
        const EngineStats s = engine->stats();
        wrong += !balanced(s) || s.waiting < 0 || s.running < 0 ||
                 s.blocks.num_free + s.blocks.num_cached + s.blocks.num_used != 40 ||
                 engine->trace(0).size() > 16;
        ++looks;
        std::this_thread::yield();
      }
      EXPECT_GT(looks, 0u);
      EXPECT_EQ(wrong, 0u);
    });
    uint64_t done = 0;
    std::map<std::pair<uint64_t, int>, int> ends;
    while (clients > 0 || done < accepted) {
      for (const Output& o : engine->wait_outputs(0.05)) {
        if (o.finish_reason != FinishReason::none) ++ends[{o.request_id, o.choice}];
        EXPECT_NE(o.finish_reason, FinishReason::error) << o.error;
        done += o.request_done;
      }
    }
    for (std::thread& t : threads) t.join();
    stop = true;
    watcher.join();
    for (const auto& [key, count] : ends) EXPECT_EQ(count, 1);
    const EngineStats s = engine->stats();
    EXPECT_TRUE(s.healthy);
    EXPECT_EQ(done, accepted);
    EXPECT_EQ(s.rejected, refused);
    EXPECT_EQ(s.received, static_cast<uint64_t>(kClients * kEach));
    EXPECT_EQ(s.finished + s.aborted, accepted);
    EXPECT_GT(s.finished, 0u);
    EXPECT_GT(s.aborted, 0u);
    EXPECT_GT(s.preemptions, 0u);
    EXPECT_TRUE(all_blocks_back(s));
    engine->shutdown();
  }
}

}  // namespace
}  // namespace ni
