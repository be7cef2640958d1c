// One device: backend, weights, cache, activations and decoder, and the running of steps on them.
//
// launch() puts a step's operators and downloads into the backend's queue and returns; its inputs
// come ahead of them. collect() waits for the oldest. With `overlap` two steps may be in flight:
// each has its own inputs and host memory; all other memory of the device is shared by both,
// because the queue keeps their order. A step may feed tokens that the step before samples: see
// StepInputs::token_ids.
//
// Captured steps: a batch of decodes with one row each is padded to the next of `graph_sizes` and
// given to Backend::run_step with that size, the kind of sampling and the place of its inputs as
// its key. For a key, all tensors, counts (T, S, L) and arrays of rows keep their addresses. The
// host scalars max_context_len, block_table_stride and num_decode_items and the addresses of lists
// of any length do not: captured launches must read them through StepInputs::device.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "engine/step_batch.h"
#include "model/decoder.h"

namespace ni {

struct RunnerConfig {
  DType dtype = DType::f32;  // of the weights
  DType kv_dtype = DType::f32;
  int block_size = 16;
  int num_blocks = 0;            // 0: as many as fit, see memory_fraction
  double memory_fraction = 0.0;  // of the device's memory, for everything together
  int max_model_len = 0;
  int max_num_seqs = 0;
  int max_num_batched_tokens = 0;
  int max_scored_rows = 0;  // SchedulerConfig
  int max_logprobs = 20;
  std::vector<int32_t> eos_token_ids;
  std::vector<int> graph_sizes;  // numbers of rows to which decode steps are padded; empty: none
  bool overlap = false;
  bool marks_forward = false;  // wait_for_forward()
};

struct MemoryPlan {
  size_t weights = 0;  // bytes
  // Of the largest step, its inputs and outputs (those on the host, too, where it shares its memory
  // with the device) and rotary tables included.
  size_t activations = 0;
  size_t kv_block = 0;  // K and V of one block in all layers
  // What libraries, operators and captured steps take of a card besides; a guess, rather too much.
  size_t reserve = 0;
};

// The outcome of a step; valid until the next launch.
struct StepResult {
  const StepBatch* batch = nullptr;
  // On the host, one row a logits row. Log-probabilities and ranks are there if a row wants any,
  // the most likely tokens if a row wants those.
  SampleOutputs outputs;
  std::vector<int32_t> samples;  // [plan.num_samples] the plan's samples
};

class ModelRunner {
 public:
  ModelRunner(std::unique_ptr<Backend> backend, const ModelConfig& model,
              const RunnerConfig& config);
  ModelRunner(const ModelRunner&) = delete;

  static MemoryPlan plan_memory(const Backend& backend, const ModelConfig& model,
                                const RunnerConfig& config);

  // The constructor allocates the weights; then, when all are loaded, finish_loading() allocates
  // the rest, the cache last, and captures the steps of graph_sizes.
  void load_weight(const std::string& slot, const Tensor& data);
  void finish_loading();
  int num_blocks() const { return num_blocks_; }

  // Starts a step. If it throws, nothing more is in flight than before, but discard() must follow.
  void launch(const StepPlan& plan);
  // Waits until the oldest step in flight has all but logits and samples. False, at once: that
  // cannot be told (marks_forward; a captured step), or it has no logits. If it throws, discard()
  // must follow.
  bool wait_for_forward();
  // Waits for the oldest step in flight. If it throws, discard() must follow.
  const StepResult& collect();
  // Waits until the device is done, whatever comes of it; nothing is in flight any more.
  void discard() noexcept;

  // Logits [num_tokens, vocab] of one prompt, computed in chunks over blocks that the caller lends.
  // Nothing may be in flight.
  std::vector<float> logits(const std::vector<int32_t>& tokens, const std::vector<int32_t>& blocks);

  Backend& backend() { return *backend_; }

 private:
  // A step in flight.
  struct Slot {
    StepBatch batch;
    Buffer host_data;        // SampleOutputs
    Buffer step_data;        // the uploaded batch; its address never changes
    Buffer large_step_data;  // instead, for one that does not fit into it
    std::optional<uint64_t> forward_mark;
    uint64_t mark = 0;
    StepResult result;
  };

  void allocate_step_memory();
  int blocks_that_fit() const;
  void run_largest_step();
  void capture_graphs();
  int graph_rows(const StepPlan& plan) const;
  StepInputs upload(Slot& slot);
  std::optional<uint64_t> compute(const StepInputs& in, GraphKey key);
  void sample_rows(const StepInputs& in);
  void download(Slot& slot);

  const ModelConfig model_;
  const RunnerConfig config_;
  std::unique_ptr<Backend>
      backend_;  // declared first: everything below gives its memory back to it
  Weights weights_;
  KvCache cache_;
  Activations activations_;
  std::unique_ptr<RopeTables> ropes_;
  std::unique_ptr<Decoder> decoder_;
  int max_logits_;  // logits rows computed at a time
  int num_blocks_;
  std::vector<int> graph_sizes_;  // ascending
  Buffer sample_data_;            // SampleOutputs on the device
  SampleOutputs outputs_;         // views of it
  int sample_capacity_ = 0;       // rows of SampleOutputs
  std::vector<Slot> slots_;       // as many as steps may be in flight
  size_t oldest_ = 0, in_flight_ = 0;
};

}  // namespace ni
