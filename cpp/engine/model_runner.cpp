#include "engine/model_runner.h"

#include <algorithm>

#include "core/check.h"

namespace ni {
namespace {

// Logits rows computed at a time. It bounds their memory (rows x vocabulary x 4 bytes) when a step
// has many of them, as prompt log-probabilities do.
int logits_slab(const RunnerConfig& config) {
  return std::min(config.max_num_seqs, 64);
}

SampleOutputs sample_views(char* base, int rows, int max_logprobs) {
  SampleOutputs out;
  const auto n = static_cast<size_t>(rows), top = n * static_cast<size_t>(max_logprobs);
  out.max_logprobs = max_logprobs;
  out.token_ids = reinterpret_cast<int32_t*>(base);
  out.logprobs = reinterpret_cast<float*>(base + 4 * n);
  out.ranks = reinterpret_cast<int32_t*>(base + 8 * n);
  out.top_ids = reinterpret_cast<int32_t*>(base + 12 * n);
  out.top_logprobs = reinterpret_cast<float*>(base + 12 * n + 4 * top);
  return out;
}

size_t sample_bytes(int rows, int max_logprobs) {
  return static_cast<size_t>(rows) * (12 + 8 * static_cast<size_t>(max_logprobs));
}

// Logits rows of a step: each query row scores or samples, and of a prompt's last row, n choices
// may be sampled.
int max_sample_rows(const RunnerConfig& config) {
  return config.max_num_batched_tokens + config.max_num_seqs;
}

int max_blocks(const RunnerConfig& config) {
  return (config.max_model_len + config.block_size - 1) / config.block_size;
}

}  // namespace

ModelRunner::ModelRunner(std::unique_ptr<Backend> backend, const ModelConfig& model,
                         const RunnerConfig& config)
    : model_(model),
      config_(config),
      backend_(std::move(backend)),
      weights_(model_, config.dtype),
      cache_(model_, config.kv_dtype, config.block_size),
      activations_(model_, backend_->info().activation_dtype, config.max_num_batched_tokens,
                   logits_slab(config)),
      batch_(config.block_size, model.vocab_size, config.eos_token_ids),
      max_logits_(logits_slab(config)) {
  check_arg(config.num_blocks > 0, "num_blocks must be positive, got ", config.num_blocks);
  check_arg(!model.learned_positions || config.max_model_len <= model.max_position_embeddings,
            "max_model_len is ", config.max_model_len, ", but the model has ",
            model.max_position_embeddings, " learned positions");
  weights_.allocate(*backend_);
}

MemoryPlan ModelRunner::plan_memory(const Backend& backend, const ModelConfig& model,
                                    const RunnerConfig& config) {
  MemoryPlan plan;
  plan.weights = Weights(model, config.dtype).bytes(backend);
  plan.activations =
      Activations(model, backend.info().activation_dtype, config.max_num_batched_tokens,
                  logits_slab(config))
          .bytes() +
      RopeTables::bytes(model, config.max_model_len) +
      StepBatch::max_bytes(config.max_num_batched_tokens, config.max_num_seqs, max_blocks(config)) +
      sample_bytes(max_sample_rows(config), config.max_logprobs);
  plan.kv_block = KvCache(model, config.kv_dtype, config.block_size).block_bytes();
  return plan;
}

void ModelRunner::load_weight(const std::string& slot, const Tensor& data) {
  weights_.load(*backend_, slot, data);
}

void ModelRunner::finish_loading() {
  weights_.check_complete();
  activations_.allocate(*backend_);
  batch_.reserve(config_.max_num_batched_tokens, config_.max_num_seqs, max_blocks(config_));
  step_data_ = backend_->alloc(batch_.capacity());
  sample_capacity_ = max_sample_rows(config_);
  sample_data_ = backend_->alloc(sample_bytes(sample_capacity_, config_.max_logprobs));
  const auto rows = static_cast<size_t>(sample_capacity_);
  for (std::vector<int32_t>* v : {&result_.token_ids, &result_.ranks, &result_.samples})
    v->reserve(rows);
  result_.logprobs.reserve(rows);
  cache_.allocate(*backend_, config_.num_blocks);
  ropes_ = std::make_unique<RopeTables>(model_, config_.max_model_len, *backend_);
  decoder_ = std::make_unique<Decoder>(model_, weights_, cache_, *ropes_, activations_, *backend_);
}

StepInputs ModelRunner::forward(const StepPlan& plan) {
  batch_.build(plan);
  // Only what max_bytes() does not count can make it grow.
  if (step_data_.bytes() < batch_.bytes()) step_data_ = backend_->alloc(2 * batch_.bytes());
  backend_->upload(batch_.data(), step_data_.data(), batch_.bytes());
  const StepInputs in = batch_.inputs_at(step_data_.data());
  backend_->run_step(0, [&] { decoder_->forward(in); });
  return in;
}

void ModelRunner::launch(const StepPlan& plan) {
  const StepInputs in = forward(plan);
  sample_rows(in, sample_views(sample_data_.data(), sample_capacity_, config_.max_logprobs));
}

void ModelRunner::sample_rows(const StepInputs& in, const SampleOutputs& out) {
  for (int first = 0; first < in.num_logits; first += max_logits_) {
    const int count = std::min(max_logits_, in.num_logits - first);
    backend_->sample(decoder_->logits(in, first, count), in, first, out);
  }
}

const StepResult& ModelRunner::collect() {
  const auto rows = static_cast<size_t>(batch_.inputs().num_logits);
  // The lists of likely tokens stay on the device unless somebody asked for them.
  const auto top = static_cast<size_t>(batch_.wants_top() ? config_.max_logprobs : 0);
  const SampleOutputs device =
      sample_views(sample_data_.data(), sample_capacity_, config_.max_logprobs);
  const auto fetch = [&](const auto* from, auto& to, size_t count) {
    to.resize(count);
    if (count > 0) backend_->download(from, to.data(), count * sizeof(to[0]));
  };
  fetch(device.token_ids, result_.token_ids, rows);
  fetch(device.logprobs, result_.logprobs, rows);
  fetch(device.ranks, result_.ranks, rows);
  fetch(device.top_ids, result_.top_ids, rows * top);
  fetch(device.top_logprobs, result_.top_logprobs, rows * top);
  backend_->synchronize();
  result_.samples.clear();
  for (const int32_t row : batch_.sample_rows())
    result_.samples.push_back(result_.token_ids[static_cast<size_t>(row)]);
  return result_;
}

std::vector<float> ModelRunner::logits(const std::vector<int32_t>& tokens,
                                       const std::vector<int32_t>& blocks) {
  const int total = static_cast<int>(tokens.size());
  const auto vocab = static_cast<size_t>(model_.vocab_size);
  std::vector<float> out(tokens.size() * vocab);
  auto request = std::make_shared<Request>();
  request->prompt = tokens;
  request->params.prompt_logprobs = 0;  // every row yields logits; the last one by its sample
  Sequence seq;
  seq.request = request;
  seq.tokens = tokens;
  seq.num_prompt = total;
  seq.block_table = blocks;
  size_t done = 0;
  while (seq.num_computed < total) {
    StepPlan plan;
    const int chunk = std::min(config_.max_num_batched_tokens, seq.num_pending());
    plan.items.push_back({&seq, chunk, seq.num_computed + chunk == total ? 1 : 0, 0, false});
    const StepInputs in = forward(plan);
    for (int first = 0; first < in.num_logits; first += max_logits_) {
      const int count = std::min(max_logits_, in.num_logits - first);
      const Tensor rows = decoder_->logits(in, first, count);
      const size_t elements = static_cast<size_t>(count) * vocab;
      backend_->download(rows.data, out.data() + done, elements * sizeof(float));
      backend_->synchronize();
      done += elements;
    }
    seq.num_computed += chunk;
  }
  return out;
}

}  // namespace ni
