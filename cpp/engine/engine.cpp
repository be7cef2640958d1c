#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "backend/registry.h"
#include "core/check.h"

namespace ni {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// So many that what is kept of them on the device stays below 256 MiB (8 bytes for each of
// max_logprobs), however many max_logprobs is.
int max_scored_rows(const EngineConfig& config) {
  constexpr int64_t kEntries = int64_t{1} << 25;
  if (!config.enable_chunked_prefill || config.max_logprobs <= 0) return 0;  // any number
  return static_cast<int>(std::clamp<int64_t>(kEntries / config.max_logprobs, 1,
                                              std::max(config.max_num_batched_tokens, 1)));
}

BlockManagerConfig block_config(const EngineConfig& config) {
  BlockManagerConfig out;
  out.num_blocks = config.num_blocks > 0 ? config.num_blocks : 1;  // until it is decided
  out.block_size = config.effective_block_size();
  out.enable_prefix_caching = config.enable_prefix_caching && config.paged;
  return out;
}

SchedulerConfig scheduler_config(const EngineConfig& config, const ModelConfig& model) {
  SchedulerConfig out;
  out.max_num_seqs = config.max_num_seqs;
  out.max_num_batched_tokens = config.max_num_batched_tokens;
  out.max_model_len = config.max_model_len;
  out.max_scored_rows = max_scored_rows(config);
  out.max_waiting = config.max_waiting;
  out.vocab_size = model.vocab_size;
  out.max_logprobs = std::min(config.max_logprobs, model.vocab_size);
  out.policy = config.policy;
  out.enable_chunked_prefill = config.enable_chunked_prefill;
  out.static_batching = config.static_batching;
  out.eos_token_ids = config.eos_token_ids;
  return out;
}

}  // namespace

Engine::Engine(const EngineConfig& config, const ModelConfig& model)
    : Engine(config, model, make_backend(config.device, backend_options(config))) {}

Engine::Engine(const EngineConfig& config, const ModelConfig& model,
               std::unique_ptr<Backend> backend)
    : config_(config),
      model_(model),
      runner_(std::move(backend), model, runner_config(config)),
      blocks_(block_config(config)),
      scheduler_(scheduler_config(config, model), blocks_),
      trace_(static_cast<size_t>(std::max(config.trace_capacity, 0))) {
  check_arg(config.trace_capacity >= 0, "trace_capacity must not be negative, got ",
            config.trace_capacity);
}

Engine::~Engine() {
  shutdown();
}

BackendOptions Engine::backend_options(const EngineConfig& config) {
  BackendOptions out;
  out.num_threads = config.num_threads;
  out.isa = config.isa;
  out.device_index = config.device_index;
  out.activation_dtype = config.dtype;
  out.batch_invariant = config.batch_invariant;
  out.enable_graphs = !config.graph_sizes.empty();
  out.plan_cache = config.plan_cache;
  return out;
}

RunnerConfig Engine::runner_config(const EngineConfig& config) {
  RunnerConfig out;
  out.dtype = config.dtype;
  out.kv_dtype = config.kv_cache_dtype;
  out.block_size = config.effective_block_size();
  out.num_blocks = config.num_blocks;
  out.memory_fraction = config.memory_fraction;
  out.graph_sizes = config.graph_sizes;
  out.overlap = config.overlap;
  out.marks_forward = config.has_card();
  out.max_model_len = config.max_model_len;
  out.max_num_seqs = config.max_num_seqs;
  out.max_num_batched_tokens = config.max_num_batched_tokens;
  out.max_scored_rows = max_scored_rows(config);
  out.max_logprobs = config.max_logprobs;
  out.eos_token_ids = config.eos_token_ids;
  return out;
}

void Engine::load_weight(const std::string& slot, const Tensor& data) {
  check_arg(!loaded_, "weights cannot be loaded after finish_loading()");
  runner_.load_weight(slot, data);
}

void Engine::finish_loading() {
  check_arg(!loaded_, "finish_loading() has already been called");
  runner_.finish_loading();
  if (config_.num_blocks == 0) blocks_.resize(runner_.num_blocks());
  loaded_ = true;
  publish();
}

void Engine::start() {
  const std::scoped_lock lock(lifecycle_mutex_, step_mutex_);
  check_arg(loaded_, "start() needs finish_loading() first");
  check_arg(!started_, "the engine has already been started");
  {
    const std::lock_guard shared(mutex_);
    check_arg(!stopping_, "the engine has been shut down");
  }
  thread_ = std::thread([this] { loop(); });
  started_ = true;
}

