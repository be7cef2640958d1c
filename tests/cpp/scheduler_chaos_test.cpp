// Aborts and failures at any moment, random schedules, and running ahead of the outcomes.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>
#include <random>
#include <set>
#include <vector>

#include "scheduler_helpers.h"

// Counts allocations, so that a test can show that a step makes none.
static std::atomic<uint64_t> num_allocations{0};
[[gnu::noinline]] void* operator new(size_t size) {
  ++num_allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  ++num_allocations;
  return std::malloc(size);
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

namespace ni::test {
namespace {

// -- Aborts and failures ----------------------------------------------------------------------

TEST(Scheduler, AbortFreesBlocksInEveryState) {
  Options o;
  o.num_blocks = 10;
  o.config.max_num_seqs = 3;
  o.prefix_caching = false;
  Harness h(o);
  const uint64_t waiting = h.add(8, 4);
  h.abort(waiting);
  EXPECT_EQ(h.ends.at({waiting, 0}).finish_reason, FinishReason::abort);
  EXPECT_EQ(h.ends.at({waiting, 0}).item, -1);
  EXPECT_TRUE(h.ends.at({waiting, 0}).request_done);
  EXPECT_FALSE(h.scheduler.has_work());
  h.abort(waiting);  // unknown by now
  h.abort(999);

  const uint64_t decoding = h.add(8, 20), other = h.add(8, 20);
  h.step();
  h.step();
  h.abort(decoding, 0, FinishReason::stop);  // a stop string
  EXPECT_EQ(h.ends.at({decoding, 0}).finish_reason, FinishReason::stop);
  EXPECT_EQ(h.blocks.stats().num_used, 3);

  const uint64_t prefilling = h.add(24, 4);
  h.step();
  h.abort(prefilling, -1);
  h.step();
  EXPECT_EQ(h.blocks.stats().num_used,
            h.blocks.blocks_for(h.scheduler.find(other, 0)->num_computed));
  h.run();
  h.expect_as_alone(other, 0);
  h.expect_idle();
}

TEST(Scheduler, AbortWhileAStepIsInFlight) {
  Harness h((Options()));
  auto several = h.request(6, 8);
  several->params.n = 3;
  const uint64_t a = h.add(6, 8), b = h.add(several), c = h.add(6, 8), d = h.add(6, 8);
  h.begin();
  h.abort(a);
  h.abort(b, 1);
  h.end();
  EXPECT_FALSE(h.outputs.contains({a, 0}));
  EXPECT_FALSE(h.outputs.contains({b, 1}));
  h.begin();
  h.abort(b, 0);
  h.abort(d);
  h.end();
  h.begin();
  EXPECT_EQ(h.scheduled(), (std::vector<Choice>{{b, 2}, {c, 0}}));
  h.end();
  h.run();
  h.expect_as_alone(b, 2);
  h.expect_as_alone(c, 0);
  h.expect_idle();
}

TEST(Scheduler, AbortOfChoicesBeforeTheFork) {
  // Any of the choices may go before the prompt is computed; the leader stays as long as one is
  // left.
  for (int gone = 0; gone < 8; ++gone) {
    Options o;
    o.config.max_num_batched_tokens = 8;
    Harness h(o);
    auto r = h.request(20, 5);
    r->params.n = 3;
    const uint64_t id = h.add(r);
    h.step();
    for (int k = 0; k < 3; ++k)
      if (gone >> k & 1) h.abort(id, k);
    h.run();
    for (int k = 0; k < 3; ++k) {
      if (gone >> k & 1) {
        EXPECT_EQ(h.ends.at({id, k}).finish_reason, FinishReason::abort);
      } else {
        h.expect_as_alone(id, k);
      }
    }
    h.expect_idle();
  }
}

TEST(Scheduler, AbortOfAnUnforkedRequestEndsEveryChoice) {
  Harness h((Options()));
  auto r = h.request(20, 5);
  r->params.n = 3;
  const uint64_t id = h.add(r);
  h.abort(id);
  for (int k = 0; k < 3; ++k) EXPECT_EQ(h.ends.at({id, k}).request_done, k == 2);
  h.expect_idle();
}

TEST(Scheduler, AFailedStepEndsItsSequencesOnly) {
  Options o;
  o.config.max_num_batched_tokens = 8;
  Harness h(o);
  Tokens prompt(20);
  for (int i = 0; i < 20; ++i) prompt[static_cast<size_t>(i)] = i;
  const uint64_t a = h.add(4, 8);
  auto several = h.request(prompt, 8);
  several->params.n = 2;
  const uint64_t b = h.add(several), c = h.add(6, 8);
  h.step();
  h.step();  // decode of a, 7 + 4 of b's 20 rows
  h.step(true);
  EXPECT_EQ(h.ends.at({a, 0}).finish_reason, FinishReason::error);
  EXPECT_EQ(h.ends.at({b, 0}).finish_reason, FinishReason::error);
  EXPECT_EQ(h.ends.at({b, 1}).finish_reason, FinishReason::error);
  EXPECT_FALSE(h.ends.contains({c, 0}));
  EXPECT_EQ(h.blocks.stats().num_used, 0);
  // What the failed step wrote is not in the prefix cache: 8 rows of 4 + 7 were good.
  const uint64_t again = h.add(h.request(prompt, 8));
  h.run();
  EXPECT_EQ(h.ends.at({again, 0}).num_cached, 8);
  h.expect_as_alone(c, 0);
  h.expect_as_alone(again, 0);
  h.expect_idle();
}

// -- Everything at once -----------------------------------------------------------------------

struct ChaosTotals {
  uint64_t preemptions = 0, hits = 0, evictions = 0, copies = 0, accepted = 0, failures = 0,
           aborts = 0, completed = 0, ahead = 0, in_vain = 0;
};

void chaos(uint32_t seed, bool overlap, ChaosTotals& totals) {
  std::mt19937 random(seed);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  Options o;
  o.block_size = pick(1, 5);
  o.num_blocks = pick(6, 40);
  o.prefix_caching = pick(0, 3) > 0;
  if (pick(0, 3) == 0) o.hash = [](uint64_t, const int32_t*, int) { return uint64_t{1}; };
  o.config.max_num_seqs = pick(1, 8);
  o.config.max_num_batched_tokens = o.config.max_num_seqs + pick(0, 30);
  o.config.max_model_len = pick(10, 90);
  o.config.policy = pick(0, 1) ? SchedulingPolicy::fcfs : SchedulingPolicy::priority;
  o.config.enable_chunked_prefill = pick(0, 3) > 0;
  o.config.static_batching = pick(0, 7) == 0;
  Harness h(o);
  std::set<uint64_t> disturbed;  // aborted or failed: their text is only a beginning

  const auto add = [&] {
    auto r = h.request(pick(1, 30), pick(0, 4) ? pick(1, 25) : -1);
    // Few different beginnings, so that prefixes are shared.
    for (size_t i = 0; i < r->prompt.size(); ++i)
      r->prompt[i] = static_cast<int32_t>(i / 7 * static_cast<size_t>(pick(0, 8) == 0) + i % 3);
    r->params.n = pick(0, 2) ? 1 : pick(1, std::min(4, o.config.max_num_seqs));
    r->params.ignore_eos = pick(0, 1) == 0;
    r->params.min_tokens = r->params.max_tokens > 3 ? pick(0, 3) : 0;
    if (pick(0, 2) == 0) r->params.stop_token_ids = {pick(0, kVocab - 1), pick(0, kVocab - 1)};
    if (pick(0, 5) == 0) r->params.prompt_logprobs = 1;
    if (pick(0, 9) == 0) r->params.frequency_penalty = 0.5f;
    if (pick(0, 3) == 0) r->cache_salt = "salt";
    r->priority = pick(-1, 1);
    try {
      h.scheduler.validate(*r);
    } catch (const std::invalid_argument&) {
      return;
    }
    h.add(r);
  };
  const auto some_request = [&] {
    return std::next(h.requests.begin(), pick(0, static_cast<int>(h.requests.size()) - 1))->first;
  };
  const auto abort = [&] {
    const uint64_t id = some_request();
    const size_t before = h.ends.size();
    h.abort(id, pick(-1, h.requests[id]->params.n - 1));
    if (h.ends.size() == before) return;
    disturbed.insert(id);
    ++totals.aborts;
  };
  const auto propose = [&] {
    for (const auto& [id, r] : h.requests) {
      for (int k = 0; k < r->params.n; ++k) {
        Sequence* seq = h.scheduler.find(id, k);
        if (seq == nullptr || pick(0, 1)) continue;
        const Tokens truth = expect(*r, k, seq->max_tokens).output;
        const auto have = h.outputs[Choice(id, k)].size();
        seq->draft_tokens.clear();
        for (int i = 0, n = pick(0, 6); i < n; ++i) {
          const auto at = have + static_cast<size_t>(i);
          const bool right = at < truth.size() && pick(0, 5) > 0;
          seq->draft_tokens.push_back(right ? truth[at] : pick(0, kVocab - 1));
        }
      }
    }
  };

  const bool drafts = pick(0, 1) == 0;
  const int arrivals = pick(20, 60);
  int quiet = 0;
  for (int added = 0; added < arrivals || h.scheduler.has_work();) {
    if (added < arrivals && pick(0, 2) == 0) {
      add();
      ++added;
    }
    if (!h.requests.empty() && pick(0, 25) == 0) abort();
    if (overlap) {
      const auto look = [&] {
        for (const SequenceUpdate& u : h.updates) {
          totals.accepted += static_cast<uint64_t>(std::max(0, u.num_new_tokens - 1));
          if (u.finish_reason != FinishReason::error) continue;
          disturbed.insert(u.request_id);
          ++totals.failures;
        }
      };
      if (pick(0, 9) == 0 && !h.steps.empty()) {
        h.end();
        look();
      }
      if (drafts && h.steps.empty()) propose();
      const bool worked = h.turn(pick(0, 60) == 0, look);
      ASSERT_TRUE(worked || !h.scheduler.has_work()) << "work is left, but nothing runs";
      ASSERT_LT(h.step_index, 100000);
      ASSERT_FALSE(::testing::Test::HasFailure());
      continue;
    }
    if (drafts) propose();
    const bool failing = pick(0, 60) == 0;
    h.begin(failing);
    if (failing) {
      for (const Choice& who : h.scheduled()) disturbed.insert(who.first);
      totals.failures += !h.plan->empty();
    }
    if (!h.requests.empty() && pick(0, 40) == 0) abort();  // in flight
    const bool worked = !h.plan->empty();
    h.end();
    for (const SequenceUpdate& u : h.updates)
      totals.accepted += static_cast<uint64_t>(std::max(0, u.num_new_tokens - 1));
    quiet = worked || !h.scheduler.has_work() ? 0 : quiet + 1;
    ASSERT_LT(quiet, 1) << "work is left, but nothing runs";
    ASSERT_LT(h.step_index, 100000);
    ASSERT_FALSE(::testing::Test::HasFailure());
  }
  while (!h.steps.empty()) h.end();  // all of whose sequences were aborted
  for (const auto& [id, r] : h.requests) {
    for (int k = 0; k < r->params.n; ++k) {
      const SequenceUpdate& end = h.ends.at({id, k});
      const Tokens truth = expect(*r, k, h.scheduler.clamp_max_tokens(*r)).output;
      const Tokens& got = h.outputs[Choice(id, k)];
      ASSERT_LE(got.size(), truth.size());
      EXPECT_TRUE(std::equal(got.begin(), got.end(), truth.begin()));
      const bool cut =
          end.finish_reason == FinishReason::abort || end.finish_reason == FinishReason::error;
      EXPECT_TRUE(!cut || disturbed.contains(id));
      if (!cut) h.expect_as_alone(id, k);
      totals.completed += !cut;
    }
  }
  h.expect_idle();
  totals.preemptions += h.scheduler.stats().preemptions;
  totals.hits += h.blocks.stats().prefix_hits;
  totals.evictions += h.blocks.stats().evictions;
  totals.copies += h.blocks.stats().copies;
  totals.ahead += h.ahead;
  totals.in_vain += h.in_vain;
}

TEST(Scheduler, Chaos) {
  ChaosTotals totals;
  for (uint32_t seed = 0; seed < 400; ++seed) {
    chaos(seed, false, totals);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
  // It was chaos indeed.
  EXPECT_GT(totals.preemptions, 500u);
  EXPECT_GT(totals.hits, 5000u);
  EXPECT_GT(totals.evictions, 5000u);
  EXPECT_GT(totals.copies, 500u);
  EXPECT_GT(totals.accepted, 5000u);
  EXPECT_GT(totals.failures, 200u);
  EXPECT_GT(totals.aborts, 500u);
  EXPECT_GT(totals.completed, 5000u);
}

// The same with steps that are scheduled ahead of the outcome of the one before.
TEST(Scheduler, ChaosWithOverlap) {
  ChaosTotals totals;
  for (uint32_t seed = 1000; seed < 1600; ++seed) {
    chaos(seed, true, totals);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
  EXPECT_GT(totals.preemptions, 500u);
  EXPECT_GT(totals.hits, 5000u);
  EXPECT_GT(totals.evictions, 5000u);
  EXPECT_GT(totals.copies, 500u);
  EXPECT_GT(totals.accepted, 500u);
  EXPECT_GT(totals.failures, 200u);
  EXPECT_GT(totals.aborts, 500u);
  EXPECT_GT(totals.completed, 5000u);
  EXPECT_GT(totals.ahead, 20000u);
  EXPECT_GT(totals.in_vain, 500u);
}

// What a step ahead of the other looks like.
TEST(Scheduler, RunsAheadWithPlaceholders) {
  Harness h{Options()};
  auto r = h.request(6, 3);
  h.add(r);
  const uint64_t other = h.add(5, 9);
  h.begin();
  ASSERT_TRUE(h.scheduler.can_run_ahead());
  h.begin();
  EXPECT_EQ(h.rows(), (std::vector<int>{1, 1}));
  EXPECT_EQ(h.plan->items[0].seq->tokens.back(), -1);
  EXPECT_EQ(h.plan->items[1].seq->tokens.back(), -2);
  h.end();
  EXPECT_EQ(h.outputs[Choice(r->id, 0)].size(), 1u);
  EXPECT_GE(h.scheduler.find(r->id, 0)->tokens.back(), 0);
  h.begin();
  h.end();
  // The first has three tokens when the step in flight has ended: it has no row in the next one.
  h.begin();
  EXPECT_EQ(h.scheduled(), std::vector<Choice>{Choice(other, 0)});
  h.end();
  EXPECT_EQ(h.ends.at({r->id, 0}).finish_reason, FinishReason::length);
  EXPECT_EQ(h.in_vain, 0u);
  h.end();
  h.run();
  h.expect_all_as_alone();
  h.expect_idle();
}

TEST(Scheduler, ARowInVainLeavesNothingBehind) {
  Options o;
  o.num_blocks = 7;
  Harness h(o);
  auto plain = h.request(6, 20);
  const Tokens truth = expect(*plain, 0, 20).output;
  plain->params.stop_token_ids = {truth[2]};  // its ninth token: the row in vain fills no block
  h.add(plain);
  for (int i = 0; i < 3; ++i) {
    h.begin();
    if (h.steps.size() > 1) h.end();
  }
  h.begin();  // the row in vain
  ASSERT_EQ(h.scheduled(), std::vector<Choice>{Choice(plain->id, 0)});
  h.end();
  EXPECT_EQ(h.ends.at({plain->id, 0}).finish_reason, FinishReason::stop);
  EXPECT_EQ(h.blocks.stats().num_used, 0);
  EXPECT_EQ(h.blocks.stats().num_cached, 2);  // eight tokens were computed, and known
  // Whoever gets its blocks next writes after it.
  const uint64_t next = h.add(20, 5);
  h.begin();
  h.end();
  EXPECT_EQ(h.in_vain, 1u);
  h.end();
  h.run();
  h.expect_as_alone(plain->id, 0);
  h.expect_as_alone(next, 0);
  h.expect_idle();
}

TEST(Scheduler, WaitsForTokensThatTheNextStepNeeds) {
  const auto can_run_ahead = [](const std::function<void(SamplingParams&)>& change, int steps) {
    Harness h{Options()};
    auto r = h.request(6, 5);
    change(r->params);
    h.add(r);
    for (int i = 1; i < steps; ++i) h.step();
    h.begin();
    const bool can = h.scheduler.can_run_ahead();
    h.end();
    h.run();
    h.expect_idle();
    return can;
  };
  for (const int steps : {1, 2}) {
    EXPECT_TRUE(can_run_ahead([](SamplingParams&) {}, steps));
    EXPECT_TRUE(can_run_ahead([](SamplingParams& p) { p.bad_words = {{1}, {2}}; }, steps));
    EXPECT_TRUE(can_run_ahead([](SamplingParams& p) { p.min_tokens = 3; }, steps));
    EXPECT_FALSE(can_run_ahead([](SamplingParams& p) { p.bad_words = {{1, 2}}; }, steps));
    EXPECT_FALSE(can_run_ahead([](SamplingParams& p) { p.repetition_penalty = 1.1f; }, steps));
    EXPECT_FALSE(can_run_ahead([](SamplingParams& p) { p.presence_penalty = 1.0f; }, steps));
    EXPECT_FALSE(can_run_ahead([](SamplingParams& p) { p.frequency_penalty = 1.0f; }, steps));
  }
  EXPECT_FALSE(can_run_ahead([](SamplingParams& p) { p.n = 2; }, 1));
  EXPECT_TRUE(can_run_ahead([](SamplingParams& p) { p.n = 2; }, 2));
  EXPECT_FALSE(can_run_ahead([](SamplingParams& p) { p.prompt_logprobs = 0; }, 1));
  EXPECT_TRUE(can_run_ahead([](SamplingParams& p) { p.prompt_logprobs = 0; }, 2));
  // The last token need not be known.
  EXPECT_TRUE(can_run_ahead([](SamplingParams& p) { p.presence_penalty = 1.0f; }, 5));
}

TEST(Scheduler, DoesNotPreemptAheadOfAnOutcome) {
  Options o;
  o.num_blocks = 4;
  o.prefix_caching = false;
  Harness h(o);
  const uint64_t first = h.add(7, 6), second = h.add(6, 4);
  h.begin();
  while (true) {
    h.begin();
    if (h.plan->empty()) break;
    h.end();
  }
  EXPECT_TRUE(h.plan->preempted.empty());
  EXPECT_EQ(h.scheduler.stats().preemptions, 0u);
  ASSERT_EQ(h.steps.size(), 1u);
  h.end();
  h.run();
  EXPECT_GT(h.scheduler.stats().preemptions, 0u);
  h.expect_as_alone(first, 0);
  h.expect_as_alone(second, 0);
  h.expect_idle();
}

TEST(Scheduler, StepsOfTheSteadyStateDoNotAllocate) {
  Options o;
  o.num_blocks = 400;
  Harness h(o);
  for (int i = 0; i < 8; ++i) h.add(5 + i, 100);
  for (int i = 0; i < 5; ++i) h.step();
  std::vector<SequenceUpdate> out;
  out.reserve(8);
  const Tokens samples(8, 7);
  const uint64_t before = num_allocations;
  for (int i = 0; i < 60; ++i) {  // new blocks and commits among them
    out.clear();
    const StepPlan& plan = h.scheduler.schedule();
    ASSERT_EQ(plan.num_decodes, 8);
    h.scheduler.update(samples.data(), out);
  }
  EXPECT_EQ(num_allocations, before);
}

}  // namespace
}  // namespace ni::test
