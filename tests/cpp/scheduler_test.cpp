#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"

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

namespace ni {
namespace {

constexpr int kVocab = 50;
constexpr int32_t kEos = 0;

using Choice = std::pair<uint64_t, int>;  // request id, choice
using Tokens = std::vector<int32_t>;

// What the fake model samples after `context`: it depends on every token before and on who asks.
int32_t sample(const Tokens& context, const Request& request, int choice) {
  uint64_t h = request.params.seed * 31 + static_cast<uint64_t>(choice);
  for (const int32_t token : context) h = (h ^ static_cast<uint64_t>(token)) * 0x100000001B3ull + 7;
  h ^= h >> 29;
  return static_cast<int32_t>((h * 0x9E3779B97F4A7C15ull >> 33) % kVocab);
}

// The output of a choice computed without any scheduler: what it must get, whatever else runs.
struct Expected {
  Tokens output;
  FinishReason reason = FinishReason::none;
};
Expected expect(const Request& request, int choice, int max_tokens) {
  const SamplingParams& p = request.params;
  Expected e;
  Tokens context = request.prompt;
  while (e.reason == FinishReason::none) {
    const int32_t token = sample(context, request, choice);
    context.push_back(token);
    e.output.push_back(token);
    const int count = static_cast<int>(e.output.size());
    const bool may_stop = count >= p.min_tokens;
    const auto& ids = p.stop_token_ids;
    if (may_stop && token == kEos && !p.ignore_eos) e.reason = FinishReason::stop;
    if (may_stop && std::find(ids.begin(), ids.end(), token) != ids.end())
      e.reason = FinishReason::stop;
    if (e.reason == FinishReason::none && count == max_tokens) e.reason = FinishReason::length;
  }
  return e;
}

// Plays the model: writes tokens into the slots that the plan names and samples from what it reads
// back from there, so wrong bookkeeping of blocks gives wrong text.
class FakeModel {
 public:
  explicit FakeModel(const BlockManager& blocks)
      : blocks_(blocks), slots_(static_cast<size_t>(blocks.num_blocks()) * size(), -1) {}

  Tokens run(const StepPlan& plan) {
    copy(plan.copies);
    std::set<int32_t> written;
    for (const ScheduledSequence& item : plan.items) write(item, written);
    Tokens samples;
    for (const ScheduledSequence& item : plan.items) read(item, samples);
    EXPECT_EQ(static_cast<int>(samples.size()), plan.num_samples);
    sampled_ = samples;
    return samples;
  }
  // A step that dies half-way leaves anything in the slots that it wrote.
  void spoil(const StepPlan& plan) {
    copy(plan.copies);
    for (const ScheduledSequence& item : plan.items)
      for (int i = 0; i < item.num_query; ++i) slot(*item.seq, item.seq->num_computed + i) = -2;
  }

 private:
  size_t size() const { return static_cast<size_t>(blocks_.block_size()); }

  // The copies of a step may run in any order or at once.
  void copy(const std::vector<BlockCopy>& copies) {
    std::set<int32_t> sources, targets;
    for (const BlockCopy& c : copies) {
      sources.insert(c.src);
      EXPECT_TRUE(targets.insert(c.dst).second);
    }
    for (const int32_t t : targets) EXPECT_FALSE(sources.contains(t));
    for (const BlockCopy& c : copies)
      std::copy_n(slots_.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(c.src) * size()),
                  size(),
                  slots_.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(c.dst) * size()));
  }
  int32_t& slot(const Sequence& seq, int position) {
    const auto p = static_cast<size_t>(position);
    return slots_[static_cast<size_t>(seq.block_table.at(p / size())) * size() + p % size()];
  }
  // A placeholder stands for what the step before has sampled.
  int32_t token(const Sequence& seq, int position) const {
    const auto p = static_cast<size_t>(position);
    if (p >= seq.tokens.size()) return seq.draft_tokens.at(p - seq.tokens.size());
    const int32_t t = seq.tokens[p];
    return t >= 0 ? t : sampled_.at(static_cast<size_t>(-1 - t));
  }
  void write(const ScheduledSequence& item, std::set<int32_t>& written) {
    const Sequence& seq = *item.seq;
    std::set<int32_t> own;
    for (int p = seq.num_computed; p < seq.num_computed + item.num_query; ++p) {
      slot(seq, p) = token(seq, p);
      own.insert(seq.block_table[static_cast<size_t>(p) / size()]);
    }
    for (const int32_t block : own) {
      EXPECT_EQ(blocks_.ref_count(block), 1) << "writes into a shared block";
      EXPECT_TRUE(written.insert(block).second) << "two sequences write into one block";
    }
  }
  void read(const ScheduledSequence& item, Tokens& samples) {
    const Sequence& seq = *item.seq;
    const int end = seq.num_computed + item.num_query;
    const int rows = seq.forks ? std::min(item.num_samples, 1) : item.num_samples;
    for (int row = 0; row < rows; ++row) {
      Tokens context;
      for (int p = 0; p <= end - rows + row; ++p) {
        context.push_back(slot(seq, p));
        EXPECT_EQ(context.back(), token(seq, p)) << "wrong contents at position " << p;
      }
      const int choices = seq.forks ? item.num_samples : 1;
      for (int k = 0; k < choices; ++k)
        samples.push_back(sample(context, *seq.request, seq.forks ? k : seq.choice));
    }
  }