void Engine::shutdown() {
  const std::lock_guard one_at_a_time(lifecycle_mutex_);
  {
    const std::lock_guard lock(mutex_);
    if (stopped_) return;
    stopping_ = true;
    ++calls_;
  }
  inbox_ready_.notify_all();
  if (thread_.joinable()) {
    thread_.join();
  } else {
    const std::lock_guard lock(step_mutex_);
    end_all();
  }
}

// -- Any thread -------------------------------------------------------------------------------

void Engine::validate(const Request& request) const {
  check_arg(loaded_ || config_.num_blocks > 0,
            "what fits into the cache is not known before finish_loading()");
  scheduler_.validate(request);
}

void Engine::submit(Request request) {
  std::vector<Request> one;
  one.push_back(std::move(request));
  submit_all(std::move(one));
}

void Engine::submit_all(std::vector<Request> requests) {
  const auto count = static_cast<int>(requests.size());
  const double arrival = now();
  const auto reject = [&](const auto& error) {
    published_.received += requests.size();
    published_.rejected += requests.size();
    throw error;
  };
  try {
    for (const Request& request : requests) validate(request);
  } catch (const std::invalid_argument& error) {
    const std::lock_guard lock(mutex_);
    reject(error);
  }
  std::unordered_set<uint64_t> ids;
  std::optional<uint64_t> twice;
  std::vector<InboxItem> items;
  for (Request& request : requests) {
    if (!ids.insert(request.id).second) twice = request.id;
    items.push_back({std::make_shared<const Request>(std::move(request)), arrival});
  }
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) reject(std::runtime_error("the engine has been shut down"));
    if (!published_.healthy)
      reject(std::runtime_error("the engine has failed and takes no requests"));
    for (const InboxItem& item : items)
      if (item.request->id == twice || live_.contains(item.request->id))
        reject(
            std::invalid_argument(concat("request id ", item.request->id, " is already in use")));
    const int waiting = published_.waiting + inbox_requests_;
    if (config_.max_waiting > 0 && waiting > config_.max_waiting - count)
      reject(QueueFull(concat("the waiting queue is full: ", waiting, " requests wait, ",
                              count > 1 ? concat(count, " come, ") : "", "max_waiting is ",
                              config_.max_waiting)));
    live_.reserve(live_.size() + ids.size());
    const size_t in_all = inbox_.size() + items.size();
    if (inbox_.capacity() < in_all) inbox_.reserve(2 * in_all);
    // Behind this, nothing throws.
    if (live_.empty() && count > 0) published_.busy_since = arrival;
    published_.received += items.size();
    inbox_requests_ += count;
    live_.merge(ids);
    for (InboxItem& item : items) inbox_.push_back(std::move(item));
    ++calls_;
  }
  inbox_ready_.notify_one();
}

void Engine::abort(uint64_t request_id, int choice, FinishReason reason) {
  {
    const std::lock_guard lock(mutex_);
    if (!live_.contains(request_id)) return;
    InboxItem item;
    item.abort = {request_id, choice, reason};
    inbox_.push_back(std::move(item));
    ++calls_;
  }
  inbox_ready_.notify_one();
}

std::vector<Output> Engine::wait_outputs(double timeout) {
  constexpr double kLongest = 1e9;  // the clock's ticks would overflow at 1e10
  const bool ends = timeout >= 0 && timeout < kLongest;
  const double end = ends ? now() + timeout : 0;
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return !outbox_.empty() || stopped_; };
  const auto wakes = [&] { return ready() || announced_; };
  while (true) {
    if (ends) {
      outbox_ready_.wait_for(lock, std::chrono::duration<double>(end - now()), wakes);
    } else {
      outbox_ready_.wait(lock, wakes);
    }
    if (ready() || !announced_) break;
    announced_ = false;
    look_out(lock, publications_);
    if (ends && now() >= end) break;
  }
  return std::exchange(outbox_, {});
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats out = published_;
  out.waiting += inbox_requests_;
  return out;
}

// -- The engine thread ------------------------------------------------------------------------

