// A backend for callers whose arrays are host memory (tests, study, numpy), over any other one.
//
// Activations are float32 host tensors; biases, norm parameters, rope tables, the arrays of
// StepInputs and the sampler's results are host memory of the caller, too. What is the inner
// backend's: memory of alloc(), so weights and caches.
//
// Every operator call copies its operands into one block of the inner backend's memory (activations
// converted to the inner type, StepInputs with its lists and its `device` pointer), runs there and
// copies the results back. Rows lie apart with guards around them and outputs start as NaN;
// whatever changed beside the results is a stray write, a std::logic_error. Ids, slots and block
// tables are checked here, since a device cannot say what is wrong with them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace ni {

class StagedBackend final : public Backend {
 public:
  explicit StagedBackend(std::unique_ptr<Backend> inner);

  // float32 activations, no work lists, no graphs; all else is the inner backend's.
  const BackendInfo& info() const override { return info_; }
  Backend& inner() { return *inner_; }

  size_t memory_available() const override { return inner_->memory_available(); }
  Buffer alloc(size_t bytes) override { return inner_->alloc(bytes); }
  Buffer alloc_host(size_t bytes) override { return inner_->alloc_host(bytes); }
  void upload(const void* host, void* device, size_t bytes) override;
  void download(const void* device, void* host, size_t bytes) override;
  void synchronize() override { inner_->synchronize(); }
  uint64_t mark() override { return inner_->mark(); }
  void wait(uint64_t mark) override { inner_->wait(mark); }
  void run_step(GraphKey /*key*/, const std::function<void()>& step) override { step(); }
  bool healthy() const override { return inner_->healthy(); }

  void check_model(DType weights, int32_t num_heads, const std::vector<int32_t>& rotary_dims,
                   const KvView& kv) const override;
  size_t weight_bytes(const WeightSpec& spec) const override { return inner_->weight_bytes(spec); }
  void load_rows(const LinearWeight& w, int64_t first_row, Tensor src) override;
  // Its results do not depend on plans, and biases come with each call.
  void prepare(const std::vector<const LinearWeight*>& /*weights*/, int64_t /*rows*/) override {}

  void embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a, Tensor out) override;
  void norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) override;
  void add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                Tensor out) override;
  bool fuses(const LinearWeight& w, const LinearArgs& a, int64_t rows) const override;
  void linear(Tensor x, const LinearWeight& w, const LinearArgs& a, Tensor out) override;
  void rope_kv_write(Tensor qkv, const StepInputs& in, const RopeArgs& a,
                     const KvView& kv) override;
  void attention(Tensor qkv, const StepInputs& in, const AttnArgs& a, const KvView& kv,
                 Tensor out) override;
  void activation(Tensor x, Activation act, bool gated, Tensor out) override;
  void gather_rows(Tensor x, const int32_t* rows, int64_t count, Tensor out) override;
  void copy_blocks(const StepInputs& in, const KvView& kv) override;
  void sample(Tensor logits, const StepInputs& in, int32_t first,
              const SampleOutputs& out) override;

 private:
  class Call;
  char* device_memory(size_t bytes);

  std::unique_ptr<Backend> inner_;
  BackendInfo info_;
  Buffer memory_;  // of the block, as large as was ever needed
};

}  // namespace ni
