// A scheduler with a fake model behind it, whose outputs depend on all that a sequence has seen:
// what the suites of the scheduler share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "engine/scheduler.h"

namespace ni::test {

constexpr int kVocab = 50;
constexpr int32_t kEos = 0;

using Choice = std::pair<uint64_t, int>;  // request id, choice
using Tokens = std::vector<int32_t>;

// What the fake model samples after `context`: it depends on every token before and on who asks.
inline int32_t sample(const Tokens& context, const Request& request, int choice) {
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
inline Expected expect(const Request& request, int choice, int max_tokens) {
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

inline std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "(no error)";
}

}  // namespace ni::test
