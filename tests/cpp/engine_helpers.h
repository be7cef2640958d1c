// A tiny random model behind a real ni::Engine, a backend that can be tampered with, and the
// collecting of what requests got.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backend/registry.h"
#include "core/philox.h"
#include "engine/engine.h"

namespace ni {

// Two layers with grouped heads, sizes that fill no vector register evenly, one sliding window.
inline ModelConfig tiny_model() {
  ModelConfig m;
  m.vocab_size = 131;
  m.hidden_size = 40;
  m.intermediate_size = 72;
  m.num_heads = 4;
  m.num_kv_heads = 2;
  m.head_dim = 12;
  m.max_position_embeddings = 512;
  m.qk_norm = true;
  m.qkv_bias = true;
  RopeConfig rope;
  for (int i = 0; i < 6; ++i)
    rope.inv_freq.push_back(std::pow(10000.0f, -static_cast<float>(i) / 6));
  m.ropes = {rope};
  m.layers = {LayerConfig{0, 0}, LayerConfig{24, 0}};
  return m;
}

inline EngineConfig tiny_config() {
  EngineConfig c;
  c.num_threads = 1;
  c.dtype = DType::f32;
  c.kv_cache_dtype = DType::f32;
  c.num_blocks = 512;
  c.max_model_len = 256;
  c.max_num_seqs = 64;
  c.max_num_batched_tokens = 256;
  c.max_logprobs = 8;
  c.trace_capacity = 4096;
  c.check_invariants = true;
  return c;
}

// Number `index` of stream `key`, in [-1, 1).
inline float random_value(uint64_t key, size_t index) {
  return static_cast<float>(2.0 * philox_uniform(key, 0, static_cast<uint32_t>(index)) - 1.0);
}

// Norms near 1, matrices so that activations stay near 1 at every width.
inline void load_slot(Engine& engine, const std::pair<std::string, std::vector<int64_t>>& slot,
                      uint64_t key) {
  const auto& [name, shape] = slot;
  const int64_t cols = shape.size() == 2 ? shape[1] : 1;
  std::vector<float> values(static_cast<size_t>(shape[0] * cols));
  const bool norm = name.find("norm.weight") != std::string::npos;
  const float scale =
      norm ? 0.3f : (shape.size() == 2 ? 2.5f / std::sqrt(static_cast<float>(cols)) : 0.3f);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = (norm ? 1.0f : 0.0f) + scale * random_value(key, i);
  Tensor data(values.data(), DType::f32, {shape[0]});
  if (shape.size() == 2) data = Tensor(values.data(), DType::f32, {shape[0], cols});
  engine.load_weight(name, data);
}

// Fills every slot.
inline void load_random(Engine& engine, uint64_t key = 1) {
  for (const auto& slot : Weights(engine.model_config(), DType::f32).slots())
    load_slot(engine, slot, ++key);
  engine.finish_loading();
}

inline std::unique_ptr<Backend> cpu_backend(int num_threads = 1) {
  BackendOptions options;
  options.num_threads = num_threads;
  return make_backend("cpu", options);
}

inline std::unique_ptr<Engine> make_engine(const EngineConfig& config = tiny_config(),
                                           std::unique_ptr<Backend> backend = nullptr,
                                           const ModelConfig& model = tiny_model()) {
  auto engine = backend ? std::make_unique<Engine>(config, model, std::move(backend))
                        : std::make_unique<Engine>(config, model);
  load_random(*engine);
  return engine;
}

// Forwards everything; `before` sees the name of each call (and may throw, or wait), `after` what
// an operator has computed (and may change it).
class HookedBackend : public Backend {
 public:
  using Before = std::function<void(std::string_view op)>;
  using After = std::function<void(std::string_view op, const StepInputs* in, Tensor out)>;
  explicit HookedBackend(Before before, After after = nullptr, int num_threads = 1)
      : inner_(cpu_backend(num_threads)), before_(std::move(before)), after_(std::move(after)) {}

  size_t allocated = 0;            // bytes, on host and device
  std::atomic<bool> lost = false;  // the device

