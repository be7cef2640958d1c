// The CUDA backend: one card, one stream, and one for what upload_ahead() brings. Operators check
// their arguments and launch; nothing waits but download() and wait(). Activations are bf16 or f16.
//
// One caller at a time, but for alloc(), upload() and load_rows(), which loading calls from several
// threads.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <type_traits>
#include <vector>

#include "backend/backend.h"
#include "cuda/kernels.h"
#include "cuda/linear.h"
#include "cuda/weight_loader.h"

namespace ni::cuda {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const BackendOptions& options);
  ~CudaBackend() override;

  const BackendInfo& info() const override { return info_; }
  size_t memory_available() const override;
  Buffer alloc(size_t bytes) override;
  Buffer alloc_host(size_t bytes) override;
  void upload(const void* host, void* device, size_t bytes) override;
  void upload_ahead(const void* host, void* device, size_t bytes) override;
  void download(const void* device, void* host, size_t bytes) override;
  void synchronize() override;
  uint64_t mark() override;
  void wait(uint64_t mark) override;
  void run_step(GraphKey key, const std::function<void()>& step) override;
  bool healthy() const override { return healthy_; }

  void check_model(DType weights, int32_t num_heads, const std::vector<int32_t>& rotary_dims,
                   const KvView& kv) const override;
  size_t weight_bytes(const WeightSpec& spec) const override;
  void load_rows(const LinearWeight& w, int64_t first_row, Tensor src) override;
  void prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows) override;

  void embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a, Tensor out) override;
  void norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) override;
  void add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                Tensor out) override;
  bool fuses(const LinearWeight& w, const LinearArgs& a, int64_t rows) const override;
  bool fuses(const StepInputs& in, const AttnArgs& a, const KvView& kv) const override;
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

  // For guests that bring their own stream (torch): where operators run from now on.
  void set_stream(void* stream) { stream_ = static_cast<cudaStream_t>(stream); }

 private:
  // A piece of working memory that grows outside of captures. What captured steps may still point
  // to is kept.
  struct Workspace {
    std::vector<Buffer> buffers;
    void* data() const { return buffers.empty() ? nullptr : buffers.back().data(); }
  };
  void* reserve(Workspace& workspace, size_t bytes);
  void check(cudaError_t error, const char* what) const;
  void use_device() const;
  void check_activations(const Tensor& t, int64_t rows, int64_t cols, const char* what) const;
  void check_kv(const KvView& kv, const char* what) const;

  // What the runtime hands out; freed also when the constructor throws half-way.
  template <auto destroy>
  struct Destroy {
    template <typename T>
    void operator()(T* handle) const {
      destroy(handle);
    }
  };
  template <typename Handle, auto destroy>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy<destroy>>;
  using Stream = Owned<cudaStream_t, cudaStreamDestroy>;
  using Event = Owned<cudaEvent_t, cudaEventDestroy>;
  using Graph = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;
  Graph capture(const std::function<void()>& step);

  int device_;
  BackendInfo info_;
  Card card_;
  bool graphs_;
  Stream own_stream_;  // declared before all that uses it
  cudaStream_t stream_ = nullptr;
  Stream ahead_;    // of upload_ahead()
  Event uploaded_;  // the last one there
  static constexpr size_t kMarks = 16;
  std::array<Event, kMarks> marks_;
  uint64_t num_marks_ = 0;
  bool capturing_ = false;
  mutable std::atomic<bool> healthy_ = true;  // loader threads may find out, too
  std::map<GraphKey, Graph> captured_;
  std::set<int32_t> ran_;  // rows of keys
  std::unique_ptr<Linear> linear_;
  std::unique_ptr<WeightLoader> loader_;
  std::mutex loader_mutex_;
  Workspace decode_, sample_;
  // On another's stream anything may have been written by the kernel before.
  bool is_guest() const { return stream_ != own_stream_.get(); }
  // Of the last rope_kv_write(), until the next attention(): if it has the same, the step before it
  // has long been written.
  const int64_t* written_slots_ = nullptr;
  // Of what the last linear() has left units in sample_, until the next sample().
  struct SummedUp {
    const void* logits = nullptr;
    int64_t rows = 0, vocab = 0;
    const StepInputs* step = nullptr;
    int32_t first = 0;
    bool operator==(const SummedUp&) const = default;
  };
  SummedUp summed_up_;
  bool unwritten_ = false;  // those logits
};

}  // namespace ni::cuda
