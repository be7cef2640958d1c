#include "engine/scheduler.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "core/check.h"

namespace ni {

namespace {

template <typename T>
bool contains(const std::vector<T>& list, const T& value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

void check_tokens(const char* field, const std::vector<int32_t>& tokens, int vocab_size) {
  for (size_t i = 0; i < tokens.size(); ++i)
    check_arg(tokens[i] >= 0 && tokens[i] < vocab_size, field, "[", i, "] is ", tokens[i],
              ", but the vocabulary has ", vocab_size, " tokens (ids 0 to ", vocab_size - 1, ")");
}

// What the next row of such a request does depends on the tokens before it, beyond their number.
bool needs_known_tokens(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f ||
         p.frequency_penalty != 0.0f ||
         std::any_of(p.bad_words.begin(), p.bad_words.end(),
                     [](const std::vector<int32_t>& word) { return word.size() > 1; });
}

// Comparisons are written so that NaN fails them.
void check_sampling_params(const SamplingParams& p, const SchedulerConfig& c) {
  check_arg(p.n >= 1 && p.n <= c.max_num_seqs, "n must be in [1, ", c.max_num_seqs,
            "] (max_num_seqs), got ", p.n);
  check_arg(p.temperature >= 0 && std::isfinite(p.temperature),
            "temperature must be a finite number >= 0, got ", p.temperature);
  check_arg(p.top_p > 0 && p.top_p <= 1, "top_p must be in (0, 1], got ", p.top_p);
  check_arg(p.top_k >= -1, "top_k must be at least 1, or 0 or -1 for off, got ", p.top_k);
  check_arg(p.min_p >= 0 && p.min_p <= 1, "min_p must be in [0, 1], got ", p.min_p);
  check_arg(p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty),
            "repetition_penalty must be a finite number > 0, got ", p.repetition_penalty);
  check_arg(p.presence_penalty >= -2 && p.presence_penalty <= 2,
            "presence_penalty must be in [-2, 2], got ", p.presence_penalty);
  check_arg(p.frequency_penalty >= -2 && p.frequency_penalty <= 2,
            "frequency_penalty must be in [-2, 2], got ", p.frequency_penalty);
  check_arg(p.max_tokens >= 1 || p.max_tokens == -1,
            "max_tokens must be at least 1, or -1 for as many as fit, got ", p.max_tokens);
  check_arg(p.min_tokens >= 0, "min_tokens must be at least 0, got ", p.min_tokens);
  check_arg(p.max_tokens == -1 || p.min_tokens <= p.max_tokens, "min_tokens must be at most ",
            p.max_tokens, " (max_tokens), got ", p.min_tokens);
  check_arg(p.logprobs >= -1 && p.logprobs <= c.max_logprobs, "logprobs must be in [-1, ",
            c.max_logprobs, "] (max_logprobs), got ", p.logprobs);
  check_arg(p.prompt_logprobs >= -1 && p.prompt_logprobs <= c.max_logprobs,
            "prompt_logprobs must be in [-1, ", c.max_logprobs, "] (max_logprobs), got ",
            p.prompt_logprobs);
  check_tokens("stop_token_ids", p.stop_token_ids, c.vocab_size);
  check_tokens("allowed_token_ids", p.allowed_token_ids, c.vocab_size);
  const auto may_come = [&](int32_t token) {  // as the first token
    const bool stops =
        contains(p.stop_token_ids, token) || (!p.ignore_eos && contains(c.eos_token_ids, token));
    return (p.min_tokens == 0 || !stops) && !contains(p.bad_words, std::vector<int32_t>{token});
  };
  check_arg(
      p.allowed_token_ids.empty() ||
          std::any_of(p.allowed_token_ids.begin(), p.allowed_token_ids.end(), may_come),
      "allowed_token_ids leaves no token: bad_words, or min_tokens with stop tokens, ban all of "
      "them");
  for (size_t i = 0; i < p.bad_words.size(); ++i) {
    check_arg(!p.bad_words[i].empty(), "bad_words[", i, "] must not be empty");
    check_tokens(concat("bad_words[", i, "]").c_str(), p.bad_words[i], c.vocab_size);
  }
  for (const TokenBias& b : p.logit_bias) {
    check_arg(b.token >= 0 && b.token < c.vocab_size, "logit_bias names token ", b.token,
              ", but the vocabulary has ", c.vocab_size, " tokens (ids 0 to ", c.vocab_size - 1,
              ")");
    check_arg(std::isfinite(b.bias) || (b.bias < 0 && std::isinf(b.bias)), "logit_bias of token ",
              b.token, " must be a finite number or -inf (a ban), got ", b.bias);
  }
}

}  // namespace

Scheduler::Scheduler(SchedulerConfig config, BlockManager& blocks)
    : config_(std::move(config)),
      blocks_(blocks),
      waiting_(RunsBefore{config_.policy == SchedulingPolicy::priority}) {
  const SchedulerConfig& c = config_;
  check_arg(c.max_num_seqs >= 1, "max_num_seqs must be at least 1, got ", c.max_num_seqs);
  check_arg(c.max_num_batched_tokens >= c.max_num_seqs, "max_num_batched_tokens must be at least ",
            c.max_num_seqs, " (max_num_seqs), got ", c.max_num_batched_tokens);
  check_arg(c.max_model_len >= 2, "max_model_len must be at least 2, got ", c.max_model_len);
  check_arg(c.max_waiting >= 0, "max_waiting must be at least 0, got ", c.max_waiting);
  check_arg(c.vocab_size >= 1, "vocab_size must be at least 1, got ", c.vocab_size);
  check_arg(c.max_logprobs >= 0, "max_logprobs must be at least 0, got ", c.max_logprobs);
  check_arg(c.max_scored_rows == 0 || (c.max_scored_rows > 0 && c.enable_chunked_prefill),
            "max_scored_rows must be 0, or above with chunked prefill, got ", c.max_scored_rows);
}

bool Scheduler::RunsBefore::operator()(const Sequence* a, const Sequence* b) const {
  if (by_priority && a->request->priority != b->request->priority)
    return a->request->priority < b->request->priority;
  return std::tie(a->arrival, a->choice) < std::tie(b->arrival, b->choice);
}

// -- Requests come ----------------------------------------------------------------------------

// The longest output with which n choices of a prompt fit into an otherwise empty cache.
int Scheduler::max_tokens_that_fit(int num_prompt, int n) const {
  if (blocks_.blocks_for(num_prompt) > blocks_.num_blocks()) return 0;
  const int64_t shared = num_prompt / blocks_.block_size();
  const int64_t own = (blocks_.num_blocks() - shared) / n;
  if (own == 0) return 1;  // the first token needs the prompt's slots only
  const int64_t slots = (shared + own) * blocks_.block_size();
  return static_cast<int>(std::min<int64_t>(slots - num_prompt + 1, config_.max_model_len));
}

int Scheduler::clamp_max_tokens(const Request& request) const {
  const int num_prompt = static_cast<int>(request.prompt.size());
  const int limit = std::min(config_.max_model_len - num_prompt,
                             max_tokens_that_fit(num_prompt, request.params.n));
  const int wanted = request.params.max_tokens;
  return wanted == -1 ? limit : std::min(limit, wanted);
}

void Scheduler::validate(const Request& request) const {
  const auto length = request.prompt.size();
  check_arg(length > 0, "the prompt is empty; it needs at least one token");
  check_arg(length < static_cast<size_t>(config_.max_model_len), "the prompt has ", length,
            " tokens, but with max_model_len ", config_.max_model_len, " it can have at most ",
            config_.max_model_len - 1);
  check_arg(
      config_.enable_chunked_prefill || std::cmp_less_equal(length, config_.max_num_batched_tokens),
      "the prompt has ", length, " tokens, but without chunked prefill it can have at most ",
      config_.max_num_batched_tokens, " (max_num_batched_tokens)");
  check_tokens("prompt", request.prompt, config_.vocab_size);
  const SamplingParams& p = request.params;
  check_sampling_params(p, config_);

  const int num_prompt = static_cast<int>(length);
  const int fits = max_tokens_that_fit(num_prompt, p.n);
  const int64_t capacity = int64_t{blocks_.num_blocks()} * blocks_.block_size();
  check_arg(fits > 0, "the prompt has ", length, " tokens, but the cache holds only ", capacity);
  check_arg(std::min(p.max_tokens, config_.max_model_len - num_prompt) <= fits, "a prompt of ",
            length, " tokens with n ", p.n, " and max_tokens ", p.max_tokens,
            " can never fit into the cache, which holds ", capacity,
            " tokens; max_tokens can be at most ", fits);
}

void Scheduler::add(std::shared_ptr<const Request> request) {
  validate(*request);
  check_arg(!requests_.contains(request->id), "request id ", request->id, " is already in use");
  const auto num_new = requests_.size() - static_cast<size_t>(num_admitted_);
  if (config_.max_waiting > 0 && std::cmp_greater_equal(num_new, config_.max_waiting))
    throw QueueFull(concat("the waiting queue is full (", config_.max_waiting, " requests)"));

  const auto n = static_cast<size_t>(request->params.n);
  auto seq = std::make_unique<Sequence>();
  seq->arrival = next_arrival_++;
  seq->tokens = request->prompt;
  seq->num_prompt = seq->num_tokens();
  seq->max_tokens = clamp_max_tokens(*request);
  seq->forks = n > 1;
  seq->request = std::move(request);
  waiting_.insert(seq.get());
  RequestState& state = requests_[seq->request->id];
  state.num_live = static_cast<int>(n);
  state.ended.assign(n, 0);
  state.choices.resize(n);
  state.choices[0] = std::move(seq);
}

// -- schedule() -------------------------------------------------------------------------------

const StepPlan& Scheduler::schedule() {
  check_invariant(num_in_flight_ == 0, "the step before has not been updated");
  return put_together();
}

const StepPlan& Scheduler::schedule_ahead() {
  check_invariant(num_in_flight_ == 1, "a step is scheduled ahead of the outcome of one other");
  run_ahead();
  return put_together();
}

const StepPlan& Scheduler::put_together() {
  // A step in flight may have rows of sequences that ended since the last call, when it was
  // scheduled; what ended before that is in no plan any more.
  ended_before_.swap(ended_);
  ended_.clear();
  if (num_in_flight_ == 0) ended_before_.clear();
  next_ = (oldest_ + num_in_flight_) % plans_.size();
  plan().items.clear();
  plan().copies.clear();
  plan().admitted.clear();
  plan().resumed.clear();
  plan().preempted.clear();
  plan().num_tokens = plan().num_decodes = plan().num_samples = plan().num_scored = 0;

  const int spare_blocks = make_room_for_decodes();
  if (spare_blocks < 0) return plan();
  schedule_decodes(spare_blocks);
  for (Sequence* seq : prefills_)
    if (!schedule_prefill(*seq)) break;
  if (plan().preempted.empty()) admit_waiting();
  num_in_flight_ += !plan().empty();
  return plan();
}

bool Scheduler::can_run_ahead() const {
  if (num_in_flight_ != 1) return num_in_flight_ == 0;
  const auto drafted = [](const Sequence* seq) { return !seq->draft_tokens.empty(); };
  if (std::any_of(running_.begin(), running_.end(), drafted)) return false;
  const std::vector<ScheduledSequence>& items = plans_[oldest_].items;
  return std::all_of(items.begin(), items.end(), [](const ScheduledSequence& item) {
    const Sequence& seq = *item.seq;
    const SamplingParams& p = seq.request->params;
    // Rows that are not samples shift those of everybody behind, whether it still runs or not.
    if (!item.is_decode && p.prompt_logprobs >= 0) return false;
    if (seq.status != SequenceStatus::running) return true;
    if (item.num_samples == 0) return true;
    if (item.num_samples > 1 || seq.forks) return false;
    if (seq.num_output() + 1 >= seq.max_tokens) return true;  // the token is its last
    return !needs_known_tokens(p);
  });
}

// The step in flight is taken to succeed: its rows are computed, and a placeholder stands for each
// token that it samples.
void Scheduler::run_ahead() {
  if (std::exchange(is_ahead_, true)) return;
  int sample = 0;
  for (const ScheduledSequence& item : plans_[oldest_].items) {
    Sequence& seq = *item.seq;
    if (seq.status == SequenceStatus::running) {
      seq.num_computed += item.num_query;
      if (item.num_samples > 0) seq.tokens.push_back(-1 - sample);
    }
    sample += item.num_samples;
  }
}

// Sorts the running sequences into decodes_ and prefills_. Returns the blocks that one row for each
// decode takes. Prefills take none: they got the blocks of all known tokens when they were
// admitted.
int Scheduler::split_running() {
  decodes_.clear();
  prefills_.clear();
  shared_blocks_.clear();
  int needed = 0;
  for (Sequence* seq : running_) {
    if (seq->num_output() >= seq->max_tokens) continue;  // its last token is on the way
    if (seq->num_pending() > 1 || seq->num_output() == 0) {
      prefills_.push_back(seq);
      continue;
    }
    decodes_.push_back(seq);
    const int own = blocks_.blocks_needed(*seq, seq->num_tokens());
    needed += own;
    const auto last = static_cast<size_t>(seq->num_computed / blocks_.block_size());
    if (own > 0 && last < seq->block_table.size()) shared_blocks_.push_back(seq->block_table[last]);
  }
  // If all sharers of a block write in this step, the last of them needs no copy.
  std::sort(shared_blocks_.begin(), shared_blocks_.end());
  for (size_t i = 0, end = 0; i < shared_blocks_.size(); i = end) {
    while (end < shared_blocks_.size() && shared_blocks_[end] == shared_blocks_[i]) ++end;
    needed -= std::cmp_equal(end - i, blocks_.ref_count(shared_blocks_[i]));
  }
  return needed;
}

// Preempts until every remaining decode can have its row; returns the blocks left over after that.
// If it would have to while a step is in flight, nothing is done and -1 returned: the outcome of
// that step may give blocks back, and a sequence whose tokens are not all known is never preempted.
// All of it happens before any block is handed out: a block that is freed here can never be the
// source of a copy in this step.
int Scheduler::make_room_for_decodes() {
  int needed = split_running();
  while (needed > blocks_.num_available()) {
    if (num_in_flight_ > 0) return -1;
    preempt_last();
    needed = split_running();
  }
  return blocks_.num_available() - needed;
}

void Scheduler::preempt_last() {
  check_invariant(running_.size() > 1, "a sequence was admitted that does not fit alone");
  Sequence& seq = *running_.back();
  running_.pop_back();
  seats_ -= seats_of(seq);
  blocks_.free(seq);
  blocked_ = nullptr;
  seq.draft_tokens.clear();
  seq.status = SequenceStatus::waiting;
  ++seq.preemptions;
  ++preemptions_;
  waiting_.insert(&seq);
  plan().preempted.push_back({seq.request->id, seq.choice});
}

// Drafts are used while rows and spare blocks last; half of the rows are left to prompts, if any.
void Scheduler::schedule_decodes(int spare_blocks) {
  plan().num_decodes = static_cast<int>(decodes_.size());
  int draft_rows = config_.max_num_batched_tokens - plan().num_decodes;
  if (!prefills_.empty() || !waiting_.empty()) draft_rows /= 2;
  for (Sequence* seq : decodes_) {
    int drafts = 0;
    if (!seq->draft_tokens.empty()) {
      // A draft beyond the last token that may still come would need a slot that was never granted.
      const int useful = seq->max_tokens - seq->num_output() - 1;
      drafts = std::min({static_cast<int>(seq->draft_tokens.size()), useful, draft_rows});
      const int extra = blocks_.blocks_needed(*seq, seq->num_tokens() + drafts) -
                        blocks_.blocks_needed(*seq, seq->num_tokens());
      if (extra > spare_blocks) drafts = 0;
      if (drafts > 0) spare_blocks -= extra;
      draft_rows -= drafts;
      seq->draft_tokens.resize(static_cast<size_t>(drafts));
    }
    const bool grown = blocks_.grow(*seq, seq->num_tokens() + drafts, plan().copies);
    check_invariant(grown, "a decode lacks the blocks that were counted for it");
    plan().items.push_back({seq, 1 + drafts, 1 + drafts, drafts, true});
    plan().num_tokens += 1 + drafts;
  }
  plan().num_samples = plan().num_tokens;
}

// False if the sequence, and so whatever comes after it, gets no rows in this step.
bool Scheduler::schedule_prefill(Sequence& seq) {
  seq.draft_tokens.clear();
  const int pending = seq.num_pending();
  const int rows = std::min(pending, rows_left(seq));
  if (rows == 0 || (rows < pending && !may_be_cut(seq))) return false;
  const int samples = rows == pending ? seats_of(seq) : 0;
  plan().items.push_back({&seq, rows, samples, 0, false});
  plan().num_tokens += rows;
  plan().num_samples += samples;
  if (seq.request->params.prompt_logprobs >= 0) plan().num_scored += rows;
  return true;
}

// Rows that are left in this step for a prompt.
int Scheduler::rows_left(const Sequence& seq) const {
  const StepPlan& plan = plans_[next_];
  const int rows = config_.max_num_batched_tokens - plan.num_tokens;
  const bool is_limited = config_.max_scored_rows > 0 && seq.request->params.prompt_logprobs >= 0;
  return is_limited ? std::min(rows, config_.max_scored_rows - plan.num_scored) : rows;
}

bool Scheduler::may_be_cut(const Sequence& seq) const {
  return config_.enable_chunked_prefill || seq.num_tokens() > config_.max_num_batched_tokens;
}

void Scheduler::admit_waiting() {
  if (config_.static_batching && !running_.empty()) return;
  while (!waiting_.empty()) {
    Sequence& seq = **waiting_.begin();
    if (is_blocked(seq) || seats_ + seats_of(seq) > config_.max_num_seqs) return;
    // A static batch takes its seats at once, even if its prompts need several steps.
    if (!config_.static_batching && rows_left(seq) == 0) return;
    if (!take_blocks(seq)) return;
    waiting_.erase(waiting_.begin());
    start_running(seq);
    schedule_prefill(seq);
  }
}

// Blocks with which a sequence may start: for its known tokens and the first step of decoding, so
// that it is not preempted right away.
int Scheduler::first_blocks(const Sequence& seq) const {
  const int last_slot = seq.num_prompt + seq.max_tokens - 1;
  const int slots = std::min(seq.num_tokens() + 1, last_slot);
  const int choices = slots > seq.num_tokens() ? seats_of(seq) : 1;
  const int shared = seq.num_tokens() / blocks_.block_size();
  return shared + choices * (blocks_.blocks_for(slots) - shared);
}

// Gives a waiting sequence the blocks of all its known tokens, cached ones first. False, and
// nothing changed, if it has to wait.
bool Scheduler::take_blocks(Sequence& seq) {
  const auto max_len = seq.num_prompt + seq.max_tokens;
  seq.tokens.reserve(static_cast<size_t>(max_len));  // steps shall not allocate memory
  seq.block_table.reserve(static_cast<size_t>(blocks_.blocks_for(max_len)));
  // Prompt log-probabilities need the rows of the whole prompt, once.
  const bool reuses = seq.request->params.prompt_logprobs < 0 || seq.num_output() > 0;
  if (reuses) blocks_.take_prefix(seq);
  const bool fits =
      first_blocks(seq) - static_cast<int>(seq.block_table.size()) <= blocks_.num_available();
  const bool whole =
      may_be_cut(seq) || config_.static_batching || seq.num_pending() <= rows_left(seq);
  if (fits && whole) {
    const bool grown = blocks_.grow(seq, seq.num_tokens(), plan().copies);
    check_invariant(grown, "an admitted sequence lacks the blocks that were counted for it");
    return true;
  }
  if (reuses) blocks_.return_prefix(seq);
  if (!fits) {
    blocked_ = &seq;
    blocked_version_ = blocks_.version();
  }
  return false;
}

void Scheduler::start_running(Sequence& seq) {
  const bool first_time = seq.preemptions == 0;
  if (first_time) seq.num_cached = seq.num_computed;
  (first_time ? plan().admitted : plan().resumed).push_back({seq.request->id, seq.choice});
  RequestState& state = requests_.at(seq.request->id);
  num_admitted_ += !std::exchange(state.admitted, true);
  seq.status = SequenceStatus::running;
  seats_ += seats_of(seq);
  running_.insert(std::upper_bound(running_.begin(), running_.end(), &seq, waiting_.key_comp()),
                  &seq);
}

// -- update() ---------------------------------------------------------------------------------

void Scheduler::update(const int32_t* samples, std::vector<SequenceUpdate>& out) {
  check_invariant(num_in_flight_ > 0, "update without a step");
  const StepPlan& done = plans_[oldest_];
  const bool was_ahead = end_oldest();
  SequenceUpdate update;
  for (const ScheduledSequence& item : done.items) {
    ++update.item;
    Sequence& seq = *item.seq;
    // Else it was aborted while the step ran, or ended by the step before: rows in vain.
    if (seq.status == SequenceStatus::running) {
      update.request_id = seq.request->id;
      update.choice = seq.choice;
      update.num_cached = seq.num_cached;
      if (!was_ahead) seq.num_computed += item.num_query - item.num_drafts;
      if (item.num_samples == 0) {
        blocks_.commit(seq);
      } else if (seq.forks) {
        fork_choices(samples, update, seq, out);
      } else {
        deliver(samples, update, seq, item.num_drafts, out);
      }
    }
    update.first_sample += item.num_samples;
  }
  drop_ended();
}

// The oldest step in flight has come to its end. True if the next one was scheduled ahead of that.
bool Scheduler::end_oldest() {
  if (--num_in_flight_ > 0) oldest_ = (oldest_ + 1) % plans_.size();
  return std::exchange(is_ahead_, false);
}

// The prompt of n choices is computed: n - 1 sequences split off, which share its blocks.
void Scheduler::fork_choices(const int32_t* samples, SequenceUpdate update, Sequence& leader,
                             std::vector<SequenceUpdate>& out) {
  RequestState& state = requests_.at(update.request_id);
  blocks_.commit(leader);
  seats_ -= seats_of(leader);
  leader.forks = false;
  forked_.assign(1, &leader);
  for (size_t k = 1; k < state.choices.size(); ++k) {
    if (state.ended[k]) continue;
    auto child = std::make_unique<Sequence>(leader);
    child->choice = static_cast<int>(k);
    child->tokens.reserve(leader.tokens.capacity());
    child->block_table.clear();
    child->block_table.reserve(leader.block_table.capacity());
    blocks_.fork(leader, *child);
    forked_.push_back(child.get());
    state.choices[k] = std::move(child);
  }
  seats_ += static_cast<int>(forked_.size());
  const auto place =
      std::upper_bound(running_.begin(), running_.end(), &leader, waiting_.key_comp());
  running_.insert(place, forked_.begin() + 1, forked_.end());
  // Choice 0 may have been aborted before; then its sequence was there for the others only.
  if (state.ended[0]) retire(state.choices[0]);
  const int first = update.first_sample;
  for (Sequence* seq : forked_) {
    if (seq->status != SequenceStatus::running) continue;
    update.choice = seq->choice;
    update.first_sample = first + seq->choice;
    deliver(samples, update, *seq, 0, out);
  }
}

// Appends the sampled token and, as long as the drafts prove right, those sampled behind them.
void Scheduler::deliver(const int32_t* samples, SequenceUpdate update, Sequence& seq,
                        int num_drafts, std::vector<SequenceUpdate>& out) {
  const int32_t* sampled = samples + update.first_sample;
  for (int i = 0; i <= num_drafts; ++i) {
    if (seq.tokens.back() < 0) seq.tokens.pop_back();  // the placeholder
    seq.tokens.push_back(sampled[i]);
    ++update.num_new_tokens;
    update.finish_reason = finish_reason_after(seq, sampled[i]);
    if (update.finish_reason != FinishReason::none || i == num_drafts ||
        seq.draft_tokens[static_cast<size_t>(i)] != sampled[i])
      break;
  }
  seq.num_computed += update.num_new_tokens - 1;  // rows of accepted drafts
  blocks_.commit(seq);
  if (update.finish_reason != FinishReason::none) {
    update.stop_token = seq.stop_token;
    end_choice(requests_.at(update.request_id), update);
  } else if (num_drafts > 0) {
    blocks_.shrink(seq, seq.num_tokens());
    seq.draft_tokens.clear();
  }
  out.push_back(update);
}

FinishReason Scheduler::finish_reason_after(Sequence& seq, int32_t token) const {
  const SamplingParams& p = seq.request->params;
  const int num_output = seq.num_output();
  if (num_output >= p.min_tokens) {
    if (!p.ignore_eos && contains(config_.eos_token_ids, token)) return FinishReason::stop;
    if (contains(p.stop_token_ids, token)) {
      seq.stop_token = token;
      return FinishReason::stop;
    }
  }
  return num_output >= seq.max_tokens ? FinishReason::length : FinishReason::none;
}

void Scheduler::fail(std::vector<SequenceUpdate>& out) {
  check_invariant(num_in_flight_ > 0, "fail without a step");
  const StepPlan& failed = plans_[oldest_];
  end_oldest();
  for (const ScheduledSequence& item : failed.items) {
    if (item.seq->status != SequenceStatus::running) continue;
    SequenceUpdate update;
    update.request_id = item.seq->request->id;
    update.choice = item.seq->forks ? -1 : item.seq->choice;
    update.finish_reason = FinishReason::error;
    end_request(update.request_id, update, out);
  }
  drop_ended();
}

// -- The end of a choice ----------------------------------------------------------------------

void Scheduler::abort(uint64_t request_id, int choice, FinishReason reason,
                      std::vector<SequenceUpdate>& out) {
  SequenceUpdate update;
  update.request_id = request_id;
  update.choice = choice;
  update.finish_reason = reason;
  end_request(request_id, update, out);
  drop_ended();
}

// Ends update.choice, or with -1 all choices that have not ended.
void Scheduler::end_request(uint64_t request_id, SequenceUpdate update,
                            std::vector<SequenceUpdate>& out) {
  const auto found = requests_.find(request_id);
  if (found == requests_.end()) return;
  RequestState& state = found->second;
  const int n = static_cast<int>(state.choices.size());
  const int first = update.choice == -1 ? 0 : update.choice;
  const int last = update.choice == -1 ? n - 1 : update.choice;
  for (int k = first; k <= last && k < n && !update.request_done; ++k) {
    if (k < 0 || state.ended[static_cast<size_t>(k)]) continue;
    const Sequence* seq = state.choices[static_cast<size_t>(k)].get();
    update.choice = k;
    update.num_cached = seq != nullptr ? seq->num_cached : state.choices[0]->num_cached;
    end_choice(state, update);
    out.push_back(update);
  }
}

// Takes finish_reason from the update and completes it. Forgets the request after its last choice.
void Scheduler::end_choice(RequestState& state, SequenceUpdate& update) {
  const auto k = static_cast<size_t>(update.choice);
  state.ended[k] = 1;
  update.request_done = --state.num_live == 0;
  if (Sequence* seq = state.choices[k].get()) {
    seq->finish_reason = update.finish_reason;
    // A leader still computes the prompt for the other choices.
    if (!seq->forks || update.request_done) retire(state.choices[k]);
  }
  if (!update.request_done) return;
  if (state.choices[0]) retire(state.choices[0]);  // a leader whose own choice had been aborted
  num_admitted_ -= state.admitted;
  requests_.erase(update.request_id);
}

void Scheduler::retire(std::unique_ptr<Sequence>& owner) {
  Sequence& seq = *owner;
  if (seq.status == SequenceStatus::waiting) {
    waiting_.erase(&seq);
  } else {
    seats_ -= seats_of(seq);
    any_ended_ = true;
  }
  blocks_.free(seq);
  blocked_ = nullptr;
  seq.status = SequenceStatus::finished;
  ended_.push_back(std::move(owner));
}

void Scheduler::drop_ended() {
  if (!std::exchange(any_ended_, false)) return;
  std::erase_if(running_,
                [](const Sequence* seq) { return seq->status == SequenceStatus::finished; });
}

// -- Looking in -------------------------------------------------------------------------------

Sequence* Scheduler::find(uint64_t request_id, int choice) {
  const auto found = requests_.find(request_id);
  if (found == requests_.end() || choice < 0) return nullptr;
  const RequestState& state = found->second;
  const auto k = static_cast<size_t>(choice);
  return k < state.choices.size() && !state.ended[k] ? state.choices[k].get() : nullptr;
}

SchedulerStats Scheduler::stats() const {
  SchedulerStats s;
  s.num_running = static_cast<int>(running_.size());
  s.num_waiting = static_cast<int>(waiting_.size());
  s.num_running_requests = num_admitted_;
  s.num_waiting_requests = static_cast<int>(requests_.size()) - num_admitted_;
  s.preemptions = preemptions_;
  return s;
}

void Scheduler::check_invariants() const {
  const RunsBefore before = waiting_.key_comp();
  check_invariant(std::is_sorted(running_.begin(), running_.end(), before),
                  "the running sequences are out of order");
  check_invariant(config_.policy != SchedulingPolicy::fcfs || running_.empty() ||
                      waiting_.empty() || before(running_.back(), *waiting_.begin()),
                  "a sequence overtook a waiting one");
  int seats = 0;
  std::vector<const Sequence*> holders;
  for (const Sequence* seq : running_) {
    check_invariant(seq->status == SequenceStatus::running, "a running sequence is not running");
    check_invariant(seq->num_pending() >= 1, "a running sequence has nothing to compute");
    check_invariant(seq->num_output() < seq->max_tokens + is_ahead_,
                    "a running sequence is over its limit");
    seats += seats_of(*seq);
    holders.push_back(seq);
  }
  check_invariant(seats == seats_ && seats <= config_.max_num_seqs, "seats are miscounted");
  for (const Sequence* seq : waiting_)
    check_invariant(seq->status == SequenceStatus::waiting && seq->block_table.empty() &&
                        seq->num_computed == 0 && seq->num_committed_blocks == 0,
                    "a waiting sequence holds something");
  size_t sequences = 0;
  int admitted = 0;
  for (const auto& [id, state] : requests_) {
    const auto ended = std::count(state.ended.begin(), state.ended.end(), 1);
    check_invariant(
        state.num_live > 0 && std::cmp_equal(state.choices.size() - ended, state.num_live),
        "a request has lost count of its choices");
    for (const auto& seq : state.choices) sequences += seq != nullptr;
    admitted += state.admitted;
  }
  check_invariant(sequences == running_.size() + waiting_.size(), "a sequence is lost");
  check_invariant(admitted == num_admitted_, "admitted requests are miscounted");
  blocks_.check_invariants(holders);
}

}  // namespace ni
