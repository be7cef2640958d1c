// A tiny random model behind a real ni::Engine, a backend that can be tampered with, and the
// collecting of what requests got.
#pragma once

#include <cmath>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
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

// Fills every slot: norms near 1, matrices so that activations stay near 1 at every width.
inline void load_random(Engine& engine, uint64_t key = 1) {
  for (const auto& [name, shape] : Weights(engine.model_config(), DType::f32).slots()) {
    ++key;
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

  size_t allocated = 0;  // bytes

  const BackendInfo& info() const override { return inner_->info(); }
  size_t memory_available() const override { return inner_->memory_available(); }
  Buffer alloc(size_t bytes) override {
    enter("alloc");
    allocated += bytes;
    return inner_->alloc(bytes);
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
  void run_step(int key, const std::function<void()>& step) override {
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
