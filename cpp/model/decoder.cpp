#include "model/decoder.h"

#include <algorithm>
#include <cmath>

namespace ni {
namespace {

constexpr int64_t kRowAlign = 128;  // bytes

}  // namespace

Activations::Activations(const ModelConfig& config, DType dtype, int max_tokens, int max_logits) {
  const int64_t t = max_tokens, hidden = config.hidden_size, inner = config.intermediate_size;
  residual = Tensor(nullptr, dtype, {t, hidden});
  normed = Tensor(nullptr, dtype, {t, hidden});
  delta = Tensor(nullptr, dtype, {t, hidden});
  qkv = Tensor(nullptr, dtype, {t, config.qkv_size()});
  attn = Tensor(nullptr, dtype, {t, config.q_size()});
  gate_up = Tensor(nullptr, dtype, {t, config.gated_mlp ? 2 * inner : inner});
  act = Tensor(nullptr, dtype, {t, inner});
  last = Tensor(nullptr, dtype, {max_logits, hidden});
  logits = Tensor(nullptr, DType::f32, {max_logits, config.vocab_size});
  for (Tensor* x : {&residual, &normed, &delta, &qkv, &attn, &gate_up, &act, &last, &logits}) {
    // Until allocate(), `data` holds the offset.
    x->data = reinterpret_cast<void*>(bytes_);
    const int64_t in_a_line = kRowAlign / static_cast<int64_t>(dtype_size(x->dtype));
    x->row_stride = (x->cols() + in_a_line - 1) / in_a_line * in_a_line;
    bytes_ += static_cast<size_t>(x->rows() * x->row_stride) * dtype_size(x->dtype);
  }
}

void Activations::allocate(Backend& backend) {
  buffer_ = backend.alloc(bytes_);
  for (Tensor* x : {&residual, &normed, &delta, &qkv, &attn, &gate_up, &act, &last, &logits})
    x->data = buffer_.data() + reinterpret_cast<size_t>(x->data);
}

Decoder::Decoder(const ModelConfig& config, const Weights& weights, const KvCache& cache,
                 const RopeTables& ropes, Activations& activations, Backend& backend)
    : config_(config),
      weights_(weights),
      cache_(cache),
      ropes_(ropes),
      acts_(activations),
      backend_(backend),
      norm_args_{config.norm, config.norm_eps} {}

void Decoder::forward(const StepInputs& in) {
  const int64_t t = in.num_tokens;
  EmbedArgs embed;
  if (config_.learned_positions) embed.positions = &weights_.positions;
  backend_.embed(in, weights_.embed, embed, acts_.residual.rows(t));
  const bool fused = fuses(t);
  if (!fused)
    backend_.norm(acts_.residual.rows(t), weights_.layers[0].attn_norm, norm_args_,
                  acts_.normed.rows(t));
  for (size_t i = 0; i < weights_.layers.size(); ++i) layer(i, in, fused);
}

LinearArgs Decoder::qkv_args(const LayerWeights& w) const {
  LinearArgs a;
  a.norm = &w.attn_norm;
  a.norm_args = norm_args_;
  return a;
}

LinearArgs Decoder::gate_up_args(const LayerWeights& w) const {
  LinearArgs a;
  a.norm = &w.mlp_norm;
  a.norm_args = norm_args_;
  a.gated = true;
  a.act = config_.act;
  return a;
}

bool Decoder::fuses(int64_t rows) const {
  return config_.gated_mlp &&
         std::all_of(weights_.layers.begin(), weights_.layers.end(), [&](const LayerWeights& w) {
           return backend_.fuses(w.qkv, qkv_args(w), rows) &&
                  backend_.fuses(w.gate_up, gate_up_args(w), rows);
         });
}

// Pre-norm block. Many rows: `normed` holds the normalised residual on entry and, for the next
// block, on exit; the add and the norm that follows it are one operator. Few rows (fused): norm,
// gate and add are parts of the products, and only the residual goes from block to block. Between
// them, the gate alone may be.
void Decoder::layer(size_t index, const StepInputs& in, bool fused) {
  const int64_t t = in.num_tokens;
  const LayerWeights& w = weights_.layers[index];
  const Tensor residual = acts_.residual.rows(t), normed = acts_.normed.rows(t);
  const Tensor delta = acts_.delta.rows(t), attn = acts_.attn.rows(t);
  const Tensor gate_up = acts_.gate_up.rows(t), act = acts_.act.rows(t);
  LinearArgs add;
  add.accumulate = true;

  if (fused) {
    attention(index, in, residual, qkv_args(w));
    backend_.linear(attn, w.o, add, residual);
    backend_.linear(residual, w.gate_up, gate_up_args(w), act);
    backend_.linear(act, w.down, add, residual);
    return;
  }
  LinearArgs plain;
  plain.spare_rows = acts_.residual.rows() - t;
  attention(index, in, normed, plain);
  backend_.linear(attn, w.o, plain, delta);
  backend_.add_norm(delta, residual, w.mlp_norm, norm_args_, normed);

  LinearArgs gated;
  gated.gated = true;
  gated.act = config_.act;
  if (config_.gated_mlp && backend_.fuses(w.gate_up, gated, t)) {
    backend_.linear(normed, w.gate_up, gated, act);
  } else {
    backend_.linear(normed, w.gate_up, plain, gate_up);
    backend_.activation(gate_up, config_.act, config_.gated_mlp, act);
  }
  backend_.linear(act, w.down, plain, delta);
  const bool is_last = index + 1 == weights_.layers.size();
  const NormWeight& next = is_last ? weights_.final_norm : weights_.layers[index + 1].attn_norm;
  backend_.add_norm(delta, residual, next, norm_args_, normed);
}

RopeKvWrite Decoder::rope_kv_write(size_t index, const StepInputs& in) const {
  RopeKvWrite a{&in, ropes_.args(config_.layers[index].rope), cache_.layer(index)};
  a.rope.q_norm = weights_.layers[index].q_norm;
  a.rope.k_norm = weights_.layers[index].k_norm;
  a.rope.norm_eps = config_.norm_eps;
  return a;
}

AttnArgs Decoder::attention_args(size_t index) const {
  AttnArgs a;
  a.num_heads = config_.num_heads;
  a.scale = config_.attn_scale != 0.0f ? config_.attn_scale
                                       : 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  a.window = config_.layers[index].window;
  return a;
}

// attn = attention of the product with qkv, whose K and V go into the cache.
void Decoder::attention(size_t index, const StepInputs& in, const Tensor& x, LinearArgs product) {
  const LinearWeight& w = weights_.layers[index].qkv;
  const Tensor qkv = acts_.qkv.rows(in.num_tokens);
  const RopeKvWrite write = rope_kv_write(index, in);
  AttnArgs a = attention_args(index);
  a.rope = &write.rope;
  // The rotation is part of attention, or of the product, or an operator of its own.
  if (!backend_.fuses(in, a, write.kv)) {
    a.rope = nullptr;
    product.rope = &write;
    if (in.num_copies > 0 || !backend_.fuses(w, product, in.num_tokens)) product.rope = nullptr;
  }
  backend_.linear(x, w, product, qkv);
  if (in.num_copies > 0) backend_.copy_blocks(in, write.kv);
  if (a.rope == nullptr && product.rope == nullptr)
    backend_.rope_kv_write(qkv, in, write.rope, write.kv);
  backend_.attention(qkv, in, a, write.kv, acts_.attn.rows(in.num_tokens));
}

Tensor Decoder::logits(const StepInputs& in, int first, int count) {
  LinearArgs product;
  product.sampled = &in;
  product.first_sampled = first;
  if (fuses(in.num_tokens)) {  // the last norm is to be done
    product.norm = &weights_.final_norm;
    product.norm_args = norm_args_;
    if (!backend_.fuses(weights_.lm_head, product, count)) {
      product.norm = nullptr;
      backend_.norm(acts_.residual.rows(in.num_tokens), weights_.final_norm, norm_args_,
                    acts_.normed.rows(in.num_tokens));
    }
  }
  const Tensor& hidden = product.norm != nullptr ? acts_.residual : acts_.normed;
  Tensor last = acts_.last.rows(count);
  if (in.logits_are_rows) {
    last = hidden.rows(first, count);
  } else {
    backend_.gather_rows(hidden, in.logits_rows + first, count, last);
  }
  const Tensor out = acts_.logits.rows(count);
  backend_.linear(last, weights_.lm_head, product, out);
  return out;
}

}  // namespace ni
