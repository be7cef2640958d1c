// The engine: requests in, tokens out. One thread owns scheduler, block manager and model;
// everybody else talks to it through an inbox and an outbox. It knows nothing of Python.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "engine/block_manager.h"
#include "engine/model_runner.h"
#include "engine/scheduler.h"
#include "engine/trace.h"

namespace ni {

struct EngineConfig {
  std::string device = "cpu";
  int device_index = 0;          // which card
  std::string isa;               // CPU instruction set; empty: best
  int num_threads = 0;           // 0: all available
  bool batch_invariant = true;   // CUDA: promise 1, at a cost
  std::string plan_cache;        // CUDA: file of timed GEMM plans; empty: none
  std::vector<int> graph_sizes;  // decode steps are padded to these and captured; empty: none
  DType dtype = DType::bf16;     // weights; on CUDA activations, too
  DType kv_cache_dtype = DType::bf16;
  int block_size = 16;
  // 0: decided by finish_loading(), so that memory_fraction of the device's memory is in use.
  int num_blocks = 0;
  double memory_fraction = 0.0;
  bool paged = true;  // false: a sequence reserves max_model_len contiguous slots
  bool enable_prefix_caching = true;
  bool enable_chunked_prefill = true;
  bool static_batching = false;
  // The next step is launched before the tokens of the last one have reached the host: scheduler.h.
  bool overlap = false;
  SchedulingPolicy policy = SchedulingPolicy::fcfs;
  int max_model_len = 2048;
  int max_num_seqs = 256;
  int max_num_batched_tokens = 2048;
  int max_waiting = 1024;  // 0: unbounded
  int max_logprobs = 20;
  std::vector<int32_t> eos_token_ids;
  int trace_capacity = 1024;      // steps; 0: no trace
  bool check_invariants = false;  // after every step

  bool has_card() const { return device != "cpu"; }
  // Slots of a block. Unpaged is one block a sequence: the contiguous reservation of the engines
  // before paging, with all its waste, through the same code.
  int effective_block_size() const { return paged ? block_size : (max_model_len + 15) / 16 * 16; }
};

struct TokenLogprobs {
  int32_t token_id = 0;
  float logprob = 0.0f;
  int32_t rank = 0;  // 1: the most likely
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// What one step (or an abort) did to one choice.
struct Output {
  uint64_t request_id = 0;
  int choice = 0;
  std::vector<int32_t> token_ids;
  std::vector<TokenLogprobs> logprobs;         // one a token when asked for
  std::vector<TokenLogprobs> prompt_logprobs;  // further prompt tokens, from the second on
  int num_cached = 0;
  FinishReason finish_reason = FinishReason::none;
  int32_t stop_token = -1;
  bool request_done = false;
  std::string error;
  double arrival_time = 0.0, first_scheduled_time = 0.0, step_time = 0.0;  // seconds, steady clock
};

// Requests: received = finished + aborted + rejected + failed + running + waiting, at all times.
struct EngineStats {
  uint64_t received = 0, finished = 0, aborted = 0, rejected = 0, failed = 0;
  int running = 0, waiting = 0;
  int running_seqs = 0, waiting_seqs = 0;
  uint64_t steps = 0, failed_steps = 0;
  uint64_t prompt_tokens = 0;  // computed
  uint64_t cached_tokens = 0;  // taken from the prefix cache
  uint64_t generated_tokens = 0;
  uint64_t preemptions = 0;
  BlockManagerStats blocks;
  double last_step_time = 0.0;  // when the last step ended; 0: none yet
  // When a request last came to an idle engine; 0: none yet. While requests run or wait, no step
  // has finished for now - max(last_step_time, busy_since) seconds.
  double busy_since = 0.0;
  bool healthy = true;  // false: an internal error; nothing more is accepted
};

class Engine {
 public:
  Engine(const EngineConfig& config, const ModelConfig& model);
  // With a backend of one's own (tests inject faults with it).
  Engine(const EngineConfig& config, const ModelConfig& model, std::unique_ptr<Backend> backend);
  ~Engine();

  static BackendOptions backend_options(const EngineConfig& config);
  static RunnerConfig runner_config(const EngineConfig& config);

  // Both throw std::invalid_argument after finish_loading(). load_weight: from several threads at
  // once for different slots, where the backend allows it.
  void load_weight(const std::string& slot, const Tensor& data);
  void finish_loading();
  // Of the cache; before finish_loading() what the config says.
  int num_blocks() const { return loaded_ ? blocks_.num_blocks() : config_.num_blocks; }
  void start();
  // Stops after the steps in flight; unfinished requests end with FinishReason::abort. From any
  // thread, any number of times.
  void shutdown();

