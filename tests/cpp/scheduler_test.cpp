// The schedule: who runs, in which chunks, what is reused, who is preempted; choices and drafts.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "scheduler_helpers.h"

namespace ni::test {
namespace {

// -- The schedule -----------------------------------------------------------------------------

TEST(Scheduler, MixesDecodesAndChunks) {
  Options o;
  o.config.max_num_batched_tokens = 10;
  Harness h(o);
  h.add(4, 5);
  h.add(20, 3);
  h.add(3, 3);
  using Plan = std::vector<int>;
  const Plan expected[] = {
      {4, 6},     // prompt 0, a chunk of prompt 1
      {1, 9},     // decode 0, the next chunk
      {1, 5, 3},  // decode 0, the last chunk, prompt 2
      {1, 1, 1}, {1, 1, 1},
  };
  for (const Plan& rows : expected) {
    ASSERT_TRUE(h.step());
    EXPECT_EQ(h.rows(), rows);
  }
  EXPECT_FALSE(h.scheduler.has_work());
  h.expect_all_as_alone();
  h.expect_idle();
}

TEST(Scheduler, SeatsLimitTheBatch) {
  Options o;
  o.config.max_num_seqs = 2;
  Harness h(o);
  for (int i = 0; i < 5; ++i) h.add(4, 3);
  int steps = 0;
  while (h.scheduler.has_work()) {
    ASSERT_TRUE(h.step());
    EXPECT_LE(h.plan->items.size(), 2u);
    ++steps;
  }
  EXPECT_EQ(steps, 3 * 3);  // three batches, as all are equally long
  h.expect_all_as_alone();
}

TEST(Scheduler, EmptyPlanWithoutWork) {
  Harness h((Options()));
  EXPECT_FALSE(h.scheduler.has_work());
  EXPECT_TRUE(h.scheduler.schedule().empty());
  EXPECT_TRUE(h.scheduler.schedule().empty());  // an empty step needs no update
  std::vector<SequenceUpdate> out;
  EXPECT_THROW(h.scheduler.update(nullptr, out), std::logic_error);
  EXPECT_THROW(h.scheduler.fail(out), std::logic_error);
  h.add(4, 2);
  h.begin();
  EXPECT_THROW(h.scheduler.schedule(), std::logic_error);
  h.end();
  h.run();
}

TEST(Scheduler, NothingOvertakesARequestThatWaitsForBlocks) {
  Options o;
  o.num_blocks = 10;  // 40 slots
  Harness h(o);
  h.add(20, 4);
  const uint64_t big = h.add(24, 4), small = h.add(2, 2);
  ASSERT_TRUE(h.step());
  EXPECT_EQ(h.scheduled().size(), 1u);
  while (h.scheduler.find(big, 0)->status == SequenceStatus::waiting) {
    EXPECT_EQ(h.scheduler.find(small, 0)->status, SequenceStatus::waiting);
    ASSERT_TRUE(h.step());
  }
  EXPECT_EQ(h.plan->admitted[0].request_id, big);
  h.run();
  h.expect_all_as_alone();
}

TEST(Scheduler, PrefixIsReusedAndCounted) {
  Harness h((Options()));
  Tokens prompt(21);
  for (int i = 0; i < 21; ++i) prompt[static_cast<size_t>(i)] = i;
  const uint64_t first = h.add(h.request(prompt, 4));
  h.run();
  const uint64_t second = h.add(h.request(prompt, 4));
  auto scored = h.request(prompt, 4);
  scored->params.prompt_logprobs = 0;
  const uint64_t third = h.add(scored);
  auto salted = h.request(prompt, 4);
  salted->cache_salt = "other";
  const uint64_t fourth = h.add(salted);
  h.step();
  EXPECT_EQ(h.rows()[0], 1);
  EXPECT_EQ(h.rows()[1], 21);  // every row of the prompt is needed
  h.run();
  EXPECT_EQ(h.ends.at({first, 0}).num_cached, 0);
  EXPECT_EQ(h.ends.at({second, 0}).num_cached, 20);
  EXPECT_EQ(h.ends.at({third, 0}).num_cached, 0);
  EXPECT_EQ(h.ends.at({fourth, 0}).num_cached, 0);
  h.expect_all_as_alone();
  h.expect_idle();
}

TEST(Scheduler, HitsOfARequestThatWaitsAreCountedOnce) {
  Options o;
  o.num_blocks = 10;  // 40 slots
  Harness h(o);
  Tokens prompt(9);
  for (int i = 0; i < 9; ++i) prompt[static_cast<size_t>(i)] = i;
  h.add(h.request(prompt, 1));
  h.run();
  const uint64_t before = h.blocks.stats().prefix_queries;
  h.add(20, 8);  // takes 5 blocks, then 7
  prompt.resize(30, 40);
  const uint64_t waits = h.add(h.request(prompt, 4));
  int steps = 0;
  for (; h.scheduler.find(waits, 0)->status == SequenceStatus::waiting; ++steps)
    ASSERT_TRUE(h.step());
  EXPECT_GT(steps, 3);
  EXPECT_EQ(h.blocks.stats().prefix_hits, 8u);
  EXPECT_EQ(h.blocks.stats().prefix_queries - before, 50u);
  h.run();
  h.expect_all_as_alone();
}

TEST(Scheduler, WholePrompts) {
  Options o;
  o.config.enable_chunked_prefill = false;
  o.config.max_num_batched_tokens = 16;
  Harness h(o);
  h.add(10, 8);
  h.add(10, 8);
  h.add(3, 8);  // would fit beside the first, but must not overtake the second
  ASSERT_TRUE(h.step());
  EXPECT_EQ(h.rows(), (std::vector<int>{10}));
  ASSERT_TRUE(h.step());
  EXPECT_EQ(h.rows(), (std::vector<int>{1, 10, 3}));
  const uint64_t full = h.add(16, 2);  // needs the whole budget
  while (h.scheduler.find(full, 0)->status == SequenceStatus::waiting) {
    EXPECT_LT(h.step_index, 30);
    ASSERT_TRUE(h.step());
  }
  EXPECT_EQ(h.rows(), (std::vector<int>{16}));
  h.run();
  h.expect_all_as_alone();
  EXPECT_EQ(message_of([&] { h.scheduler.validate(*h.request(17, 2)); }),
            "the prompt has 17 tokens, but without chunked prefill it can have at most 16 "
            "(max_num_batched_tokens)");
}

// Prompt and output of a preempted sequence may be longer than a step; only then it is cut.
TEST(Scheduler, WholePromptsWithLongRecompute) {
  Options o;
  o.config.enable_chunked_prefill = false;
  o.config.max_num_batched_tokens = 16;
  o.num_blocks = 20;
  o.prefix_caching = false;
  Harness h(o);
  for (int i = 0; i < 3; ++i) h.add(14, 40);
  h.run();
  EXPECT_FALSE(h.preempted.empty());
  h.expect_all_as_alone();
  h.expect_idle();
}

TEST(Scheduler, StaticBatching) {
  for (const bool chunked : {true, false}) {
    Options o;
    o.config.static_batching = true;
    o.config.enable_chunked_prefill = chunked;
    o.config.max_num_seqs = 3;
    o.config.max_num_batched_tokens = 16;
    Harness h(o);
    const int lengths[] = {2, 9, 5, 4, 1};
    for (const int length : lengths) h.add(12, length);
    // The first three take their seats at once, though their prompts need several steps.
    ASSERT_TRUE(h.step());
    EXPECT_EQ(h.plan->admitted.size(), 3u);
    while (h.finished < 3) {
      ASSERT_TRUE(h.step());
      EXPECT_TRUE(h.plan->admitted.empty());  // finished seats stay idle
    }
    ASSERT_TRUE(h.step());
    EXPECT_EQ(h.plan->admitted.size(), 2u);
    h.run();
    h.expect_all_as_alone();
    h.expect_idle();
  }
}

TEST(Scheduler, StaticBatchingWithPreemption) {
  Options o;
  o.config.static_batching = true;
  o.num_blocks = 12;
  o.prefix_caching = false;
  Harness h(o);
  for (int i = 0; i < 5; ++i) h.add(8, 30);
  h.run();
  EXPECT_FALSE(h.preempted.empty());
  h.expect_all_as_alone();
}

// The engine's unpaged mode: a block holds a whole sequence.
TEST(Scheduler, HugeBlocks) {
  Options o;
  o.num_blocks = 3;
  o.block_size = o.config.max_model_len;
  o.prefix_caching = false;
  Harness h(o);
  for (int i = 0; i < 7; ++i) h.add(5 + i, 20);
  ASSERT_TRUE(h.step());
  EXPECT_EQ(h.plan->items.size(), 3u);
  h.run();
  EXPECT_EQ(h.scheduler.stats().preemptions, 0u);
  h.expect_all_as_alone();
  h.expect_idle();
}

// -- Preemption -------------------------------------------------------------------------------

TEST(Scheduler, PreemptsTheNewestAndResumesItBeforeNewerOnes) {
  for (const bool prefix_caching : {true, false}) {
    Options o;
    o.num_blocks = 9;
    o.prefix_caching = prefix_caching;
    Harness h(o);
    const uint64_t a = h.add(8, 16), b = h.add(8, 16), c = h.add(8, 6);
    std::vector<uint64_t> resumed;
    uint64_t newer = 0;
    while (h.scheduler.has_work()) {
      const size_t output_before =
          h.scheduler.find(c, 0) ? h.outputs[Choice(c, 0)].size() : size_t{0};
      ASSERT_TRUE(h.step());
      if (h.preempted.size() == 1 && newer == 0) {
        EXPECT_EQ(*h.preempted.begin(), Choice(c, 0));
        EXPECT_EQ(h.plan->preempted.size(), 1u);
        Sequence* seq = h.scheduler.find(c, 0);
        EXPECT_EQ(seq->status, SequenceStatus::waiting);
        EXPECT_EQ(static_cast<size_t>(seq->num_output()), output_before);  // the output is kept
        EXPECT_GT(output_before, 0u);
        newer = h.add(2, 2);
      }
      const Sequence* seq = h.scheduler.find(c, 0);
      if (newer != 0 && seq && seq->status == SequenceStatus::waiting) {
        EXPECT_EQ(h.scheduler.find(newer, 0)->status, SequenceStatus::waiting);
      }
      for (const StepPlan::Event& e : h.plan->resumed) resumed.push_back(e.request_id);
    }
    EXPECT_FALSE(h.preempted.contains({a, 0}));
    EXPECT_EQ(h.ends.at({c, 0}).num_new_tokens, 1);
    ASSERT_FALSE(resumed.empty());
    EXPECT_EQ(h.largest_gap.at({a, 0}), 1);
    EXPECT_GE(h.scheduler.stats().preemptions, 1u);
    EXPECT_EQ(h.preempted.contains({b, 0}), h.largest_gap.at({b, 0}) > 1);
    h.expect_all_as_alone();
    h.expect_idle();
  }
}

TEST(Scheduler, ASequenceMayPreemptItself) {
  Options o;
  o.num_blocks = 4;
  o.prefix_caching = false;
  Harness h(o);
  const uint64_t a = h.add(6, 11);  // needs all four blocks in the end
  const uint64_t b = h.add(4, 6);   // its second block is the last one that is free
  while (h.preempted.empty()) ASSERT_TRUE(h.step());
  EXPECT_EQ(*h.preempted.begin(), Choice(b, 0));
  EXPECT_EQ(h.scheduled(), std::vector<Choice>{Choice(a, 0)});
  h.run();
  EXPECT_EQ(h.largest_gap.at({a, 0}), 1);
  h.expect_all_as_alone();
}

TEST(Scheduler, PriorityDecidesWhoWaitsAndWhoIsPreempted) {
  Options o;
  o.config.policy = SchedulingPolicy::priority;
  o.config.max_num_seqs = 2;
  o.num_blocks = 9;
  o.prefix_caching = false;
  Harness h(o);
  const auto with_priority = [&](int priority, int prompt_len, int max_tokens) {
    auto r = h.request(prompt_len, max_tokens);
    r->priority = priority;
    return h.add(r);
  };
  const uint64_t low = with_priority(5, 4, 20);
  const uint64_t middle = with_priority(3, 4, 4);
  ASSERT_TRUE(h.step());
  EXPECT_EQ(h.scheduled(), (std::vector<Choice>{{middle, 0}, {low, 0}}));
  const uint64_t later = with_priority(4, 8, 20), urgent = with_priority(-1, 8, 20);
  const uint64_t equal = with_priority(-1, 8, 4);
  ASSERT_TRUE(h.step());
  // A better priority does not take the seat of a running sequence ...
  EXPECT_EQ(h.scheduled(), (std::vector<Choice>{{middle, 0}, {low, 0}}));
  std::vector<uint64_t> admitted;
  while (h.scheduler.has_work()) {
    ASSERT_TRUE(h.step());
    for (const StepPlan::Event& e : h.plan->admitted) admitted.push_back(e.request_id);
  }
  // ... but goes before whatever waits; equals by arrival. Only shortage of blocks preempts.
  EXPECT_EQ(admitted, (std::vector<uint64_t>{urgent, equal, later}));
  EXPECT_TRUE(h.preempted.contains({low, 0}));
  EXPECT_FALSE(h.preempted.contains({urgent, 0}));
  EXPECT_FALSE(h.preempted.contains({equal, 0}));
  h.expect_all_as_alone();
}

// The bound in scheduler.h: without preemption a decode gets a token in every step.
TEST(Scheduler, LongPrefillsDoNotStallDecodes) {
  Options o;
  o.num_blocks = 1000;
  o.config.max_num_batched_tokens = 9;
  Harness h(o);
  std::mt19937 random(3);
  for (int i = 0; i < 40; ++i) {
    h.add(static_cast<int>(20 + random() % 150), static_cast<int>(1 + random() % 29));
    for (int s = 0; s < 5; ++s) h.step();
  }
  h.run();
  EXPECT_EQ(h.scheduler.stats().preemptions, 0u);
  for (const auto& [who, gap] : h.largest_gap) EXPECT_EQ(gap, 1) << who.first;
  h.expect_all_as_alone();
}

// With preemption: the first in order never waits; the others at most as long as the header says.
TEST(Scheduler, StallIsBoundedUnderPreemption) {
  uint64_t preemptions = 0;
  int worst = 0;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    Options o;
    o.num_blocks = 14;
    o.prefix_caching = seed % 2 == 0;
    o.config.max_num_seqs = 4;
    o.config.max_num_batched_tokens = 7;
    Harness h(o);
    std::mt19937 random(seed);
    for (int i = 0; i < 15; ++i) {
      h.add(static_cast<int>(1 + random() % 25), static_cast<int>(1 + random() % 30));
      for (int s = 0; s < 6; ++s) h.step();
    }
    h.run();
    preemptions += h.scheduler.stats().preemptions;
    const int r = o.config.max_num_batched_tokens - o.config.max_num_seqs + 1;
    const auto steps = [&](int tokens) { return (tokens + r - 1) / r; };
    int before = 0;  // steps that everything older may take
    for (const auto& [id, request] : h.requests) {
      const int len = static_cast<int>(request->prompt.size()) + request->params.max_tokens;
      const int gap = h.largest_gap[Choice(id, 0)];
      const int bound = h.preempted.contains({id, 0}) ? before + steps(len) : 1;
      EXPECT_LE(gap, bound) << "request " << id;
      worst = std::max(worst, gap);
      before += steps(len) + request->params.max_tokens;
    }
    EXPECT_FALSE(h.preempted.contains({0, 0}));
    h.expect_all_as_alone();
  }
  EXPECT_GT(preemptions, 50u);
  EXPECT_GT(worst, 1);
}

// -- Several choices --------------------------------------------------------------------------

TEST(Scheduler, ChoicesShareThePrompt) {
  Harness h((Options()));
  auto r = h.request(10, 6);  // two full blocks and half of a third
  r->params.n = 4;
  const uint64_t id = h.add(r);
  ASSERT_TRUE(h.step());
  EXPECT_EQ(h.rows(), std::vector<int>{10});
  EXPECT_EQ(h.plan->num_samples, 4);
  EXPECT_EQ(h.blocks.stats().num_used, 3);
  EXPECT_EQ(h.scheduler.stats().num_running, 4);
  EXPECT_EQ(h.scheduler.stats().num_running_requests, 1);
  ASSERT_TRUE(h.step());
  EXPECT_EQ(h.scheduled(), (std::vector<Choice>{{id, 0}, {id, 1}, {id, 2}, {id, 3}}));
  EXPECT_EQ(h.plan->copies.size(), 3u);  // the last choice writes in place
  EXPECT_EQ(h.blocks.stats().num_used, 2 + 4);
  h.run();
  int done = 0;
  for (int k = 0; k < 4; ++k) done += h.ends.at({id, k}).request_done;
  EXPECT_EQ(done, 1);
  std::set<Tokens> different;
  for (int k = 0; k < 4; ++k) different.insert(h.outputs[Choice(id, k)]);
  EXPECT_EQ(different.size(), 4u);
  h.expect_all_as_alone();
  h.expect_idle();
}

TEST(Scheduler, ChoicesThatEndAtOnce) {
  Harness h((Options()));
  auto all = h.request(10, 1);
  all->params.n = 3;
  const uint64_t id = h.add(all);
  ASSERT_TRUE(h.step());
  EXPECT_FALSE(h.scheduler.has_work());
  for (int k = 0; k < 3; ++k) EXPECT_EQ(h.ends.at({id, k}).finish_reason, FinishReason::length);
  // One of them stops with its first token, wherever it stands.
  for (int k = 0; k < 3; ++k) {
    auto one = h.request(10, 6);
    one->params.n = 3;
    one->params.stop_token_ids = {sample(one->prompt, *one, k)};
    const uint64_t stopped = h.add(one);
    ASSERT_TRUE(h.step());
    ASSERT_TRUE(h.ends.contains({stopped, k}));
    EXPECT_EQ(h.ends.at({stopped, k}).stop_token, one->params.stop_token_ids[0]);
    h.run();
  }
  h.expect_all_as_alone();
  h.expect_idle();
}

TEST(Scheduler, ChoicesTakeSeats) {
  Options o;
  o.config.max_num_seqs = 4;
  Harness h(o);
  h.add(4, 8);
  h.add(4, 8);
  auto r = h.request(4, 8);
  r->params.n = 3;
  const uint64_t id = h.add(r);
  const uint64_t behind = h.add(4, 8);
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(h.step());
    EXPECT_EQ(h.scheduled().size(), 2u);  // two seats are left, three wanted; nothing overtakes
  }
  ASSERT_TRUE(h.step());
  EXPECT_EQ(h.scheduled(), (std::vector<Choice>{{id, 0}, {behind, 0}}));
  h.run();
  h.expect_all_as_alone();
}