  const BlockManager& blocks_;
  Tokens slots_;
  Tokens sampled_;  // by the last step
};

struct Options {
  int num_blocks = 64;
  int block_size = 4;
  bool prefix_caching = true;
  BlockHash hash = default_block_hash;
  SchedulerConfig config;
  Options() {
    config.max_num_seqs = 8;
    config.max_num_batched_tokens = 32;
    config.max_model_len = 200;
    config.vocab_size = kVocab;
    config.eos_token_ids = {kEos};
  }
};

// Scheduler, blocks, the fake model, and everything that came out.
class Harness {
 public:
  explicit Harness(const Options& o)
      : blocks({o.num_blocks, o.block_size, o.prefix_caching, o.hash}),
        scheduler(o.config, blocks),
        model(blocks) {}

  std::shared_ptr<Request> request(Tokens prompt, int max_tokens) {
    auto r = std::make_shared<Request>();
    r->id = next_id_++;
    r->prompt = std::move(prompt);
    r->params.max_tokens = max_tokens;
    r->params.seed = r->id;
    r->params.ignore_eos = true;
    return r;
  }
  // Prompt tokens that no other request has.
  std::shared_ptr<Request> request(int prompt_len, int max_tokens) {
    auto r = request(Tokens(static_cast<size_t>(prompt_len)), max_tokens);
    for (int i = 0; i < prompt_len; ++i)
      r->prompt[static_cast<size_t>(i)] =
          static_cast<int32_t>((r->id * 7 + static_cast<uint64_t>(i * i)) % kVocab);
    return r;
  }
  uint64_t add(std::shared_ptr<Request> r) {
    scheduler.add(r);
    ++received;
    requests[r->id] = r;
    return r->id;
  }
  uint64_t add(int prompt_len, int max_tokens) { return add(request(prompt_len, max_tokens)); }

  // One step; false if there was nothing to do.
  bool step(bool failing = false) {
    begin(failing);
    end();
    return !plan->empty();
  }
  // Its first half: the model has run, or died. Aborts may come in between.
  void begin(bool failing = false) {
    plan = steps.empty() ? &scheduler.schedule() : &scheduler.schedule_ahead();
    ++step_index;
    check_plan();
    scheduler.check_invariants();
    if (plan->empty()) return;
    failing = failing || (!steps.empty() && steps.back().failing);  // it reads what is not there
    if (failing) model.spoil(*plan);
    steps.push_back({plan, failing ? Tokens() : model.run(*plan), failing});
  }
  // The oldest step in flight comes to its end.
  void end() {
    updates.clear();
    if (steps.empty()) return;
    const Step step = std::exchange(steps.front(), {});
    steps.erase(steps.begin());
    for (const ScheduledSequence& item : step.plan->items)
      in_vain += item.seq->status == SequenceStatus::finished;
    if (step.failing) {
      scheduler.fail(updates);
    } else {
      scheduler.update(step.samples.data(), updates);
    }
    record(updates, step.samples);
    check_after();
  }
  // What an engine does that overlaps steps: the model runs the next one, then the one before is
  // updated. `visit` sees the updates. False if there was nothing to do.
  bool turn(bool failing, const std::function<void()>& visit) {
    bool worked = false;
    const auto end_one = [&] {
      const bool failed = steps.front().failing;
      do {
        end();
        visit();
      } while (failed && !steps.empty());
      worked = true;
    };
    if (!steps.empty() && !scheduler.can_run_ahead()) end_one();
    const bool was_ahead = !steps.empty();
    begin(failing);
    const bool launched = !plan->empty();
    ahead += was_ahead && launched;
    while (steps.size() > (launched ? 1u : 0u)) end_one();
    return worked || launched;
  }
  void abort(uint64_t id, int choice = -1, FinishReason reason = FinishReason::abort) {
    std::vector<SequenceUpdate> out;
    scheduler.abort(id, choice, reason, out);
    record(out, {});
    check_after();
  }
  void run(int most = 10000) {
    while (scheduler.has_work()) {
      ASSERT_GT(most--, 0) << "no end";
      ASSERT_TRUE(step()) << "an empty step though there is work";
    }
  }
  // Every choice ended by itself, with the output it would have had alone.
  void expect_all_as_alone() {
    for (const auto& [id, r] : requests)
      for (int k = 0; k < r->params.n; ++k) expect_as_alone(id, k);
  }
  void expect_as_alone(uint64_t id, int k) {
    const Expected e = expect(*requests.at(id), k, scheduler.clamp_max_tokens(*requests.at(id)));
    EXPECT_EQ(outputs[Choice(id, k)], e.output) << "request " << id << " choice " << k;
    ASSERT_TRUE(ends.contains(Choice(id, k))) << "request " << id << " choice " << k;
    EXPECT_EQ(ends.at(Choice(id, k)).finish_reason, e.reason);
  }
  void expect_idle() {
    EXPECT_FALSE(scheduler.has_work());
    const BlockManagerStats s = blocks.stats();
    EXPECT_EQ(s.num_free + s.num_cached, s.num_blocks);
    EXPECT_EQ(finished, received);
  }
  std::vector<Choice> scheduled() const {
    std::vector<Choice> result;
    for (const ScheduledSequence& item : plan->items)
      result.emplace_back(item.seq->request->id, item.seq->choice);
    return result;
  }
  std::vector<int> rows() const {
    std::vector<int> result;
    for (const ScheduledSequence& item : plan->items) result.push_back(item.num_query);
    return result;
  }

