// Continuous batching (Yu et al., "Orca", OSDI 2022) with chunked prefill (Agrawal et al.,
// "Sarathi-Serve", OSDI 2024). It sees tokens and blocks only.
//
// A step's rows: first every running sequence that decodes (one row, or 1 + its draft tokens), then
// chunks of prompts in policy order, then chunks of newly admitted prompts, until
// max_num_batched_tokens is used up.
//
// Policy order: arrival (fcfs), or priority and then arrival; choices of a request by index. The
// first of the waiting sequences is admitted when seats, rows and blocks suffice for it; while they
// do not, nothing behind it is admitted either, because newcomers that need less would take every
// block that is given back and the first would never start. A preempted sequence keeps its place in
// that order, so it resumes before whatever is newer. Priority decides who waits and, when blocks
// run out, who is preempted; a request never takes the seat of a running one just because its
// priority is better.
//
// Preemption: before a step is put together, sequences are preempted, the last in policy order
// first, until every remaining decode can write its row. A preempted sequence gives up its blocks,
// keeps its output and is recomputed later (what the prefix cache still holds of it is reused). In
// a step that preempts, nothing is admitted: the blocks were freed for somebody.
//
// Bound on decode stall, with B = max_num_batched_tokens and S = max_num_seqs <= B.
//
// Not preempted: a running sequence that decodes gets its row in every step, whatever arrives, so
// its tokens are one step apart. Decodes come first, they are at most S, and a step has B rows. B
// also bounds how long a step takes.
//
// The first running sequence in policy order is never preempted: it was admitted only because it
// fits into the cache alone, so preempting the others always frees enough.
//
// Preempted, under fcfs: what is before it in the order is a fixed, finite set; everything running
// comes before everything waiting; and the first of all advances in every step, by a token or by at
// least R prompt rows. R = B - S + 1 (its own seat is not a decode), or half of that, rounded up,
// if other sequences have drafts, or max_scored_rows, if that is less and applies. So its next
// token comes at the latest after
//   sum over sequences o before it (ceil((prompt_o + max_tokens_o) / R) + max_tokens_o)
//   + ceil(its tokens / R)  steps.
//
// Preempted, under priority: the same, where `before it` includes requests with a smaller priority
// number that arrive while it waits. An endless stream of these starves it, as asked.
//
// Overlap: a step may be scheduled while the one before it is in flight. schedule_ahead() takes
// that one to succeed and every sequence in it to go on: placeholders (-1 - index of the sample)
// stand for its tokens until update() puts the real ones there. A sequence that turns out to have
// ended has had a row in vain in the step after; update() skips it, and the block of that row,
// which is not full of known tokens, never enters the prefix cache. Blocks are given back while a
// launched step still writes to them: whoever gets them writes in a later step. Where tokens must
// be known first (penalties, bad words of several tokens, drafts, forks, prompt log-probabilities),
// can_run_ahead() is false and the caller updates before it schedules; where a step would have to
// preempt, it comes out empty, to the same effect. So the steps are those without overlap, but for
// rows in vain, and for seats and blocks that come free one step later. In the bounds above, tokens
// are as many steps apart, each known to the host once the next step has been launched; to the sum,
// add one step for each sequence o.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "engine/block_manager.h"
#include "engine/sequence.h"