TEST(Scheduler, AChoiceIsPreemptedAlone) {
  Options o;
  o.num_blocks = 8;
  o.prefix_caching = false;
  Harness h(o);
  const uint64_t first = h.add(4, 20);
  auto r = h.request(6, 7);
  r->params.n = 3;
  const uint64_t id = h.add(r);
  while (h.preempted.empty()) ASSERT_TRUE(h.step());
  EXPECT_EQ(*h.preempted.begin(), Choice(id, 2));
  EXPECT_EQ(h.scheduler.find(id, 0)->status, SequenceStatus::running);
  h.run();
  EXPECT_FALSE(h.preempted.contains({first, 0}));
  h.expect_all_as_alone();
  h.expect_idle();
}

// -- Draft tokens -----------------------------------------------------------------------------

class Drafts : public ::testing::Test {
 protected:
  // A harness with one request that has its first token.
  void start(Options o = Options(), int max_tokens = 20) {
    h = std::make_unique<Harness>(o);
    auto r = h->request(6, max_tokens);
    id = h->add(r);
    truth = expect(*r, 0, max_tokens).output;
    ASSERT_TRUE(h->step());
    ASSERT_EQ(output().size(), 1u);
  }
  const Tokens& output() { return h->outputs[Choice(id, 0)]; }
  // Right guesses for the next `right` tokens, then wrong ones.
  Tokens guess(int right, int wrong) {
    Tokens drafts;
    for (int i = 0; i < right; ++i)
      drafts.push_back(truth.at(output().size() + static_cast<size_t>(i)));
    for (int i = 0; i < wrong; ++i)
      drafts.push_back((truth.at(output().size() + drafts.size()) + 1) % kVocab);
    return drafts;
  }
  Sequence& seq() { return *h->scheduler.find(id, 0); }