  const BackendInfo& info() const override { return inner_->info(); }
  size_t memory_available() const override { return inner_->memory_available(); }
  Buffer alloc(size_t bytes) override {
    enter("alloc");
    allocated += bytes;
    return inner_->alloc(bytes);
  }
  Buffer alloc_host(size_t bytes) override {
    enter("alloc");
    allocated += bytes;
    return inner_->alloc_host(bytes);
  }
  void upload(const void* host, void* device, size_t bytes) override {
    enter("upload");
    inner_->upload(host, device, bytes);
  }
  void download(const void* device, void* host, size_t bytes) override {
    enter("download");
    inner_->download(device, host, bytes);
  }
  void synchronize() override {
    enter("synchronize");
    inner_->synchronize();
  }
  uint64_t mark() override {
    enter("mark");
    return inner_->mark();
  }
  void wait(uint64_t mark) override {
    enter("wait");
    inner_->wait(mark);
  }
  bool healthy() const override { return !lost && inner_->healthy(); }
  void check_model(DType weights, int32_t num_heads, const std::vector<int32_t>& rotary_dims,
                   const KvView& kv) const override {
    inner_->check_model(weights, num_heads, rotary_dims, kv);
  }
  void prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows) override {
    inner_->prepare(weights, max_rows);
  }
  void run_step(GraphKey key, const std::function<void()>& step) override {
    enter("run_step");
    inner_->run_step(key, step);
  }
  size_t weight_bytes(const WeightSpec& spec) const override { return inner_->weight_bytes(spec); }
  void load_rows(const LinearWeight& w, int64_t first, Tensor src) override {
    inner_->load_rows(w, first, src);
  }
  void embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a, Tensor out) override {
    enter("embed");
    inner_->embed(in, w, a, out);
  }
  void norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) override {
    enter("norm");
    inner_->norm(x, w, a, out);
  }
  void add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                Tensor out) override {
    enter("add_norm");
    inner_->add_norm(x, residual, w, a, out);
  }
  void linear(Tensor x, const LinearWeight& w, const LinearArgs& a, Tensor out) override {
    enter("linear");
    inner_->linear(x, w, a, out);
    leave("linear", nullptr, out);
  }
  void rope_kv_write(Tensor qkv, const StepInputs& in, const RopeArgs& a,
                     const KvView& kv) override {
    enter("rope_kv_write");
    inner_->rope_kv_write(qkv, in, a, kv);
  }
  void attention(Tensor qkv, const StepInputs& in, const AttnArgs& a, const KvView& kv,
                 Tensor out) override {
    enter("attention");
    inner_->attention(qkv, in, a, kv, out);
    leave("attention", &in, out);
  }
  void activation(Tensor x, Activation act, bool gated, Tensor out) override {
    enter("activation");
    inner_->activation(x, act, gated, out);
  }
  void gather_rows(Tensor x, const int32_t* rows, int64_t count, Tensor out) override {
    enter("gather_rows");
    inner_->gather_rows(x, rows, count, out);
  }
  void copy_blocks(const StepInputs& in, const KvView& kv) override {
    enter("copy_blocks");
    inner_->copy_blocks(in, kv);
  }
  void sample(Tensor logits, const StepInputs& in, int32_t first,
              const SampleOutputs& out) override {
    enter("sample");
    inner_->sample(logits, in, first, out);
    leave("sample", &in, logits);
  }

 private:
  void enter(std::string_view op) const {
    if (before_) before_(op);
  }
  void leave(std::string_view op, const StepInputs* in, Tensor out) const {
    if (after_) after_(op, in, out);
  }
  std::unique_ptr<Backend> inner_;
  Before before_;
  After after_;
};

// Captures and replays steps as a device does: the first run of a key is recorded, call by call
// with its arguments, and later runs repeat the recorded calls, whatever the step would have done.
// Arrays of rows must then lie where they lay; all else is taken from the StepInputs in `device`
// memory. Attention wants work lists.
class GraphBackend : public HookedBackend {
 public:
  explicit GraphBackend(int num_threads = 1, Before before = nullptr)
      : HookedBackend(std::move(before), nullptr, num_threads), info_(HookedBackend::info()) {
    info_.has_graphs = true;
    info_.tiling = {.kv_chunk = 16, .q_tile = 8, .decode_rows = 4, .max_items = 300};
  }
  int captured = 0, replayed = 0, eager = 0;  // steps
  std::set<int> replayed_rows;