namespace ni {

enum class SchedulingPolicy : uint8_t { fcfs, priority };

struct SchedulerConfig {
  int max_num_seqs = 256;             // sequences in a step; a request with n choices takes n seats
  int max_num_batched_tokens = 2048;  // rows in a step; >= max_num_seqs
  // Rows in a step of prompts that want their log-probabilities; 0: any number. Such prompts are
  // cut to fit, so it needs chunked prefill.
  int max_scored_rows = 0;
  int max_model_len = 2048;  // prompt + output of a sequence; it ends there with `length`
  int max_waiting = 1024;    // requests never yet admitted; 0: unbounded
  int vocab_size = 0;        // for the check of token ids
  int max_logprobs = 20;
  SchedulingPolicy policy = SchedulingPolicy::fcfs;
  // false: the rows of a prompt are computed in one step, so it waits until that many are left over
  // by the decodes (only a recompute longer than max_num_batched_tokens is cut).
  bool enable_chunked_prefill = true;
  // Fill all seats, then admit nothing until the last sequence of the batch has ended; seats of
  // sequences that ended earlier stay idle. A preempted sequence joins the next batch, as its
  // first.
  bool static_batching = false;
  std::vector<int32_t> eos_token_ids;
};

// The waiting queue is full.
struct QueueFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct ScheduledSequence {
  Sequence* seq = nullptr;
  // Rows: tokens [num_computed, num_computed + num_query) of tokens + drafts.
  int num_query = 0;
  // Tokens to sample: 0 (prompt not finished), 1, 1 + drafts (one for each of the last rows), or n
  // (a leader whose prompt finishes: one for each choice, all from the last row).
  int num_samples = 0;
  int num_drafts = 0;  // leading draft_tokens that are fed
  bool is_decode = false;
};

// What a step does and why; valid, like the sequences it points to, until the next step is put
// together after its update() or fail().
struct StepPlan {
  std::vector<ScheduledSequence> items;  // decodes first
  std::vector<BlockCopy> copies;
  int num_tokens = 0;   // rows
  int num_decodes = 0;  // items that decode
  int num_samples = 0;  // <= max_num_seqs + draft tokens
  int num_scored = 0;   // rows of prompts that want their log-probabilities
  struct Event {
    uint64_t request_id;
    int choice;
  };
  std::vector<Event> admitted, resumed, preempted;
  bool empty() const { return items.empty(); }
};

// Tokens that a choice got in a step, or its end. Every choice of a request gets exactly one with a
// finish_reason. Copies, because a finished sequence is gone afterwards.
struct SequenceUpdate {
  uint64_t request_id = 0;
  int choice = 0;
  int item = -1;           // index in plan.items; -1: ended outside a step (abort, failure)
  int first_sample = 0;    // its first row among the plan's samples
  int num_new_tokens = 0;  // tokens appended: samples [first_sample, first_sample + num_new_tokens)
  int num_cached = 0;
  FinishReason finish_reason = FinishReason::none;
  int32_t stop_token = -1;
  bool request_done = false;  // the last choice of its request
};

struct SchedulerStats {
  int num_running = 0;           // sequences
  int num_waiting = 0;           // sequences in the queue, preempted ones included
  int num_running_requests = 0;  // requests with a sequence that has been admitted
  int num_waiting_requests = 0;  // requests never yet admitted
  uint64_t preemptions = 0;
};

class Scheduler {
 public:
  Scheduler(SchedulerConfig config, BlockManager& blocks);

  // Throws std::invalid_argument naming the parameter that is impossible; needs no lock.
  void validate(const Request& request) const;
  // Output limit of a request after clamping to max_model_len and to what fits alone in the cache:
  // P prompt and O output tokens take P + O - 1 slots (the last token is never fed), the full
  // blocks of the prompt being shared by the n choices. 0: not even one token fits.
  int clamp_max_tokens(const Request& request) const;
  // Throws as validate does, or QueueFull. The id must not be in use.
  void add(std::shared_ptr<const Request> request);
  // Ends a request (choice -1), or one choice of it; `reason` is abort, or stop when the text layer
  // found a stop string. Unknown ids are ignored (they may just have finished). Ended sequences go
  // to `out`. Allowed while a step is in flight: update() then skips their rows.
  void abort(uint64_t request_id, int choice, FinishReason reason,
             std::vector<SequenceUpdate>& out);
  bool has_work() const { return !running_.empty() || !waiting_.empty(); }

  // Puts the next step together. Unless it is empty, update() or fail() must follow.
  const StepPlan& schedule();
  // The same while a step is in flight, if can_run_ahead(). Then that step is updated first.
  const StepPlan& schedule_ahead();
  bool can_run_ahead() const;
  // The oldest step in flight has succeeded: `samples` [plan.num_samples] in the order of its
  // plan's items.
  void update(const int32_t* samples, std::vector<SequenceUpdate>& out);
  // The oldest step in flight has failed: its sequences end with FinishReason::error; nothing it
  // wrote is reused. The step that was scheduled ahead of its outcome must fail, too.
  void fail(std::vector<SequenceUpdate>& out);