  std::unique_ptr<Harness> h;
  uint64_t id = 0;
  Tokens truth;
};

TEST_F(Drafts, TheRightPrefixIsAccepted) {
  for (int right = 0; right <= 4; ++right) {
    start();
    seq().draft_tokens = guess(right, 4 - right);
    ASSERT_TRUE(h->step());
    EXPECT_EQ(h->rows(), std::vector<int>{5});
    EXPECT_EQ(h->plan->items[0].num_drafts, 4);
    EXPECT_EQ(h->plan->num_samples, 5);
    EXPECT_EQ(output().size(), static_cast<size_t>(2 + right));
    EXPECT_EQ(h->updates.at(0).num_new_tokens, right + 1);
    EXPECT_TRUE(seq().draft_tokens.empty());
    EXPECT_EQ(seq().num_pending(), 1);
    // The slots of rejected drafts are given back.
    EXPECT_EQ(static_cast<int>(seq().block_table.size()), h->blocks.blocks_for(seq().num_tokens()));
    EXPECT_EQ(seq().num_committed_blocks, seq().num_computed / 4);
    h->run();
    h->expect_all_as_alone();
  }
}

TEST_F(Drafts, StopAmongAcceptedOnes) {
  Options o;
  h = std::make_unique<Harness>(o);
  auto r = h->request(6, 20);
  truth = expect(*r, 0, 20).output;
  r->params.stop_token_ids = {truth[2]};
  ASSERT_NE(truth[0], truth[2]);
  ASSERT_NE(truth[1], truth[2]);
  id = h->add(r);
  ASSERT_TRUE(h->step());
  seq().draft_tokens = guess(5, 0);
  ASSERT_TRUE(h->step());
  EXPECT_EQ(output(), Tokens(truth.begin(), truth.begin() + 3));
  EXPECT_EQ(h->ends.at({id, 0}).finish_reason, FinishReason::stop);
  h->expect_idle();
}