void Engine::loop() {
  try {
    while (true) {
      {
        std::unique_lock lock(mutex_);
        const auto is_wanted = [this] {
          return stopping_ || (counters_.healthy &&
                               (!inbox_.empty() || scheduler_.has_work() || in_flight_ > 0));
        };
        // A client that waited for the last answer may have another question. (On the CPU backend
        // the cores are others'.)
        if (config_.has_card() && !is_wanted()) look_out(lock, calls_);
        inbox_ready_.wait(lock, is_wanted);
        if (stopping_) break;
      }
      run_step();
    }
  } catch (...) {  // not even the failure could be handled, for want of memory, say
    counters_.healthy = false;
  }
  end_all();
}

// Awake until somebody counts, for a moment at most: a thread that sleeps wakes up a tenth of a
// millisecond late.
void Engine::look_out(std::unique_lock<std::mutex>& lock, const std::atomic<uint64_t>& count) {
  constexpr double kMoment = 1e-3;  // seconds
  const uint64_t seen = count;
  lock.unlock();
  const double end = now() + kMoment;
  while (count == seen && now() < end) std::this_thread::yield();
  lock.lock();
}

// Wakes a reader, while the device makes the last logits of a step, for what will be published.
void Engine::announce() {
  {
    const std::lock_guard lock(mutex_);
    announced_ = true;
  }
  outbox_ready_.notify_all();
}

bool Engine::step() {
  const std::lock_guard lock(step_mutex_);
  check_idle_caller();
  check_arg(loaded_, "step() needs finish_loading() first");
  return run_step();
}

void Engine::check_idle_caller() const {
  check_arg(!started_, "the engine thread is running: this call is for stepping by hand");
}

bool Engine::run_step() {
  if (!counters_.healthy) return false;
  bool worked = false;
  try {
    drain_inbox();
    worked = take_turn();
    if (config_.check_invariants) scheduler_.check_invariants();
  } catch (const std::exception& error) {
    break_down(error.what());
    worked = true;
  }
  worked |= !produced_.empty();
  publish();
  return worked;
}

void Engine::drain_inbox() {
  {
    const std::lock_guard lock(mutex_);
    drained_.swap(inbox_);
    published_.waiting += std::exchange(inbox_requests_, 0);
  }
  for (InboxItem& item : drained_) {
    if (item.request != nullptr) {
      times_[item.request->id] = {item.arrival, 0.0};
      scheduler_.add(std::move(item.request));
    } else {
      scheduler_.abort(item.abort.request_id, item.abort.choice, item.abort.reason, updates_);
    }
  }
  drained_.clear();
  if (updates_.empty()) return;
  step_end_ = now();
  emit_ended("");
}

// Launches the next step, then finishes the one before it: while the device computes, the host
// delivers. Without overlap, or where the next one depends on what the last has sampled, a step is
// finished before the next is put together.
bool Engine::take_turn() {
  bool worked = false;
  if (in_flight_ > 0 && !scheduler_.can_run_ahead()) {
    finish_step();
    worked = true;
  }
  bool launched = false;
  if (scheduler_.has_work()) {
    const StepPlan& plan = in_flight_ > 0 ? scheduler_.schedule_ahead() : scheduler_.schedule();
    if (!plan.empty()) {
      launched = launch_step(plan);
      worked = true;
    }
  }
  const size_t may_stay = launched && config_.overlap ? 1 : 0;
  while (in_flight_ > may_stay) {
    finish_step();
    worked = true;
  }
  return worked;
}

bool Engine::launch_step(const StepPlan& plan) {
  const double start = now();
  for (const StepPlan::Event& event : plan.admitted)
    times_[event.request_id].first_scheduled = start;
  Step& step = steps_[(oldest_ + in_flight_) % steps_.size()];
  step.plan = &plan;
  step.launched = false;
  if (trace_.enabled()) begin_record(plan, step.record);
  for (const ScheduledSequence& item : plan.items)
    if (!item.is_decode) counters_.prompt_tokens += static_cast<uint64_t>(item.num_query);
  try {
    runner_.launch(plan);
    step.launched = true;
  } catch (const std::exception& e) {
    step.error = e.what();
  }
  ++in_flight_;
  return step.launched;
}

