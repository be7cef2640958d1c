// One device: backend, weights, cache, activations and decoder, and the running of one step on
// them.
#pragma once

#include <memory>
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
  int num_blocks = 0;
  int max_model_len = 0;
  int max_num_seqs = 0;
  int max_num_batched_tokens = 0;
  int max_logprobs = 20;
  std::vector<int32_t> eos_token_ids;
};

struct MemoryPlan {
  size_t weights = 0;      // bytes
  size_t activations = 0;  // of the largest step, its inputs and outputs and rotary tables included
  size_t kv_block = 0;     // K and V of one block in all layers
};

// The outcome of a step, one entry a logits row.
struct StepResult {
  std::vector<int32_t> token_ids;
  std::vector<float> logprobs;
  std::vector<int32_t> ranks;
  std::vector<int32_t> top_ids;     // [L, max_logprobs]; empty if no row wants any
  std::vector<float> top_logprobs;  // likewise
  std::vector<int32_t> samples;     // [plan.num_samples] the plan's samples
};

class ModelRunner {
 public:
  ModelRunner(std::unique_ptr<Backend> backend, const ModelConfig& model,
              const RunnerConfig& config);
  ModelRunner(const ModelRunner&) = delete;

  static MemoryPlan plan_memory(const Backend& backend, const ModelConfig& model,
                                const RunnerConfig& config);

  // Allocates the weights; then, when all are loaded, finish_loading() allocates the rest.
  void load_weight(const std::string& slot, const Tensor& data);
  void finish_loading();

  // Starts a step; collect() waits for it and brings the result to the host. At most one in flight.
  void launch(const StepPlan& plan);
  const StepResult& collect();

  // Logits [num_tokens, vocab] of one prompt, computed in chunks over blocks that the caller lends.
  std::vector<float> logits(const std::vector<int32_t>& tokens, const std::vector<int32_t>& blocks);

  Backend& backend() { return *backend_; }
  const StepBatch& batch() const { return batch_; }

 private:
  // Uploads the plan's rows and computes them up to the final norm.
  StepInputs forward(const StepPlan& plan);
  void sample_rows(const StepInputs& in, const SampleOutputs& out);

  const ModelConfig model_;
  const RunnerConfig config_;
  std::unique_ptr<Backend>
      backend_;  // declared first: everything below gives its memory back to it
  Weights weights_;
  KvCache cache_;
  Activations activations_;
  std::unique_ptr<RopeTables> ropes_;
  std::unique_ptr<Decoder> decoder_;
  StepBatch batch_;
  int max_logits_;           // logits rows computed at a time
  Buffer step_data_;         // the uploaded StepBatch
  Buffer sample_data_;       // SampleOutputs on the device
  int sample_capacity_ = 0;  // rows of sample_data_
  StepResult result_;
};

}  // namespace ni
