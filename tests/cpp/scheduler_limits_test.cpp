// What fits into a schedule, what is refused, and where a request stops.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "scheduler_helpers.h"

namespace ni::test {
namespace {

// -- What fits --------------------------------------------------------------------------------

// The clamp against a count by simulation: with it the request runs alone without preemption, and
// one token more would need more blocks than there are.
TEST(Scheduler, ClampIsExact) {
  std::mt19937 random(11);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  int clamped = 0;
  for (int trial = 0; trial < 300; ++trial) {
    Options o;
    o.block_size = pick(1, 6);
    o.num_blocks = pick(2, 24);
    o.config.max_num_batched_tokens = pick(8, 64);
    Harness h(o);
    auto r = h.request(pick(1, o.block_size * o.num_blocks), -1);
    r->params.n = pick(1, 5);
    const int n = r->params.n, prompt = static_cast<int>(r->prompt.size());
    const int most = h.scheduler.clamp_max_tokens(*r);
    ASSERT_GE(most, 1);
    ASSERT_NO_THROW(h.add(r));
    h.run();
    EXPECT_EQ(h.scheduler.stats().preemptions, 0u);
    EXPECT_EQ(h.outputs[Choice(r->id, n - 1)].size(), static_cast<size_t>(most));
    h.expect_all_as_alone();

    // The slots of most + 1 tokens, counted one by one: block i of choice k is shared if full of
    // prompt.
    std::set<std::pair<int, int>> used;
    for (int k = 0; k < n; ++k)
      for (int slot = 0; slot < prompt + most; ++slot) {
        const int block = slot / o.block_size;
        used.insert({(block + 1) * o.block_size <= prompt ? 0 : k, block});
      }
    EXPECT_TRUE(used.size() > static_cast<size_t>(o.num_blocks) || prompt + most == 200)
        << "it could have been longer";
    r->params.max_tokens = most + 1;
    if (prompt + most < o.config.max_model_len) {
      EXPECT_THROW(h.scheduler.validate(*r), std::invalid_argument);
      ++clamped;
    }
    r->params.max_tokens = most;
    EXPECT_NO_THROW(h.scheduler.validate(*r));
  }
  EXPECT_GT(clamped, 200);
}

TEST(Scheduler, MaxModelLenEndsWithLength) {
  Options o;
  o.config.max_model_len = 20;
  Harness h(o);
  const uint64_t id = h.add(15, 100);
  h.run();
  EXPECT_EQ(h.outputs[Choice(id, 0)].size(), 5u);
  EXPECT_EQ(h.ends.at({id, 0}).finish_reason, FinishReason::length);
}

TEST(Scheduler, ValidateNamesTheCulprit) {
  Options o;
  o.num_blocks = 10;  // 40 tokens
  o.config.max_model_len = 100;
  Harness h(o);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  using Change = std::function<void(Request&)>;
  const std::pair<Change, const char*> table[] = {
      {[](Request& r) { r.prompt.clear(); }, "the prompt is empty; it needs at least one token"},
      {[](Request& r) { r.prompt.assign(100, 1); },
       "the prompt has 100 tokens, but with max_model_len 100 it can have at most 99"},
      {[](Request& r) { r.prompt.assign(41, 1); },
       "the prompt has 41 tokens, but the cache holds only 40"},
      {[](Request& r) {
         r.prompt.assign(41, 1);
         r.params.max_tokens = -1;
       },
       "the prompt has 41 tokens, but the cache holds only 40"},
      {[](Request& r) { r.prompt = {1, 50}; },
       "prompt[1] is 50, but the vocabulary has 50 tokens (ids 0 to 49)"},
      {[](Request& r) { r.prompt = {-1}; },
       "prompt[0] is -1, but the vocabulary has 50 tokens (ids 0 to 49)"},
      {[](Request& r) { r.params.max_tokens = 38; },
       "a prompt of 4 tokens with n 1 and max_tokens 38 can never fit into the cache, which holds "
       "40 tokens; max_tokens can be at most 37"},
      {[](Request& r) {
         r.params.max_tokens = 18;
         r.params.n = 3;
       },
       "a prompt of 4 tokens with n 3 and max_tokens 18 can never fit into the cache, which holds "
       "40 tokens; max_tokens can be at most 13"},
      {[](Request& r) { r.params.n = 0; }, "n must be in [1, 8] (max_num_seqs), got 0"},
      {[](Request& r) { r.params.n = 9; }, "n must be in [1, 8] (max_num_seqs), got 9"},
      {[](Request& r) { r.params.temperature = -0.5f; },
       "temperature must be a finite number >= 0, got -0.5"},
      {[&](Request& r) { r.params.temperature = nan; },
       "temperature must be a finite number >= 0, got nan"},
      {[&](Request& r) { r.params.temperature = inf; },
       "temperature must be a finite number >= 0, got inf"},
      {[](Request& r) { r.params.top_p = 0; }, "top_p must be in (0, 1], got 0"},
      {[](Request& r) { r.params.top_p = 1.5f; }, "top_p must be in (0, 1], got 1.5"},
      {[&](Request& r) { r.params.top_p = nan; }, "top_p must be in (0, 1], got nan"},
      {[](Request& r) { r.params.top_k = -2; },
       "top_k must be at least 1, or 0 or -1 for off, got -2"},
      {[](Request& r) { r.params.min_p = -0.5f; }, "min_p must be in [0, 1], got -0.5"},
      {[](Request& r) { r.params.min_p = 1.5f; }, "min_p must be in [0, 1], got 1.5"},
      {[&](Request& r) { r.params.min_p = nan; }, "min_p must be in [0, 1], got nan"},
      {[](Request& r) { r.params.repetition_penalty = 0; },
       "repetition_penalty must be a finite number > 0, got 0"},
      {[&](Request& r) { r.params.repetition_penalty = nan; },
       "repetition_penalty must be a finite number > 0, got nan"},
      {[&](Request& r) { r.params.repetition_penalty = inf; },
       "repetition_penalty must be a finite number > 0, got inf"},
      {[](Request& r) { r.params.presence_penalty = 2.5f; },
       "presence_penalty must be in [-2, 2], got 2.5"},
      {[&](Request& r) { r.params.presence_penalty = nan; },
       "presence_penalty must be in [-2, 2], got nan"},
      {[](Request& r) { r.params.frequency_penalty = -2.5f; },
       "frequency_penalty must be in [-2, 2], got -2.5"},
      {[&](Request& r) { r.params.frequency_penalty = nan; },
       "frequency_penalty must be in [-2, 2], got nan"},
      {[](Request& r) { r.params.max_tokens = 0; },
       "max_tokens must be at least 1, or -1 for as many as fit, got 0"},
      {[](Request& r) { r.params.max_tokens = -2; },
       "max_tokens must be at least 1, or -1 for as many as fit, got -2"},
      {[](Request& r) { r.params.min_tokens = -1; }, "min_tokens must be at least 0, got -1"},
      {[](Request& r) { r.params.min_tokens = 6; },
       "min_tokens must be at most 5 (max_tokens), got 6"},
      {[](Request& r) { r.params.logprobs = 21; },
       "logprobs must be in [-1, 20] (max_logprobs), got 21"},
      {[](Request& r) { r.params.logprobs = -2; },
       "logprobs must be in [-1, 20] (max_logprobs), got -2"},
      {[](Request& r) { r.params.prompt_logprobs = 21; },
       "prompt_logprobs must be in [-1, 20] (max_logprobs), got 21"},
      {[](Request& r) { r.params.stop_token_ids = {3, 50}; },
       "stop_token_ids[1] is 50, but the vocabulary has 50 tokens (ids 0 to 49)"},
      {[](Request& r) { r.params.allowed_token_ids = {-1}; },
       "allowed_token_ids[0] is -1, but the vocabulary has 50 tokens (ids 0 to 49)"},
      {[](Request& r) { r.params.bad_words = {{1}, {}}; }, "bad_words[1] must not be empty"},
      {[](Request& r) { r.params.bad_words = {{1, 77}}; },
       "bad_words[0][1] is 77, but the vocabulary has 50 tokens (ids 0 to 49)"},
      {[](Request& r) { r.params.logit_bias = {{50, 1.f}}; },
       "logit_bias names token 50, but the vocabulary has 50 tokens (ids 0 to 49)"},
      {[&](Request& r) { r.params.logit_bias = {{5, nan}}; },
       "logit_bias of token 5 must be a finite number or -inf (a ban), got nan"},
      {[&](Request& r) { r.params.logit_bias = {{5, inf}}; },
       "logit_bias of token 5 must be a finite number or -inf (a ban), got inf"},
  };
  for (const auto& [change, message] : table) {
    auto r = h.request(4, 5);
    EXPECT_EQ(message_of([&] { h.scheduler.validate(*r); }), "(no error)");
    change(*r);
    EXPECT_EQ(message_of([&] { h.scheduler.validate(*r); }), message);
    EXPECT_EQ(message_of([&] { h.scheduler.add(r); }), message);
  }
  // What is allowed may not be banned altogether.
  auto banned = h.request(4, 5);
  banned->params.allowed_token_ids = {3, kEos};
  banned->params.bad_words = {{3}};
  banned->params.stop_token_ids = {kEos};
  EXPECT_EQ(message_of([&] { h.scheduler.validate(*banned); }), "(no error)");
  banned->params.min_tokens = 1;
  EXPECT_TRUE(message_of([&] { h.scheduler.validate(*banned); }).starts_with("allowed_token_ids"));
  banned->params.allowed_token_ids.push_back(4);
  EXPECT_EQ(message_of([&] { h.scheduler.validate(*banned); }), "(no error)");
  EXPECT_FALSE(h.scheduler.has_work());
  // The ends of the allowed ranges.
  auto r = h.request(4, 5);
  r->params.n = 8;
  r->params.temperature = 0;
  r->params.top_p = 1;
  r->params.top_k = -1;
  r->params.min_p = 1;
  r->params.presence_penalty = -2;
  r->params.frequency_penalty = 2;
  r->params.min_tokens = 5;
  r->params.logprobs = 20;
  r->params.prompt_logprobs = 0;
  r->params.logit_bias = {{49, -inf}, {0, 1000.f}};
  EXPECT_EQ(message_of([&] { h.scheduler.validate(*r); }), "(no error)");
}

// Rows that score their prompt are limited; other prompts and decodes have the rest.
TEST(Scheduler, ScoredRowsAreLimited) {
  for (const bool is_static : {false, true}) {
    Options o;
    o.config.max_scored_rows = 8;
    o.config.static_batching = is_static;
    Harness h(o);
    h.add(5, 30);
    h.step();
    std::map<uint64_t, int> scored;
    for (const int prompt : {20, 11}) {
      auto r = h.request(prompt, 3);
      r->params.prompt_logprobs = 1;
      scored[h.add(r)] = 0;
    }
    h.add(40, 2);
    bool all_rows_used = false;
    while (h.step()) {
      int rows = 0;
      for (const ScheduledSequence& item : h.plan->items) {
        const auto it = scored.find(item.seq->request->id);
        if (it == scored.end() || item.is_decode) continue;
        rows += item.num_query;
        it->second += item.num_query;
      }
      EXPECT_EQ(h.plan->num_scored, rows);
      EXPECT_LE(rows, 8);
      all_rows_used |= h.plan->num_tokens == 32;
    }
    std::vector<int> totals;
    for (const auto& [id, rows] : scored) totals.push_back(rows);
    EXPECT_EQ(totals, (std::vector<int>{20, 11}));
    EXPECT_TRUE(all_rows_used);
  }
}

TEST(Scheduler, ConfigIsChecked) {
  using Change = std::function<void(SchedulerConfig&)>;
  const Change changes[] = {
      [](SchedulerConfig& c) { c.max_num_seqs = 0; },
      [](SchedulerConfig& c) { c.max_num_batched_tokens = c.max_num_seqs - 1; },
      [](SchedulerConfig& c) { c.max_model_len = 1; },
      [](SchedulerConfig& c) { c.max_waiting = -1; },
      [](SchedulerConfig& c) { c.vocab_size = 0; },
      [](SchedulerConfig& c) { c.max_logprobs = -1; },
      [](SchedulerConfig& c) { c.max_scored_rows = -1; },
      [](SchedulerConfig& c) {
        c.max_scored_rows = 8;
        c.enable_chunked_prefill = false;
      },
  };
  for (const Change& change : changes) {
    Options o;
    BlockManager blocks({o.num_blocks, o.block_size, true, default_block_hash});
    EXPECT_NO_THROW(Scheduler(o.config, blocks));
    change(o.config);
    EXPECT_THROW(Scheduler(o.config, blocks), std::invalid_argument);
  }
}

TEST(Scheduler, TheQueueIsBounded) {
  Options o;
  o.config.max_waiting = 3;
  o.config.max_num_seqs = 1;
  Harness h(o);
  for (int i = 0; i < 3; ++i) h.add(4, 4);
  EXPECT_THROW(h.scheduler.add(h.request(4, 4)), QueueFull);
  ASSERT_TRUE(h.step());  // one has left the queue
  h.add(4, 4);
  EXPECT_THROW(h.scheduler.add(h.request(4, 4)), QueueFull);
  EXPECT_EQ(h.scheduler.stats().num_waiting_requests, 3);
  h.run();
  h.expect_all_as_alone();
  h.expect_idle();
  auto twice = h.request(4, 4);
  h.add(twice);
  EXPECT_EQ(message_of([&] { h.scheduler.add(twice); }),
            concat("request id ", twice->id, " is already in use"));
}

// -- Stops ------------------------------------------------------------------------------------

TEST(Scheduler, StopRules) {
  Harness h((Options()));
  auto probe = h.request(6, 12);
  const Tokens plain = expect(*probe, 0, 12).output;
  // A token that comes for the first time at index 5 or later.
  size_t at = 5;
  while (std::count(plain.begin(), plain.begin() + static_cast<ptrdiff_t>(at), plain[at]) > 0) ++at;
  ASSERT_LT(at, plain.size() - 1);
  const int32_t stop = plain[at];
  const auto run = [&](const std::function<void(SamplingParams&)>& change) {
    auto r = h.request(6, 12);
    r->prompt = probe->prompt;
    r->params.seed = probe->params.seed;
    change(r->params);
    h.add(r);
    h.run();
    return std::pair(h.outputs[Choice(r->id, 0)].size(), h.ends.at({r->id, 0}));
  };
  auto [length, end] = run([](SamplingParams&) {});
  EXPECT_EQ(length, 12u);
  EXPECT_EQ(end.finish_reason, FinishReason::length);
  EXPECT_EQ(end.stop_token, -1);

  std::tie(length, end) = run([&](SamplingParams& p) { p.stop_token_ids = {49, stop}; });
  EXPECT_EQ(length, at + 1);  // the stop token counts
  EXPECT_EQ(end.finish_reason, FinishReason::stop);
  EXPECT_EQ(end.stop_token, stop);

  std::tie(length, end) = run([&](SamplingParams& p) {
    p.stop_token_ids = {stop};
    p.min_tokens = static_cast<int>(at) + 1;
  });
  EXPECT_EQ(length, at + 1);
  std::tie(length, end) = run([&](SamplingParams& p) {
    p.stop_token_ids = {stop};
    p.min_tokens = static_cast<int>(at) + 2;
  });
  EXPECT_GT(length, at + 1);

  // The last token that may come and a stop token: it stopped.
  std::tie(length, end) = run([&](SamplingParams& p) {
    p.stop_token_ids = {stop};
    p.max_tokens = static_cast<int>(at) + 1;
  });
  EXPECT_EQ(end.finish_reason, FinishReason::stop);
}

TEST(Scheduler, EndOfSequence) {
  Options o;
  Harness probe_harness(o);
  auto probe = probe_harness.request(6, 12);
  const Tokens plain = expect(*probe, 0, 12).output;
  o.config.eos_token_ids = {48, plain[3]};  // whatever comes fourth ends the sequence
  const auto first =
      static_cast<size_t>(std::find(plain.begin(), plain.end(), plain[3]) - plain.begin());
  Harness h(o);
  const auto run = [&](bool ignore_eos, Tokens stop_token_ids) {
    auto r = h.request(6, 12);
    r->prompt = probe->prompt;
    r->params.seed = probe->params.seed;
    r->params.ignore_eos = ignore_eos;
    r->params.stop_token_ids = std::move(stop_token_ids);
    h.add(r);
    h.run();
    return std::pair(h.outputs[Choice(r->id, 0)].size(), h.ends.at({r->id, 0}));
  };
  auto [length, end] = run(false, {});
  EXPECT_EQ(length, first + 1);
  EXPECT_EQ(end.finish_reason, FinishReason::stop);
  EXPECT_EQ(end.stop_token, -1);
  std::tie(length, end) = run(true, {});
  EXPECT_EQ(length, 12u);
  std::tie(length, end) = run(true, {plain[3]});
  EXPECT_EQ(length, first + 1);
  EXPECT_EQ(end.stop_token, plain[3]);
  std::tie(length, end) = run(false, {plain[3]});
  EXPECT_EQ(end.stop_token, -1);  // end-of-sequence comes first
}

}  // namespace
}  // namespace ni::test