// The oldest one. Whatever a device throws ends the requests of the steps in flight and no more.
void Engine::finish_step() {
  const Step& step = steps_[oldest_];
  const StepResult* result = nullptr;
  std::string error = step.error;
  if (step.launched) {
    try {
      if (runner_.wait_for_forward()) announce();
      result = &runner_.collect();
    } catch (const std::exception& e) {
      error = e.what();
    }
  }
  step_end_ = now();
  if (result == nullptr) {
    fail_steps(error);
    return;
  }
  mark_rows_in_vain();
  collect_outputs(*step.plan, *result);
  end_step(false);
}

// A step that follows a failed one has read what that one left behind.
void Engine::fail_steps(const std::string& error) {
  runner_.discard();
  while (in_flight_ > 0) {
    ++counters_.failed_steps;
    mark_rows_in_vain();
    fail_step(error);
    end_step(true);
  }
  if (!runner_.backend().healthy()) throw std::runtime_error(error);
}

void Engine::finish_steps_in_flight() {
  try {
    while (in_flight_ > 0) finish_step();
  } catch (const std::exception& error) {
    break_down(error.what());
  }
}

void Engine::collect_outputs(const StepPlan& plan, const StepResult& result) {
  const std::vector<int32_t>& sample_rows = result.batch->sample_rows();
  collect_prompt_logprobs(plan, result);
  // A finished sequence is gone after update(): what is needed of its request is taken before.
  std::vector<int> num_logprobs(plan.items.size());
  for (size_t i = 0; i < plan.items.size(); ++i)
    num_logprobs[i] = plan.items[i].seq->request->params.logprobs;
  updates_.clear();
  scheduler_.update(result.samples.data(), updates_);
  for (const SequenceUpdate& update : updates_) {
    Output out;
    for (int i = 0; i < update.num_new_tokens; ++i) {
      const int sample = update.first_sample + i;
      out.token_ids.push_back(result.samples[static_cast<size_t>(sample)]);
      const int wanted = num_logprobs[static_cast<size_t>(update.item)];
      if (wanted >= 0)
        out.logprobs.push_back(
            row_logprobs(result, sample_rows[static_cast<size_t>(sample)], wanted));
    }
    counters_.generated_tokens += out.token_ids.size();
    emit(update, std::move(out));
  }
  updates_.clear();
}

// Prompt log-probabilities are the request's, not a choice's: they go out as choice 0.
void Engine::collect_prompt_logprobs(const StepPlan& plan, const StepResult& result) {
  const std::vector<LogitsRow>& rows = result.batch->rows();
  for (size_t row = 0; row < rows.size();) {
    if (rows[row].prompt_index < 0) {
      ++row;
      continue;
    }
    const int item = rows[row].item;
    Sequence& seq = *plan.items[static_cast<size_t>(item)].seq;
    Output out;
    for (; row < rows.size() && rows[row].item == item && rows[row].prompt_index >= 0; ++row) {
      out.prompt_logprobs.push_back(
          row_logprobs(result, static_cast<int>(row), seq.request->params.prompt_logprobs));
      seq.num_prompt_scored = rows[row].prompt_index;
    }
    if (seq.status == SequenceStatus::finished) continue;  // aborted while the step ran
    SequenceUpdate update;
    update.request_id = seq.request->id;
    update.choice = seq.choice;
    update.num_cached = seq.num_cached;
    emit(update, std::move(out));
  }
}

TokenLogprobs Engine::row_logprobs(const StepResult& result, int row, int num_logprobs) {
  const SampleOutputs& from = result.outputs;
  const ptrdiff_t first = static_cast<ptrdiff_t>(row) * from.max_logprobs;
  TokenLogprobs out;
  out.token_id = from.token_ids[row];
  out.logprob = from.logprobs[row];
  out.rank = from.ranks[row];
  out.top_ids.assign(from.top_ids + first, from.top_ids + first + num_logprobs);
  out.top_logprobs.assign(from.top_logprobs + first, from.top_logprobs + first + num_logprobs);
  return out;
}

void Engine::emit(const SequenceUpdate& update, Output output) {
  output.request_id = update.request_id;
  output.choice = update.choice;
  output.num_cached = update.num_cached;
  output.finish_reason = update.finish_reason;
  output.stop_token = update.stop_token;
  output.request_done = update.request_done;
  const Times& times = times_[update.request_id];
  output.arrival_time = times.arrival;
  output.first_scheduled_time = times.first_scheduled;
  output.step_time = step_end_;
  // What was aborted before its first step is in no record.
  if (trace_.enabled() && update.finish_reason != FinishReason::none && times.first_scheduled > 0)
    ended_.push_back({update.request_id, update.choice, update.finish_reason});
  if (update.request_done) {
    // A request counts by how its last choice ended.
    if (update.finish_reason == FinishReason::abort) {
      ++counters_.aborted;
    } else if (update.finish_reason == FinishReason::error) {
      ++counters_.failed;
    } else {
      ++counters_.finished;
    }
    done_ids_.push_back(update.request_id);
    times_.erase(update.request_id);
  }
  produced_.push_back(std::move(output));
}

