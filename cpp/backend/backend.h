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

#include <functional>
#include <memory>
#include <string>

#include "backend/op_args.h"
#include "core/step_inputs.h"
#include "core/tensor.h"

namespace ni {

struct BackendInfo {
  std::string device;  // "cpu"
  std::string name;    // "avx512_bf16, 2 threads"
  DType activation_dtype = DType::f32;
  size_t memory_total = 0;  // bytes
};

struct BackendOptions {
  int num_threads = 0;  // CPU: 0 = one per available core
  std::string isa;      // CPU: "" = best; portable, avx2, avx512, avx512_bf16, reference
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
  virtual void upload(const void* host, void* device, size_t bytes) = 0;
  virtual void download(const void* device, void* host, size_t bytes) = 0;
  virtual void synchronize() = 0;
  // Runs the step's operators. `key` > 0 names a padded decode batch whose launches may be captured
  // once and replayed; 0: run as it is.
  virtual void run_step(int key, const std::function<void()>& step) = 0;

  // -- Weights --------------------------------------------------------------------------------
  // Bytes that a weight takes in the backend's layout (without bias); a multiple of 64.
  virtual size_t weight_bytes(const WeightSpec& spec) const = 0;
  // Stores rows [first_row, first_row + src.rows()) from host memory, converting the element type.
  // src: [rows, in_features] f32, bf16 or f16, row stride free. w.data must be zero-filled at
  // first.
  virtual void load_rows(const LinearWeight& w, int64_t first_row, Tensor src) = 0;

  // -- Operators ------------------------------------------------------------------------------
  // out[T, hidden] = w[token_ids] * scale (+ positions table)
  virtual void embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a,
                     Tensor out) = 0;
  // out[T, n] = norm(x[T, n])
  virtual void norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) = 0;
  // residual[T, n] += x[T, n]; out = norm(residual)
  virtual void add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                        Tensor out) = 0;
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
  // overwritten. Writes rows [first, first + n) of `out`.
  virtual void sample(Tensor logits, const StepInputs& in, int32_t first,
                      const SampleOutputs& out) = 0;
};

}  // namespace ni
