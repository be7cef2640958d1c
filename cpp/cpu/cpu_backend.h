// The CPU backend: operators cut into rows and tiles, spread over a thread pool, computed by the
// kernels of one instruction set. Activations are fp32. One caller at a time.
#pragma once

#include "backend/backend.h"
#include "core/thread_pool.h"
#include "cpu/isa.h"

namespace ni {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options);

  const BackendInfo& info() const override { return info_; }
  size_t memory_available() const override;
  Buffer alloc(size_t bytes) override;
  Buffer alloc_host(size_t bytes) override { return alloc(bytes); }
  void upload(const void* host, void* device, size_t bytes) override;
  void download(const void* device, void* host, size_t bytes) override;
  void synchronize() override {}
  uint64_t mark() override { return 0; }
  void wait(uint64_t /*mark*/) override {}
  void run_step(GraphKey /*key*/, const std::function<void()>& step) override { step(); }
  bool healthy() const override { return true; }

  void check_model(DType weights, int32_t num_heads, const std::vector<int32_t>& rotary_dims,
                   const KvView& kv) const override;

  size_t weight_bytes(const WeightSpec& spec) const override;
  void load_rows(const LinearWeight& w, int64_t first_row, Tensor src) override;
  void prepare(const std::vector<const LinearWeight*>& /*weights*/, int64_t /*rows*/) override {}

  void embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a, Tensor out) override;
  void norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) override;
  void add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                Tensor out) override;
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
  // Working memory that grows to the largest need and stays.
  char* scratch(size_t bytes);

  const KernelTable& kernels_;
  ThreadPool pool_;
  BackendInfo info_;
  Buffer scratch_;
};

// Shared argument checks. `what` names the operator and the tensor.
void check_matrix(const Tensor& t, int64_t rows, int64_t cols, const char* what);
void check_kv(const KvView& kv);

// Rows that are worth waking a thread for, when a row costs about `elements` operations.
inline int64_t row_grain(int64_t elements) {
  return elements < 16384 ? 16384 / (elements + 1) + 1 : 1;
}

}  // namespace ni