TEST_F(Drafts, NeverBeyondTheLastToken) {
  Options o;
  o.num_blocks = 3;  // 6 prompt and 7 output tokens need 12 slots
  start(o, 7);
  seq().draft_tokens = guess(6, 0);
  ASSERT_TRUE(h->step());
  EXPECT_EQ(h->plan->items[0].num_drafts, 5);
  EXPECT_EQ(h->ends.at({id, 0}).finish_reason, FinishReason::length);
  EXPECT_EQ(output(), truth);
}

TEST_F(Drafts, DroppedWhenRowsAreShort) {
  Options o;
  o.config.max_num_batched_tokens = 8;
  start(o);
  seq().draft_tokens = guess(10, 0);
  ASSERT_TRUE(h->step());
  EXPECT_EQ(h->plan->items[0].num_drafts, 7);  // nothing else wants the rows
  h->add(30, 2);
  seq().draft_tokens = guess(10, 0);
  ASSERT_TRUE(h->step());
  EXPECT_EQ(h->rows(), (std::vector<int>{1 + 3, 4}));  // prompts keep half of the rest
  h->run();
  h->expect_all_as_alone();
}

TEST_F(Drafts, DroppedRatherThanPreempting) {
  Options o;
  o.num_blocks = 4;
  o.prefix_caching = false;
  start(o, 11);
  h->add(4, 3);
  ASSERT_TRUE(h->step());  // 2 + 1 blocks in use, and the other's next token takes the last
  ASSERT_EQ(seq().num_tokens(), 8);
  seq().draft_tokens = guess(4, 0);
  ASSERT_TRUE(h->step());
  EXPECT_EQ(h->rows(), (std::vector<int>{1, 1}));
  EXPECT_TRUE(h->plan->preempted.empty());
  h->run();
  h->expect_all_as_alone();
}

}  // namespace
}  // namespace ni::test