  const BackendInfo& info() const override { return info_; }
  void run_step(GraphKey key, const std::function<void()>& step) override {
    if (key.rows == 0) {
      ++eager;
      HookedBackend::run_step(key, step);
      return;
    }
    std::vector<std::function<void()>>& graph = graphs_[key];
    if (!graph.empty()) {
      ++replayed;
      replayed_rows.insert(key.rows);
      for (const auto& call : graph) call();
      return;
    }
    ++captured;
    capturing_ = &graph;
    HookedBackend::run_step(key, step);
    capturing_ = nullptr;
  }

  void embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a, Tensor out) override {
    call(in, [=, this, &w](const StepInputs& step) { HookedBackend::embed(step, w, a, out); });
  }
  void norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) override {
    call([=, this] { HookedBackend::norm(x, w, a, out); });
  }
  void add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                Tensor out) override {
    call([=, this] { HookedBackend::add_norm(x, residual, w, a, out); });
  }
  void linear(Tensor x, const LinearWeight& w, const LinearArgs& a, Tensor out) override {
    call([=, this, &w] { HookedBackend::linear(x, w, a, out); });
  }
  void rope_kv_write(Tensor qkv, const StepInputs& in, const RopeArgs& a,
                     const KvView& kv) override {
    call(in, [=, this](const StepInputs& step) { HookedBackend::rope_kv_write(qkv, step, a, kv); });
  }
  // The CPU's attention knows no rows of padding, which come last.
  void attention(Tensor qkv, const StepInputs& in, const AttnArgs& a, const KvView& kv,
                 Tensor out) override {
    call(in, [=, this](const StepInputs& step) {
      StepInputs real = step;
      while (real.num_seqs > 0 && real.context_lens[real.num_seqs - 1] == 0) --real.num_seqs;
      for (int64_t r = real.cu_seqlens_q[real.num_seqs]; r < out.rows(); ++r)
        std::fill_n(out.as<float>() + r * out.row_stride, out.cols(), 0.0f);
      check_items(real);
      HookedBackend::attention(qkv, real, a, kv, out);
    });
  }
  void activation(Tensor x, Activation act, bool gated, Tensor out) override {
    call([=, this] { HookedBackend::activation(x, act, gated, out); });
  }
  void gather_rows(Tensor x, const int32_t* rows, int64_t count, Tensor out) override {
    call([=, this] { HookedBackend::gather_rows(x, rows, count, out); });
  }
  void sample(Tensor logits, const StepInputs& in, int32_t first,
              const SampleOutputs& out) override {
    call(in,
         [=, this](const StepInputs& step) { HookedBackend::sample(logits, step, first, out); });
  }

 private:
  // What a launch was given as arguments cannot change.
  static bool same_rows(const StepInputs& a, const StepInputs& b) {
    return a.num_tokens == b.num_tokens && a.num_seqs == b.num_seqs &&
           a.num_logits == b.num_logits && a.num_copies == 0 && b.num_copies == 0 &&
           a.max_query_len == b.max_query_len && a.token_ids == b.token_ids &&
           a.sampled_ids == b.sampled_ids && a.positions == b.positions &&
           a.slot_mapping == b.slot_mapping && a.cu_seqlens_q == b.cu_seqlens_q &&
           a.context_lens == b.context_lens && a.logits_rows == b.logits_rows &&
           a.sampling == b.sampling && a.device == b.device;
  }
  // Every chunk of every decode, and every tile of the others, is listed once.
  void check_items(const StepInputs& in) const {
    int chunks = 0, tiles = 0;
    for (int s = 0; s < in.num_seqs; ++s) {
      const int rows = in.cu_seqlens_q[s + 1] - in.cu_seqlens_q[s];
      if (rows <= info_.tiling.decode_rows)
        chunks += (in.context_lens[s] + info_.tiling.kv_chunk - 1) / info_.tiling.kv_chunk;
      else
        tiles += (rows + info_.tiling.q_tile - 1) / info_.tiling.q_tile;
    }
    check_invariant(tiles == in.num_prefill_items, "tiles are missing");
    check_invariant(chunks == in.num_decode_items ||
                        chunks > info_.tiling.most_items(in.max_decode_query_len) - in.num_seqs,
                    "chunks are missing");
    for (int i = 1; i < in.num_decode_items; ++i)
      check_invariant(in.decode_items[i - 1].seq < in.decode_items[i].seq ||
                          in.decode_items[i - 1].index < in.decode_items[i].index,
                      "chunks are out of order");
  }
  template <typename Fn>
  void call(const Fn& fn) {
    if (capturing_ != nullptr) capturing_->push_back(fn);
    fn();
  }
  template <typename Fn>
  void call(const StepInputs& in, const Fn& fn) {
    if (capturing_ == nullptr) return fn(in);
    capturing_->push_back([in, fn] {
      check_invariant(same_rows(in, *in.device), "a captured step has moved");
      fn(*in.device);
    });
    capturing_->back()();
  }

  BackendInfo info_;
  std::map<GraphKey, std::vector<std::function<void()>>> graphs_;
  std::vector<std::function<void()>>* capturing_ = nullptr;
};

