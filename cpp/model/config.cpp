#include "model/config.h"

#include <cmath>

#include "core/check.h"

namespace ni {

void ModelConfig::validate() const {
  const auto positive = [](const char* name, int value) {
    check_arg(value > 0, "model config: ", name, " must be positive, got ", value);
  };
  positive("vocab_size", vocab_size);
  positive("hidden_size", hidden_size);
  positive("intermediate_size", intermediate_size);
  positive("num_heads", num_heads);
  positive("num_kv_heads", num_kv_heads);
  positive("head_dim", head_dim);
  positive("max_position_embeddings", max_position_embeddings);
  positive("number of layers", static_cast<int>(layers.size()));
  check_arg(num_heads % num_kv_heads == 0, "model config: num_heads (", num_heads,
            ") must be a multiple of num_kv_heads (", num_kv_heads, ")");
  check_arg(head_dim % 2 == 0, "model config: head_dim must be even, got ", head_dim);
  const int64_t qkv = static_cast<int64_t>(head_dim) * (num_heads + 2 * int64_t{num_kv_heads});
  constexpr int64_t kMost = 1 << 28;  // keeps every product of sizes within its type
  check_arg(
      qkv <= kMost && intermediate_size <= kMost && hidden_size <= kMost && vocab_size <= kMost,
      "model config: a size is over ", kMost);
  check_arg(std::isfinite(attn_scale), "model config: attn_scale must be finite");
  check_arg(norm_eps >= 0.0f, "model config: norm_eps must not be negative, got ", norm_eps);
  for (const RopeConfig& rope : ropes) {
    const auto rotary_dim = static_cast<int>(2 * rope.inv_freq.size());
    check_arg(rotary_dim > 0 && rotary_dim <= head_dim, "model config: a rope rotates ", rotary_dim,
              " dimensions, but head_dim is ", head_dim);
  }
  for (const LayerConfig& layer : layers) {
    check_arg(layer.window >= 0, "model config: window must not be negative, got ", layer.window);
    check_arg(layer.rope >= -1 && layer.rope < static_cast<int>(ropes.size()),
              "model config: a layer names rope ", layer.rope, " of ", ropes.size());
  }
}

}  // namespace ni
