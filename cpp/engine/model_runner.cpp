#include "engine/model_runner.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

#include "core/check.h"

namespace ni {
namespace {

// It asks for work lists.
bool is_card(const BackendInfo& info) {
  return info.tiling.kv_chunk > 0;
}

// Rows of a step that score a token of their prompt.
int max_scored_rows(const RunnerConfig& config) {
  return config.max_scored_rows > 0 ? config.max_scored_rows : config.max_num_batched_tokens;
}

// Logits rows of a step: each query row scores or samples, and of a prompt's last row, n choices
// may be sampled.
int max_sample_rows(const RunnerConfig& config) {
  return max_scored_rows(config) + config.max_num_seqs;
}

// Logits rows computed at a time. It bounds their memory (rows x vocabulary x 4 bytes) when a step
// has many of them, as prompt log-probabilities do: so many that reading lm_head is worth it, and
// on a card all that decodes have, up to 512.
int logits_slab(const RunnerConfig& config, const BackendInfo& info) {
  const int rows = is_card(info) ? std::clamp(config.max_num_seqs, 256, 512) : 64;
  return std::min(max_sample_rows(config), rows);
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

int max_blocks(const RunnerConfig& config) {
  return (config.max_model_len + config.block_size - 1) / config.block_size;
}

size_t steps_in_flight(const RunnerConfig& config) {
  return config.overlap ? 2 : 1;
}

// What captured steps will take, about.
size_t graph_bytes(const BackendInfo& info, size_t num_graphs) {
  constexpr size_t kGraphs = 64'000'000, kGraph = 4'000'000;  // a size has up to four
  return info.has_graphs ? kGraphs + kGraph * num_graphs : 0;
}

// Kernels and libraries, a copy of the logits for the sampler and attention's sums of chunks.
size_t working_bytes(const BackendInfo& info, const ModelConfig& model, int logits_rows) {
  constexpr size_t kLibraries = 256'000'000;
  const auto logits = static_cast<size_t>(logits_rows) * static_cast<size_t>(model.vocab_size);
  const int64_t chunk_rows = int64_t{info.tiling.max_items} * info.tiling.decode_rows;
  const int64_t row = (model.num_heads + 1) / 2 * 2 * (model.q_size() / model.num_heads + 2);
  const auto sums = static_cast<size_t>(chunk_rows * row);
  return kLibraries + 4 * (logits + sums);
}

double gigabytes(double bytes) {
  return std::round(bytes / 1e7) / 100;
}

}  // namespace

ModelRunner::ModelRunner(std::unique_ptr<Backend> backend, const ModelConfig& model,
                         const RunnerConfig& config)
    : model_(model),
      config_(config),
      backend_(std::move(backend)),
      weights_(model_, config.dtype),
      cache_(model_, config.kv_dtype, config.block_size, backend_->info().k_tile),
      activations_(model_, backend_->info().activation_dtype, config.max_num_batched_tokens,
                   logits_slab(config, backend_->info())),
      max_logits_(logits_slab(config, backend_->info())),
      num_blocks_(config.num_blocks),
      graph_sizes_(config.graph_sizes) {
  const BackendInfo& info = backend_->info();
  check_arg(config.memory_fraction >= 0 && config.memory_fraction <= 1,
            "memory_fraction must be in [0, 1], got ", config.memory_fraction);
  check_arg(config.num_blocks > 0 || (config.num_blocks == 0 && config.memory_fraction > 0),
            "num_blocks must be positive, got ", config.num_blocks);
  check_arg(!model.learned_positions || config.max_model_len <= model.max_position_embeddings,
            "max_model_len is ", config.max_model_len, ", but the model has ",
            model.max_position_embeddings, " learned positions");
  check_arg(info.tiling.kv_chunk == 0 || config.max_num_seqs <= info.tiling.max_items,
            "max_num_seqs is ", config.max_num_seqs, ", but on ", info.device,
            " it can be at most ", info.tiling.max_items);
  std::sort(graph_sizes_.begin(), graph_sizes_.end());
  graph_sizes_.erase(std::unique(graph_sizes_.begin(), graph_sizes_.end()), graph_sizes_.end());
  for (const int size : graph_sizes_)
    check_arg(size >= 1 && size <= config.max_num_seqs, "graph_sizes must be in [1, ",
              config.max_num_seqs, "] (max_num_seqs), got ", size);
  std::vector<int32_t> rotary_dims;
  for (const RopeConfig& rope : model_.ropes)
    rotary_dims.push_back(static_cast<int32_t>(2 * rope.inv_freq.size()));
  backend_->check_model(config.dtype, model_.num_heads, rotary_dims, cache_.view());
  weights_.allocate(*backend_);
}

MemoryPlan ModelRunner::plan_memory(const Backend& backend, const ModelConfig& model,
                                    const RunnerConfig& config) {
  const BackendInfo& info = backend.info();
  MemoryPlan plan;
  plan.weights = Weights(model, config.dtype).bytes(backend);
  plan.activations = Activations(model, info.activation_dtype, config.max_num_batched_tokens,
                                 logits_slab(config, info))
                         .bytes() +
                     RopeTables::bytes(model, config.max_model_len);
  const size_t step = StepBatch::max_bytes(config.max_num_batched_tokens, config.max_num_seqs,
                                           max_blocks(config), info.tiling);
  const size_t samples = sample_bytes(max_sample_rows(config), config.max_logprobs);
  const size_t slots = steps_in_flight(config);
  plan.activations += slots * step + samples;
  if (!is_card(info)) plan.activations += slots * (step + samples);  // the host's side
  plan.kv_block = KvCache(model, config.kv_dtype, config.block_size, info.k_tile).block_bytes();
  if (is_card(info))
    plan.reserve = graph_bytes(info, config.graph_sizes.size()) +
                   working_bytes(info, model, logits_slab(config, info));
  return plan;
}

void ModelRunner::load_weight(const std::string& slot, const Tensor& data) {
  weights_.load(*backend_, slot, data);
}

// The cache comes last and gets what is left: all else is allocated before it, and a step of the
// largest size has been run, so that what the device takes for itself is taken, too. Captured steps
// come after it, for they hold its addresses.
void ModelRunner::finish_loading() {
  weights_.check_complete();
  allocate_step_memory();
  backend_->prepare(weights_.products(), config_.max_num_batched_tokens);
  cache_.allocate(*backend_, std::max(num_blocks_, 1));
  // On a card everything that grows when it is first needed grows here.
  if (is_card(backend_->info()) || num_blocks_ == 0) run_largest_step();
  if (num_blocks_ == 0) {
    num_blocks_ = blocks_that_fit();
    cache_.allocate(*backend_, num_blocks_);
  }
  if (backend_->info().has_graphs) capture_graphs();
}

void ModelRunner::allocate_step_memory() {
  activations_.allocate(*backend_);
  ropes_ = std::make_unique<RopeTables>(model_, config_.max_model_len, *backend_);
  decoder_ = std::make_unique<Decoder>(model_, weights_, cache_, *ropes_, activations_, *backend_);
  sample_capacity_ = max_sample_rows(config_);
  const size_t bytes = sample_bytes(sample_capacity_, config_.max_logprobs);
  sample_data_ = backend_->alloc(bytes);
  outputs_ = sample_views(sample_data_.data(), sample_capacity_, config_.max_logprobs);
  const auto allocate_host = [this](size_t n) { return backend_->alloc_host(n); };
  for (size_t i = 0; i < steps_in_flight(config_); ++i) {
    slots_.push_back({StepBatch(config_.block_size, model_.vocab_size, config_.eos_token_ids,
                                backend_->info().tiling, allocate_host),
                      backend_->alloc_host(bytes),
                      Buffer(),
                      Buffer(),
                      {},
                      0,
                      StepResult()});
    Slot& slot = slots_.back();
    slot.batch.reserve(config_.max_num_batched_tokens, config_.max_num_seqs, max_blocks(config_));
    slot.result.samples.reserve(static_cast<size_t>(sample_capacity_));
    slot.result.outputs =
        sample_views(slot.host_data.data(), sample_capacity_, config_.max_logprobs);
    slot.step_data = backend_->alloc(slot.batch.capacity());
  }
}

// As many rows as a step can have, in prompts as long as possible; as many as can yield logits.
// They write nothing, and all that they read is block 0.
void ModelRunner::run_largest_step() {
  auto request = std::make_shared<Request>();
  request->params.prompt_logprobs = 0;
  std::vector<Sequence> prompts(static_cast<size_t>(config_.max_num_seqs));
  StepPlan plan;
  int left = config_.max_num_batched_tokens, left_scored = max_scored_rows(config_);
  for (Sequence& seq : prompts) {
    const int rows = std::min(left, config_.max_model_len);
    if (rows == 0) break;
    left -= rows;
    seq.request = request;
    seq.tokens.assign(static_cast<size_t>(rows), 0);
    seq.num_prompt = std::min(rows, left_scored);  // the others' tokens are output
    left_scored -= seq.num_prompt;
    seq.block_table.assign(static_cast<size_t>(max_blocks(config_)), 0);
    plan.items.push_back({&seq, rows, 1, 0, false});
  }
  StepBatch& batch = slots_[0].batch;
  batch.build(plan);
  batch.forbid_writes();
  compute(upload(slots_[0]), {});
  backend_->synchronize();
  batch.build(StepPlan(), config_.max_num_seqs);  // decodes have working memory of their own
  compute(upload(slots_[0]), {});
  backend_->synchronize();
}

int ModelRunner::blocks_that_fit() const {
  const BackendInfo& info = backend_->info();
  const auto total = static_cast<double>(info.memory_total);
  const auto available = static_cast<double>(backend_->memory_available());
  const auto graphs = static_cast<double>(graph_bytes(info, graph_sizes_.size()));
  const double budget = config_.memory_fraction * total - (total - available) - graphs;
  const auto block = static_cast<double>(cache_.block_bytes());
  const int longest = max_blocks(config_);
  const double fits = std::floor(std::max(budget, 0.0) / block);
  const std::string lower =
      fits > 0 ? concat("max_model_len to ", fits * config_.block_size) : "max_model_len";
  check_runtime(fits >= longest, "too little memory for the KV cache: ", gigabytes(available),
                " GB are free, of which ", gigabytes(std::max(budget, 0.0)),
                " GB may be used, and one sequence of max_model_len (", config_.max_model_len,
                " tokens) needs ", gigabytes(longest * block), " GB; lower ", lower,
                " or raise gpu_memory_utilization (", config_.memory_fraction, ")");
  const double most = static_cast<double>(longest) * config_.max_num_seqs;
  return static_cast<int>(std::min({fits, most, 2e9}));
}

// Largest first, so that smaller ones find the memory that they need; with all of the sampler's
// kernels before those without some. The first slot twice: its first run has not been a replay.
void ModelRunner::capture_graphs() {
  for (size_t i = graph_sizes_.size(); i-- > 0;) {
    for (size_t run = 0; run <= slots_.size(); ++run) {
      const size_t slot = run % slots_.size();
      for (const bool plain : {false, true}) {
        slots_[slot].batch.build(StepPlan(), graph_sizes_[i]);
        StepInputs in = upload(slots_[slot]);
        in.plain_sampling = plain;
        compute(in, {graph_sizes_[i], plain, static_cast<int32_t>(slot)});
        backend_->synchronize();
      }
    }
  }
}

// The rows to which a step is padded to be captured; 0: it is run as it is.
int ModelRunner::graph_rows(const StepPlan& plan) const {
  const auto rows = static_cast<int>(plan.items.size());
  if (plan.num_decodes != rows || plan.num_tokens != rows || !plan.copies.empty()) return 0;
  const auto size = std::lower_bound(graph_sizes_.begin(), graph_sizes_.end(), rows);
  return size == graph_sizes_.end() ? 0 : *size;
}

StepInputs ModelRunner::upload(Slot& slot) {
  StepBatch& batch = slot.batch;
  // Only what max_bytes() does not count can make it larger.
  Buffer& memory = batch.bytes() <= slot.step_data.bytes() ? slot.step_data : slot.large_step_data;
  if (memory.bytes() < batch.bytes()) memory = backend_->alloc(2 * batch.bytes());
  const StepInputs in =
      batch.inputs_at(memory.data(), outputs_.token_ids, slot.result.outputs.token_ids);
  backend_->upload_ahead(batch.data(), memory.data(), batch.bytes());  // nothing reads it now
  return in;
}

// Returns wait_for_forward()'s mark.
std::optional<uint64_t> ModelRunner::compute(const StepInputs& in, GraphKey key) {
  check_invariant(in.num_logits <= sample_capacity_, "a step has more logits rows than planned");
  const bool marks = config_.marks_forward && key.rows == 0 && in.num_logits > 0;
  std::optional<uint64_t> mark;
  const auto step = [&] {
    decoder_->forward(in);
    if (marks) mark = backend_->mark();
    sample_rows(in);
  };
  // A reference, because a std::function of anything larger would allocate memory.
  backend_->run_step(key, std::ref(step));
  return mark;
}

void ModelRunner::sample_rows(const StepInputs& in) {
  for (int first = 0; first < in.num_logits; first += max_logits_) {
    const int count = std::min(max_logits_, in.num_logits - first);
    backend_->sample(decoder_->logits(in, first, count), in, first, outputs_);
  }
}

void ModelRunner::launch(const StepPlan& plan) {
  check_invariant(in_flight_ < slots_.size(), "too many steps are in flight");
  const size_t index = (oldest_ + in_flight_) % slots_.size();
  Slot& slot = slots_[index];
  const int rows = graph_rows(plan);
  slot.batch.build(plan, rows);
  const StepInputs in = upload(slot);
  const bool fits = slot.batch.bytes() <= slot.step_data.bytes();
  slot.forward_mark =
      compute(in, {fits ? rows : 0, in.plain_sampling, static_cast<int32_t>(index)});
  download(slot);
  slot.mark = backend_->mark();
  ++in_flight_;
}

// What the sampler has not put there itself (StepInputs::host_ids). Padding is left behind, and
// what nobody asked for.
void ModelRunner::download(Slot& slot) {
  const StepBatch& batch = slot.batch;
  const size_t rows = batch.rows().size();
  const size_t scores = batch.wants_logprobs() ? rows : 0;
  const size_t top = batch.wants_top() ? rows * static_cast<size_t>(config_.max_logprobs) : 0;
  const SampleOutputs& to = slot.result.outputs;
  const auto fetch = [this](const auto* from, auto* host, size_t count) {
    if (count > 0) backend_->download(from, host, count * sizeof(*host));
  };
  fetch(outputs_.logprobs, to.logprobs, scores);
  fetch(outputs_.ranks, to.ranks, scores);
  fetch(outputs_.top_ids, to.top_ids, top);
  fetch(outputs_.top_logprobs, to.top_logprobs, top);
}

bool ModelRunner::wait_for_forward() {
  check_invariant(in_flight_ > 0, "no step is in flight");
  const std::optional<uint64_t> mark = slots_[oldest_].forward_mark;
  if (mark) backend_->wait(*mark);
  return mark.has_value();
}

const StepResult& ModelRunner::collect() {
  check_invariant(in_flight_ > 0, "no step is in flight");
  Slot& slot = slots_[oldest_];
  backend_->wait(slot.mark);
  oldest_ = (oldest_ + 1) % slots_.size();
  --in_flight_;
  StepResult& result = slot.result;
  result.batch = &slot.batch;
  result.samples.clear();
  for (const int32_t row : slot.batch.sample_rows())
    result.samples.push_back(result.outputs.token_ids[row]);
  return result;
}

void ModelRunner::discard() noexcept {
  in_flight_ = 0;
  try {
    backend_->synchronize();
  } catch (const std::exception&) {  // what was in flight has failed already
  }
}

std::vector<float> ModelRunner::logits(const std::vector<int32_t>& tokens,
                                       const std::vector<int32_t>& blocks) {
  check_invariant(in_flight_ == 0, "logits() while a step is in flight");
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
    StepBatch& batch = slots_[0].batch;
    batch.build(plan);
    const StepInputs in = upload(slots_[0]);
    const auto forward = [&] { decoder_->forward(in); };
    backend_->run_step({}, std::ref(forward));
    for (int first = 0; first < in.num_logits; first += max_logits_) {
      const int count = std::min(max_logits_, in.num_logits - first);
      const Tensor rows = decoder_->logits(in, first, count);
      for (int64_t r = 0; r < count; ++r, done += vocab)
        backend_->download(rows.rows(r, 1).data, out.data() + done, vocab * sizeof(float));
      backend_->synchronize();
    }
    seq.num_computed += chunk;
  }
  return out;
}

}  // namespace ni