// A door that a backend waits at, until it is opened.
class Door {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    waiting_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  void wait_for_somebody() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return waiting_; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool waiting_ = false, open_ = false;
};

// A random prompt; equal keys give prompts of which one is the beginning of the other.
inline std::vector<int32_t> random_prompt(uint64_t key, int length) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < length; ++i)
    tokens.push_back(static_cast<int32_t>(philox_uniform(key, 7, static_cast<uint32_t>(i)) * 131));
  return tokens;
}

inline Request make_request(uint64_t id, std::vector<int32_t> prompt, int max_tokens = 8) {
  Request r;
  r.id = id;
  r.prompt = std::move(prompt);
  r.params.temperature = 0.0f;
  r.params.max_tokens = max_tokens;
  r.params.ignore_eos = true;
  return r;
}

inline bool operator==(const TokenLogprobs& a, const TokenLogprobs& b) {
  const auto bits = [](const std::vector<float>& v) {
    std::vector<uint32_t> out;
    for (const float x : v) out.push_back(std::bit_cast<uint32_t>(x));
    return out;
  };
  return a.token_id == b.token_id && a.rank == b.rank && a.top_ids == b.top_ids &&
         bits({a.logprob}) == bits({b.logprob}) && bits(a.top_logprobs) == bits(b.top_logprobs);
}

// All that one choice got.
struct Got {
  std::vector<int32_t> tokens;
  std::vector<TokenLogprobs> logprobs, prompt_logprobs;
  FinishReason reason = FinishReason::none;
  int32_t stop_token = -1;
  int num_cached = 0;
  int ends = 0;  // outputs with a finish reason: must become 1
  bool done = false;
  std::string error;
};
using Results = std::map<std::pair<uint64_t, int>, Got>;

inline void take(std::vector<Output> outputs, Results& results) {
  for (Output& o : outputs) {
    Got& got = results[{o.request_id, o.choice}];
    got.tokens.insert(got.tokens.end(), o.token_ids.begin(), o.token_ids.end());
    got.logprobs.insert(got.logprobs.end(), o.logprobs.begin(), o.logprobs.end());
    got.prompt_logprobs.insert(got.prompt_logprobs.end(), o.prompt_logprobs.begin(),
                               o.prompt_logprobs.end());
    got.num_cached = o.num_cached;
    if (o.finish_reason != FinishReason::none) {
      got.reason = o.finish_reason;
      got.stop_token = o.stop_token;
      ++got.ends;
    }
    got.done |= o.request_done;
    if (!o.error.empty()) got.error = o.error;
  }
}

// Steps until there is nothing to do.
inline Results run_all(Engine& engine, const std::function<void(int step)>& before_step = nullptr) {
  Results results;
  for (int step = 0;; ++step) {
    if (before_step) before_step(step);
    const bool worked = engine.step();
    take(engine.wait_outputs(0), results);
    if (!worked) return results;
  }
}

// The outputs of an engine thread until `requests` requests are done.
inline Results wait_all(Engine& engine, int requests) {
  Results results;
  while (requests > 0) {
    std::vector<Output> outputs = engine.wait_outputs(-1);
    if (outputs.empty()) break;  // stopped
    for (const Output& o : outputs) requests -= o.request_done;
    take(std::move(outputs), results);
  }
  return results;
}

inline bool balanced(const EngineStats& s) {
  return s.received == s.finished + s.aborted + s.rejected + s.failed +
                           static_cast<uint64_t>(s.running) + static_cast<uint64_t>(s.waiting);
}

// Nothing referenced: every block is free or cached.
inline bool all_blocks_back(const EngineStats& s) {
  return s.blocks.num_used == 0 && s.blocks.num_free + s.blocks.num_cached == s.blocks.num_blocks;
}

}  // namespace ni