// Sequences that ended outside a step's result: aborted or failed ones.
void Engine::emit_ended(const std::string& error) {
  for (const SequenceUpdate& update : updates_) {
    Output out;
    if (update.finish_reason == FinishReason::error) out.error = error;
    emit(update, std::move(out));
  }
  updates_.clear();
}

void Engine::fail_step(const std::string& error) {
  updates_.clear();
  scheduler_.fail(updates_);
  // A preempted choice had no row in the step, but its request has failed.
  for (size_t i = 0, failed = updates_.size(); i < failed; ++i)
    scheduler_.abort(uint64_t{updates_[i].request_id}, -1, FinishReason::error, updates_);
  step_end_ = now();
  emit_ended(error);
}

// The engine's own bookkeeping is inconsistent: ends every request without asking the scheduler and
// takes no further ones. So it does when the device is lost. The process, and with it the reader of
// outputs, lives on.
void Engine::break_down(const std::string& error) {
  counters_.healthy = false;
  runner_.discard();
  in_flight_ = 0;
  std::vector<uint64_t> ids;
  {
    const std::lock_guard lock(mutex_);
    published_.healthy = false;  // from here on submit() refuses
    ids.assign(live_.begin(), live_.end());
    inbox_.clear();
    published_.waiting += std::exchange(inbox_requests_, 0);  // until publish()
  }
  for (const uint64_t id : done_ids_) std::erase(ids, id);
  step_end_ = now();
  for (const uint64_t id : ids) {
    SequenceUpdate update;
    update.request_id = id;
    update.finish_reason = FinishReason::error;
    update.request_done = true;
    Output out;
    out.error = error;
    emit(update, std::move(out));
  }
}

void Engine::begin_record(const StepPlan& plan, StepRecord& record) {
  record.start_time = now();
  record.num_tokens = plan.num_tokens;
  record.num_decodes = plan.num_decodes;
  record.admitted = plan.admitted;
  record.resumed = plan.resumed;
  record.preempted = plan.preempted;
  record.copies = plan.copies;
  record.entries.resize(plan.items.size());
  record.blocks.clear();
  const int block_size = blocks_.block_size();
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const ScheduledSequence& item = plan.items[i];
    Sequence& seq = *item.seq;
    StepRecord::Entry& entry = record.entries[i];
    entry.request_id = seq.request->id;
    entry.choice = seq.choice;
    entry.num_query = item.num_query;
    entry.context_len = seq.num_computed + item.num_query;
    entry.num_samples = item.num_samples;
    entry.is_decode = item.is_decode;
    // Its whole table once it runs (again), and in a fork's first step of its own.
    const bool forked = item.is_decode && seq.choice > 0 && seq.num_output() == 1;
    const bool fresh = forked || std::exchange(seq.traced_run, seq.preemptions) != seq.preemptions;
    entry.first_block = fresh ? 0 : seq.num_computed / block_size;
    entry.blocks_begin = static_cast<int>(record.blocks.size());
    record.blocks.insert(record.blocks.end(), seq.block_table.begin() + entry.first_block,
                         seq.block_table.end());
    entry.blocks_end = static_cast<int>(record.blocks.size());
  }
}

// Sequences of the oldest step in flight that have ended since it was launched.
void Engine::mark_rows_in_vain() {
  if (!trace_.enabled()) return;
  Step& step = steps_[oldest_];
  for (size_t i = 0; i < step.plan->items.size(); ++i)
    step.record.entries[i].in_vain = step.plan->items[i].seq->status == SequenceStatus::finished;
}