  BlockManager blocks;
  Scheduler scheduler;
  FakeModel model;
  const StepPlan* plan = nullptr;
  int step_index = 0;
  std::vector<SequenceUpdate> updates;
  std::map<uint64_t, std::shared_ptr<Request>> requests;
  std::map<Choice, Tokens> outputs;
  std::map<Choice, SequenceUpdate> ends;
  struct Step {
    const StepPlan* plan = nullptr;
    Tokens samples;
    bool failing = false;
  };
  std::vector<Step> steps;          // in flight
  uint64_t ahead = 0, in_vain = 0;  // steps scheduled ahead; rows of sequences that had ended
  std::map<Choice, int> last_token_step, largest_gap;
  std::set<Choice> preempted;
  uint64_t received = 0, finished = 0;  // requests

 private:
  void check_plan() {
    const SchedulerConfig& c = scheduler.config();
    int tokens = 0, samples = 0, decodes = 0;
    for (const ScheduledSequence& item : plan->items) {
      EXPECT_GT(item.num_query, 0);
      tokens += item.num_query;
      samples += item.num_samples;
      EXPECT_TRUE(!item.is_decode || decodes == &item - plan->items.data()) << "decodes first";
      decodes += item.is_decode;
      EXPECT_LE(item.seq->num_computed + item.num_query,
                static_cast<int>(item.seq->block_table.size()) * blocks.block_size());
    }
    EXPECT_EQ(tokens, plan->num_tokens);
    EXPECT_EQ(samples, plan->num_samples);
    EXPECT_EQ(decodes, plan->num_decodes);
    EXPECT_LE(tokens, c.max_num_batched_tokens);
    EXPECT_LE(scheduler.stats().num_running, c.max_num_seqs);
    if (!plan->preempted.empty()) {
      EXPECT_TRUE(plan->admitted.empty() && plan->resumed.empty());
    }
    for (const StepPlan::Event& e : plan->preempted) preempted.insert({e.request_id, e.choice});
  }
  void record(const std::vector<SequenceUpdate>& list, const Tokens& samples) {
    for (const SequenceUpdate& u : list) {
      const Choice who(u.request_id, u.choice);
      ASSERT_FALSE(ends.contains(who)) << "an update after the end";
      for (int i = 0; i < u.num_new_tokens; ++i)
        outputs[who].push_back(samples.at(static_cast<size_t>(u.first_sample + i)));
      if (u.num_new_tokens > 0) {
        const auto last = last_token_step.find(who);
        if (last != last_token_step.end())
          largest_gap[who] = std::max(largest_gap[who], step_index - last->second);
        last_token_step[who] = step_index;
      }
      if (u.finish_reason != FinishReason::none) ends[who] = u;
      finished += u.request_done;
      if (u.request_done) {
        const int n = requests.at(u.request_id)->params.n;
        for (int k = 0; k < n; ++k)
          EXPECT_TRUE(ends.contains({u.request_id, k})) << "a choice without an end";
      }
    }
  }
  void check_after() {
    ASSERT_NO_THROW(scheduler.check_invariants());
    const SchedulerStats s = scheduler.stats();
    EXPECT_EQ(received, finished + static_cast<uint64_t>(s.num_running_requests) +
                            static_cast<uint64_t>(s.num_waiting_requests));
  }

  uint64_t next_id_ = 0;
};

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "(no error)";
}

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
}  // namespace ni
