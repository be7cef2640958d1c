// The contract between the model and a device. One implementation per kind of device: cpp/cpu,
// cuda.
//
// Every operator obeys promise 1: a row's result depends on that row's own content and position
// alone, never on how many rows stand beside it, how a prompt was cut into chunks, or how many
// threads run. So the order of a sum over K, over cache positions (tiles at fixed absolute
// positions) or over the vocabulary is fixed, and attention reads K and V back from the cache also
// for the present chunk.
//
// T query rows, S sequences, L logits rows: see core/step_inputs.h. Activations have
// info().activation_dtype; 2-D tensors are [rows, features].
#pragma once

#include <compare>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/op_args.h"
#include "core/step_inputs.h"
#include "core/tensor.h"

namespace ni {

struct BackendInfo {
  std::string device;  // "cpu", "cuda"
  std::string name;    // "avx512_bf16, 2 threads", "NVIDIA H200"
  DType activation_dtype = DType::f32;
  size_t memory_total = 0;         // bytes
  int32_t k_tile = 16;             // layout of K in the cache: KvView::k_tile
  AttnTiling tiling;               // work lists
  bool has_graphs = false;         // run_step() captures and replays
  bool is_batch_invariant = true;  // promise 1 holds
};

struct BackendOptions {
  int num_threads = 0;   // CPU: 0 = one per available core
  std::string isa;       // CPU: "" = best; portable, avx2, avx512, avx512_bf16, reference
  int device_index = 0;  // CUDA: which card
  DType activation_dtype = DType::bf16;  // CUDA: bf16 or f16
  bool batch_invariant = true;           // CUDA
  bool enable_graphs = true;             // CUDA
  std::string plan_cache;                // CUDA: file of timed GEMM plans; "": none
};

// Names a captured step. No rows: run it as it is.
struct GraphKey {
  int32_t rows = 0;
  bool plain_sampling = false;  // as in StepInputs
  int32_t slot = 0;             // in which of several places its inputs are
  auto operator<=>(const GraphKey&) const = default;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // -- Memory and running ---------------------------------------------------------------------
  virtual const BackendInfo& info() const = 0;
  // Bytes that are free now.
  virtual size_t memory_available() const = 0;
  // Zero-filled, 64-byte aligned. Throws std::runtime_error naming the size if there is not enough.
  virtual Buffer alloc(size_t bytes) = 0;
  // Host memory that the device copies from and to at full speed and without waiting.
  virtual Buffer alloc_host(size_t bytes) = 0;
  // In the order of the calls and of the operators; from and to memory of alloc_host() they may
  // return before the copy is done (mark() and wait() tell when), else they return after. Operators
  // write to memory of alloc_host(), too (StepInputs::host_ids).
  virtual void upload(const void* host, void* device, size_t bytes) = 0;
  virtual void download(const void* device, void* host, size_t bytes) = 0;
  // As upload(), but it may overtake what was asked for before, which must have nothing to do with
  // `device` any more. What is asked for afterwards finds the copy done. For a step's inputs, which
  // so come while the step before runs.
  virtual void upload_ahead(const void* host, void* device, size_t bytes) {
    upload(host, device, bytes);
  }
  virtual void synchronize() = 0;
  // wait(mark()) returns when all that was asked for before mark() is done. At most 8 marks back.
  virtual uint64_t mark() = 0;
  virtual void wait(uint64_t mark) = 0;
  // Runs the step's operators. A key with rows names launches that may be captured the first time
  // and replayed from then on: with this key they always have the same addresses and sizes. Keys of
  // so many rows begin with one that launches all kernels that any of them launches.
  virtual void run_step(GraphKey key, const std::function<void()>& step) = 0;
  // False: the device is lost, nothing will work any more.
  virtual bool healthy() const = 0;

  // -- Weights --------------------------------------------------------------------------------
  // Throws std::invalid_argument naming what of a model's types and sizes cannot be run, and what
  // could. rotary_dims: of its rotary tables. kv: the cache's view without memory.
  virtual void check_model(DType weights, int32_t num_heads,
                           const std::vector<int32_t>& rotary_dims, const KvView& kv) const = 0;
  // Bytes that a weight takes in the backend's layout (without bias); a multiple of 64.
  virtual size_t weight_bytes(const WeightSpec& spec) const = 0;
  // Stores rows [first_row, first_row + src.rows()) from host memory, converting the element type.
  // src: [rows, in_features] f32, bf16 or f16, row stride free. w.data must be zero-filled at
  // first. On CUDA from any number of threads at once.
  virtual void load_rows(const LinearWeight& w, int64_t first_row, Tensor src) = 0;
  // After all are loaded and before the first step: time to choose a plan for each weight and
  // number of rows up to max_rows. The last is lm_head, used for few rows and fp32 outputs.
  virtual void prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows) = 0;

  // -- Operators ------------------------------------------------------------------------------
  // out[T, hidden] = w[token_ids] * scale (+ positions table)
  virtual void embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a,
                     Tensor out) = 0;
  // out[T, n] = norm(x[T, n])
  virtual void norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) = 0;
  // residual[T, n] += x[T, n]; out = norm(residual)
  virtual void add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                        Tensor out) = 0;
  // Whether linear() takes the norm, the gate and the rotation of `a` for so many rows of w, which
  // may be known only after prepare().
  virtual bool fuses(const LinearWeight& /*w*/, const LinearArgs& /*a*/, int64_t /*rows*/) const {
    return false;
  }
  // Whether attention() takes a.rope in this step.
  virtual bool fuses(const StepInputs& /*in*/, const AttnArgs& /*a*/, const KvView& /*kv*/) const {
    return false;
  }
  // out[M, out_features] (fp32 or activation dtype) = x[M, in_features] W^T + bias
  virtual void linear(Tensor x, const LinearWeight& w, const LinearArgs& a, Tensor out) = 0;
  // qkv[T, (heads + 2 kv_heads) * head_dim]: q and k are normalised and rotated, q in place; k and
  // v are rounded to the cache's type and written to slot_mapping.
  virtual void rope_kv_write(Tensor qkv, const StepInputs& in, const RopeArgs& a,
                             const KvView& kv) = 0;
  // q: the first heads * head_dim columns of qkv; out[T, heads * head_dim]; causal.
  virtual void attention(Tensor qkv, const StepInputs& in, const AttnArgs& a, const KvView& kv,
                         Tensor out) = 0;
  // gated: out[T, n] = act(x[:, :n]) * x[:, n:] for x[T, 2n]; else out[T, n] = act(x[T, n])
  virtual void activation(Tensor x, Activation act, bool gated, Tensor out) = 0;
  // out[i] = x[rows[i]] for `count` rows
  virtual void gather_rows(Tensor x, const int32_t* rows, int64_t count, Tensor out) = 0;
  // Block copies of copy-on-write, one layer.
  virtual void copy_blocks(const StepInputs& in, const KvView& kv) = 0;
  // logits[n, vocab] fp32 are the logits of sampling rows [first, first + n); they may be
  // overwritten. Writes rows [first, first + n) of `out`, and of in.host_ids.
  virtual void sample(Tensor logits, const StepInputs& in, int32_t first,
                      const SampleOutputs& out) = 0;
};

}  // namespace ni