// The oldest step in flight has been delivered, or has failed.
void Engine::end_step(bool failed) {
  StepRecord& record = steps_[oldest_].record;
  oldest_ = (oldest_ + 1) % steps_.size();
  --in_flight_;
  ++counters_.steps;
  counters_.last_step_time = step_end_;
  if (!trace_.enabled()) return;
  record.step = counters_.steps;
  const SchedulerStats scheduler = scheduler_.stats();
  const BlockManagerStats blocks = blocks_.stats();
  record.end_time = step_end_;
  record.failed = failed;
  record.num_running = scheduler.num_running;
  record.num_waiting = scheduler.num_waiting;
  record.blocks_free = blocks.num_free;
  record.blocks_cached = blocks.num_cached;
  record.blocks_used = blocks.num_used;
  record.finished.swap(ended_);
  ended_.clear();
  trace_.push(record);
}

// Hands outputs over and makes the counters visible, in one go: they balance at every instant.
void Engine::publish() {
  const SchedulerStats scheduler = scheduler_.stats();
  const BlockManagerStats blocks = blocks_.stats();
  bool wake = false;
  {
    const std::lock_guard lock(mutex_);
    counters_.received = published_.received;  // submit() counts these
    counters_.rejected = published_.rejected;
    counters_.busy_since = published_.busy_since;
    published_ = counters_;
    published_.running = counters_.healthy ? scheduler.num_running_requests : 0;
    published_.waiting = counters_.healthy ? scheduler.num_waiting_requests : 0;
    published_.running_seqs = scheduler.num_running;
    published_.waiting_seqs = scheduler.num_waiting;
    published_.preemptions = scheduler.preemptions;
    published_.cached_tokens = blocks.prefix_hits;
    published_.blocks = blocks;
    for (const uint64_t id : done_ids_) live_.erase(id);
    announced_ = false;
    wake = !produced_.empty();
    if (outbox_.empty()) {
      outbox_.swap(produced_);
    } else {
      outbox_.insert(outbox_.end(), std::make_move_iterator(produced_.begin()),
                     std::make_move_iterator(produced_.end()));
    }
  }
  ++publications_;  // not under the lock, which whoever looks out wants next
  done_ids_.clear();
  produced_.clear();
  if (wake) outbox_ready_.notify_all();
}

void Engine::abort_all() {
  if (counters_.healthy) finish_steps_in_flight();
  if (counters_.healthy) {  // else everything has ended, and the scheduler is not to be trusted
    drain_inbox();
    std::vector<uint64_t> ids;
    {
      const std::lock_guard lock(mutex_);
      ids.assign(live_.begin(), live_.end());
    }
    for (const uint64_t id : ids) scheduler_.abort(id, -1, FinishReason::abort, updates_);
    step_end_ = now();
    emit_ended("");
  }
  publish();
}

// Whatever happens, nobody shall wait for outputs for ever.
void Engine::end_all() noexcept {
  bool failed = false;
  try {
    abort_all();
  } catch (...) {
    failed = true;
  }
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    published_.healthy = published_.healthy && !failed;
  }
  outbox_ready_.notify_all();
}

// -- Study and tests --------------------------------------------------------------------------

bool Engine::reset_prefix_cache() {
  const std::lock_guard lock(step_mutex_);
  check_idle_caller();
  if (scheduler_.has_work()) return false;
  finish_steps_in_flight();
  blocks_.reset_prefix_cache();
  publish();
  return true;
}

std::vector<float> Engine::logits(const std::vector<int32_t>& tokens) {
  const std::lock_guard lock(step_mutex_);
  check_idle_caller();
  check_arg(loaded_, "logits() needs finish_loading() first");
  check_arg(!tokens.empty() && std::cmp_less_equal(tokens.size(), config_.max_model_len),
            "logits() takes 1 to ", config_.max_model_len, " tokens (max_model_len), got ",
            tokens.size());
  for (const int32_t token : tokens)
    check_arg(token >= 0 && token < model_.vocab_size, "token id ", token,
              " is outside the vocabulary of ", model_.vocab_size);
  finish_steps_in_flight();
  publish();
  check_runtime(counters_.healthy, "the engine has failed");
  Sequence lender;
  lender.tokens = tokens;
  std::vector<BlockCopy> copies;
  check_runtime(blocks_.grow(lender, static_cast<int>(tokens.size()), copies),
                "the cache has too few free blocks for ", tokens.size(), " tokens");
  std::vector<float> out;
  try {
    out = runner_.logits(tokens, lender.block_table);
  } catch (...) {
    runner_.discard();  // what was begun must not meet the next step's inputs
    blocks_.free(lender);
    throw;
  }
  blocks_.free(lender);
  return out;
}

}  // namespace ni