  // From any thread. submit throws std::invalid_argument, QueueFull, or std::runtime_error when the
  // engine has stopped; submit_all takes all or none, and no step sees only some of them. Where
  // num_blocks is 0, all want finish_loading() first.
  void validate(const Request& request) const;
  void submit(Request request);
  void submit_all(std::vector<Request> requests);
  void abort(uint64_t request_id, int choice, FinishReason reason);
  // Waits for outputs; returns none after `timeout` seconds (< 0: never), on a card up to a
  // millisecond later, or when the engine has stopped.
  std::vector<Output> wait_outputs(double timeout);
  EngineStats stats() const;
  std::vector<StepRecord> trace(uint64_t since) const { return trace_.read(since); }

  // Drains the inbox and does one step on the caller's thread, if start() was not called. With
  // overlap it launches a step, delivers the one before, or both. False: there was nothing to do.
  bool step();
  // False while requests are unfinished.
  bool reset_prefix_cache();
  std::vector<float> logits(const std::vector<int32_t>& tokens);

  const EngineConfig& config() const { return config_; }
  const ModelConfig& model_config() const { return model_; }
  ModelRunner& runner() { return runner_; }
  Scheduler& scheduler() { return scheduler_; }  // for tests that step by hand

 private:
  struct Abort {
    uint64_t request_id;
    int choice;
    FinishReason reason;
  };
  struct InboxItem {  // a new request, or an abort
    std::shared_ptr<const Request> request;
    double arrival = 0.0;
    Abort abort{};
  };
  struct Times {
    double arrival = 0.0, first_scheduled = 0.0;
  };
  // A step in flight.
  struct Step {
    const StepPlan* plan = nullptr;
    bool launched = false;
    std::string error;  // why not
    StepRecord record;
  };

  void loop();
  void look_out(std::unique_lock<std::mutex>& lock, const std::atomic<uint64_t>& count);
  void announce();
  void drain_inbox();
  bool run_step();
  bool take_turn();
  bool launch_step(const StepPlan& plan);
  void finish_step();
  void fail_steps(const std::string& error);
  void finish_steps_in_flight();
  void collect_outputs(const StepPlan& plan, const StepResult& result);
  void collect_prompt_logprobs(const StepPlan& plan, const StepResult& result);
  static TokenLogprobs row_logprobs(const StepResult& result, int row, int num_logprobs);
  void emit(const SequenceUpdate& update, Output output);
  void emit_ended(const std::string& error);
  void fail_step(const std::string& error);
  void break_down(const std::string& error);
  void begin_record(const StepPlan& plan, StepRecord& record);
  void mark_rows_in_vain();
  void end_step(bool failed);
  void publish();
  void abort_all();
  void end_all() noexcept;
  void check_idle_caller() const;

  const EngineConfig config_;
  const ModelConfig model_;
  ModelRunner runner_;
  BlockManager blocks_;
  Scheduler scheduler_;
  Trace trace_;

  // Owned by the engine thread.
  std::array<Step, 2> steps_;
  size_t oldest_ = 0, in_flight_ = 0;
  std::vector<InboxItem> drained_;
  std::vector<SequenceUpdate> updates_;
  std::vector<Output> produced_;
  std::unordered_map<uint64_t, Times> times_;
  EngineStats counters_;  // its share of the statistics; published after every step
  std::vector<uint64_t> done_ids_;
  std::vector<StepRecord::Finished> ended_;  // since the last record of the trace
  double step_end_ = 0.0;

  // Lifecycle. Lock order: lifecycle_mutex_, step_mutex_, mutex_.
  std::mutex lifecycle_mutex_;  // start() and shutdown(), one at a time
  std::mutex step_mutex_;       // whoever steps by hand
  std::atomic<bool> loaded_ = false;
  bool started_ = false;  // under step_mutex_
  std::thread thread_;

  // Shared.
  mutable std::mutex mutex_;
  std::condition_variable inbox_ready_, outbox_ready_;
  std::vector<InboxItem> inbox_;
  std::atomic<uint64_t> calls_ = 0;  // that the engine thread may wait for, until now
  std::vector<Output> outbox_;
  std::atomic<uint64_t> publications_ = 0;  // that a reader may wait for
  bool announced_ = false;                  // the next one is about to come
  std::unordered_set<uint64_t> live_;       // submitted and not done
  EngineStats published_;
  int inbox_requests_ = 0;
  bool stopping_ = false;
  bool stopped_ = false;
};

}  // namespace ni
