#include "model/weights.h"

#include <cstring>

#include "core/check.h"

namespace ni {
namespace {

constexpr size_t kAlign = 64;

size_t aligned(size_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

// Memory-mapped files give no alignment.
template <typename T>
T element(const Tensor& t, int64_t index) {
  T v;
  std::memcpy(&v, t.as<char>() + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return v;
}

std::string shape_string(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

}  // namespace

Weights::Weights(const ModelConfig& config, DType dtype)
    : layers(config.layers.size()), config_(config), dtype_(dtype) {
  config.validate();
  const ModelConfig& c = config_;
  const bool norm_bias = c.norm == NormKind::layer;
  const int64_t hidden = c.hidden_size;

  add_matrix(embed, {{"embed", c.vocab_size}}, hidden, false);
  if (c.learned_positions)
    add_matrix(positions, {{"pos_embed", c.max_position_embeddings}}, hidden, false);
  for (size_t i = 0; i < layers.size(); ++i) {
    LayerWeights& w = layers[i];
    const std::string p = concat("layers.", i, ".");
    add_norm(p + "attn_norm", w.attn_norm, hidden, norm_bias);
    add_matrix(w.qkv, {{p + "q", c.q_size()}, {p + "k", c.kv_size()}, {p + "v", c.kv_size()}},
               hidden, c.qkv_bias);
    if (c.qk_norm) {
      add_norm(p + "q_norm", w.q_norm, c.head_dim, false);
      add_norm(p + "k_norm", w.k_norm, c.head_dim, false);
    }
    add_matrix(w.o, {{p + "o", hidden}}, c.q_size(), c.o_bias);
    add_norm(p + "mlp_norm", w.mlp_norm, hidden, norm_bias);
    std::vector<std::pair<std::string, int64_t>> parts;
    if (c.gated_mlp) parts.emplace_back(p + "gate", c.intermediate_size);
    parts.emplace_back(p + "up", c.intermediate_size);
    add_matrix(w.gate_up, parts, hidden, c.mlp_bias);
    add_matrix(w.down, {{p + "down", hidden}}, c.intermediate_size, c.mlp_bias);
  }
  add_norm("final_norm", final_norm, hidden, norm_bias);
  if (!c.tie_embeddings) add_matrix(lm_head, {{"lm_head", c.vocab_size}}, hidden, false);

  for (size_t i = 0; i < slots_.size(); ++i) slot_index_[slots_[i].name] = i;
}

void Weights::add_matrix(LinearWeight& w, const std::vector<std::pair<std::string, int64_t>>& parts,
                         int64_t in_features, bool bias) {
  w.spec.in_features = in_features;
  w.spec.dtype = dtype_;
  w.spec.has_bias = bias;
  matrices_.push_back(&w);
  for (const auto& [name, rows] : parts) {
    slots_.push_back(
        {name + ".weight", {rows, in_features}, &w, nullptr, w.spec.out_features, false});
    if (bias)
      slots_.push_back({name + ".bias", {rows}, nullptr, &w.bias, w.spec.out_features, false});
    w.spec.out_features += rows;
  }
  if (bias) vectors_.emplace_back(&w.bias, w.spec.out_features);
}

void Weights::add_vector(const std::string& name, float*& target, int64_t size) {
  slots_.push_back({name, {size}, nullptr, &target, 0, false});
  vectors_.emplace_back(&target, size);
}

void Weights::add_norm(const std::string& name, NormWeight& norm, int64_t size, bool bias) {
  add_vector(name + ".weight", norm.weight, size);
  if (bias) add_vector(name + ".bias", norm.bias, size);
}

std::vector<std::pair<std::string, std::vector<int64_t>>> Weights::slots() const {
  std::vector<std::pair<std::string, std::vector<int64_t>>> out;
  for (const Slot& slot : slots_) out.emplace_back(slot.name, slot.shape);
  return out;
}

size_t Weights::bytes(const Backend& backend) const {
  size_t total = 0;
  for (const LinearWeight* w : matrices_) total += aligned(backend.weight_bytes(w->spec));
  for (const auto& [target, size] : vectors_)
    total += aligned(static_cast<size_t>(size) * sizeof(float));
  return total;
}

void Weights::allocate(Backend& backend) {
  buffer_ = backend.alloc(bytes(backend));
  char* next = buffer_.data();
  for (LinearWeight* w : matrices_) {
    w->data = next;
    next += aligned(backend.weight_bytes(w->spec));
  }
  for (const auto& [target, size] : vectors_) {
    *target = reinterpret_cast<float*>(next);
    next += aligned(static_cast<size_t>(size) * sizeof(float));
  }
  if (config_.tie_embeddings) lm_head = embed;
}

void Weights::load(Backend& backend, const std::string& name, const Tensor& data) {
  const auto it = slot_index_.find(name);
  check_arg(it != slot_index_.end(), "unknown weight slot '", name, "'");
  check_invariant(buffer_.data() != nullptr, "weights are loaded after allocate()");
  Slot& slot = slots_[it->second];
  const std::vector<int64_t> shape(data.shape.begin(), data.shape.begin() + data.rank);
  check_arg(shape == slot.shape, "weight slot '", name, "' has shape ", shape_string(slot.shape),
            ", got ", shape_string(shape));
  if (slot.matrix != nullptr) {
    backend.load_rows(*slot.matrix, slot.first_row, data);
  } else {
    std::vector<float> values(static_cast<size_t>(slot.shape[0]));
    for (size_t i = 0; i < values.size(); ++i) {
      const auto at = static_cast<int64_t>(i) * data.row_stride;
      values[i] = data.dtype == DType::bf16  ? to_float(element<bf16>(data, at))
                  : data.dtype == DType::f16 ? to_float(element<f16>(data, at))
                                             : element<float>(data, at);
    }
    backend.upload(values.data(), *slot.vector + slot.first_row, values.size() * sizeof(float));
  }
  slot.loaded = true;
}

std::vector<const LinearWeight*> Weights::products() const {
  std::vector<const LinearWeight*> out;
  for (const LayerWeights& w : layers)
    for (const LinearWeight* matrix : {&w.qkv, &w.o, &w.gate_up, &w.down}) out.push_back(matrix);
  out.push_back(&lm_head);
  return out;
}

void Weights::check_complete() const {
  std::string missing;
  int count = 0;
  for (const Slot& slot : slots_) {
    if (slot.loaded) continue;
    if (++count <= 10) missing += (count > 1 ? ", " : "") + slot.name;
  }
  check_arg(count == 0, count, " weight slots were not loaded: ", missing, count > 10 ? ", …" : "");
}

}  // namespace ni