  // A choice that has not ended; before its prompt is computed, a request has only choice 0. Null
  // if there is none. Draft tokens may be set on it while no step is in flight.
  Sequence* find(uint64_t request_id, int choice);

  SchedulerStats stats() const;
  const SchedulerConfig& config() const { return config_; }
  // Throws std::logic_error naming what is inconsistent (the block manager's invariants included).
  void check_invariants() const;

 private:
  // A request until its last choice has ended.
  struct RequestState {
    std::vector<std::unique_ptr<Sequence>> choices;  // null: not forked yet, or ended
    std::vector<char> ended;
    int num_live = 0;  // choices that have not ended
    bool admitted = false;
  };
  // The policy order.
  struct RunsBefore {
    bool by_priority = false;
    bool operator()(const Sequence* a, const Sequence* b) const;
  };

  // schedule()
  StepPlan& plan() { return plans_[next_]; }
  const StepPlan& put_together();
  void run_ahead();
  int make_room_for_decodes();
  int split_running();
  void preempt_last();
  void schedule_decodes(int spare_blocks);
  bool schedule_prefill(Sequence& seq);
  bool may_be_cut(const Sequence& seq) const;
  void admit_waiting();
  bool take_blocks(Sequence& seq);
  void start_running(Sequence& seq);
  // update()
  bool end_oldest();
  void fork_choices(const int32_t* samples, SequenceUpdate update, Sequence& leader,
                    std::vector<SequenceUpdate>& out);
  void deliver(const int32_t* samples, SequenceUpdate update, Sequence& seq, int num_drafts,
               std::vector<SequenceUpdate>& out);
  FinishReason finish_reason_after(Sequence& seq, int32_t token) const;
  // The end of a choice
  void end_choice(RequestState& state, SequenceUpdate& update);
  void end_request(uint64_t request_id, SequenceUpdate update, std::vector<SequenceUpdate>& out);
  void retire(std::unique_ptr<Sequence>& owner);
  void drop_ended();

  int seats_of(const Sequence& seq) const { return seq.forks ? seq.request->params.n : 1; }
  int rows_left(const Sequence& seq) const;
  bool is_blocked(const Sequence& seq) const {
    return &seq == blocked_ && blocked_version_ == blocks_.version();
  }
  int max_tokens_that_fit(int num_prompt, int n) const;
  int first_blocks(const Sequence& seq) const;

  SchedulerConfig config_;
  BlockManager& blocks_;
  std::unordered_map<uint64_t, RequestState> requests_;
  std::vector<Sequence*> running_;           // in policy order
  std::set<Sequence*, RunsBefore> waiting_;  // new and preempted ones
  // Ended since the last schedule() and since the one before, kept for whoever reads the plans.
  std::vector<std::unique_ptr<Sequence>> ended_, ended_before_;
  // First of the waiting, for which blocks were lacking: no need to ask again before the block
  // manager's version has changed.
  const Sequence* blocked_ = nullptr;
  uint64_t blocked_version_ = 0;
  int seats_ = 0;         // taken by running_
  int num_admitted_ = 0;  // requests
  uint64_t next_arrival_ = 0;
  uint64_t preemptions_ = 0;
  bool any_ended_ = false;  // running_ holds ended sequences

  std::array<StepPlan, 2> plans_;
  size_t oldest_ = 0;         // of those in flight
  size_t num_in_flight_ = 0;  // at most 2
  size_t next_ = 0;           // the plan that schedule() fills
  bool is_ahead_ = false;     // placeholders stand for the samples of the oldest
  // Reused from step to step.
  std::vector<Sequence*> decodes_, prefills_, forked_;
  std::vector<int32_t> shared_blocks_;
};

}  // namespace ni
