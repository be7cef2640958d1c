// The only model code: a decoder-only transformer driven by ModelConfig, written once for all
// backends.
#pragma once

#include "backend/backend.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/rope.h"
#include "model/weights.h"

namespace ni {

// Room for the activations of the largest step; every step uses the first rows of the same memory.
// Rows start at multiples of 128 bytes, as matrix units want them; what lies between them is zero.
struct Activations {
  Tensor residual;  // [max_tokens, hidden]
  Tensor normed;    // [max_tokens, hidden]
  Tensor delta;     // [max_tokens, hidden] what a block adds to the residual stream
  Tensor qkv;       // [max_tokens, (heads + 2 kv_heads) * head_dim]
  Tensor attn;      // [max_tokens, heads * head_dim]
  Tensor gate_up;   // [max_tokens, 2 * intermediate]
  Tensor act;       // [max_tokens, intermediate]
  Tensor last;      // [max_logits, hidden] rows that yield logits
  Tensor logits;    // [max_logits, vocab] fp32

  Activations(const ModelConfig& config, DType dtype, int max_tokens, int max_logits);
  size_t bytes() const { return bytes_; }
  void allocate(Backend& backend);

 private:
  size_t bytes_ = 0;
  Buffer buffer_;
};

class Decoder {
 public:
  Decoder(const ModelConfig& config, const Weights& weights, const KvCache& cache,
          const RopeTables& ropes, Activations& activations, Backend& backend);

  // All layers for the rows of `in`; writes K and V into the cache.
  void forward(const StepInputs& in);
  // Logits of sampling rows [first, first + count) after forward(); count <= max_logits. The last
  // norm is part of the last layer's addition, or, where products take norms, done here.
  Tensor logits(const StepInputs& in, int first, int count);

 private:
  // Whether the backend takes norms and gates as parts of the products, for so many rows.
  bool fuses(int64_t rows) const;
  LinearArgs qkv_args(const LayerWeights& w) const;
  LinearArgs gate_up_args(const LayerWeights& w) const;
  void layer(size_t index, const StepInputs& in, bool fused);
  RopeKvWrite rope_kv_write(size_t index, const StepInputs& in) const;
  AttnArgs attention_args(size_t index) const;
  void attention(size_t index, const StepInputs& in, const Tensor& x, LinearArgs product);

  const ModelConfig& config_;
  const Weights& weights_;
  const KvCache& cache_;
  const RopeTables& ropes_;
  Activations& acts_;
  Backend& backend_;
  NormArgs norm_args_;
};

}  // namespace ni
