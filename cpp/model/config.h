// What the decoder needs to know of a model. A family is a set of values here, never a subclass.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/op_args.h"

namespace ni {

// A rotary table: angle(position, i) = position * inv_freq[i]. All scaling rules (linear, dynamic,
// llama3, yarn) are already in these numbers.
struct RopeConfig {
  std::vector<float> inv_freq;    // [rotary_dim / 2]
  float attention_factor = 1.0f;  // multiplies cos and sin (yarn)
};

struct LayerConfig {
  int window = 0;  // sliding window in tokens; 0: none
  int rope = 0;    // index into ropes; -1: no rotation
};

struct ModelConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int max_position_embeddings = 0;
  NormKind norm = NormKind::rms;
  float norm_eps = 1e-6f;
  Activation act = Activation::silu;
  bool gated_mlp = true;
  bool qk_norm = false;  // RMSNorm of each q and k head before the rotation
  bool learned_positions =
      false;                    // a table of max_position_embeddings rows is added to the embedding
  bool tie_embeddings = false;  // lm_head is the embedding table
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  float attn_scale = 0.0f;  // 0: 1 / sqrt(head_dim)
  std::vector<RopeConfig> ropes;
  std::vector<LayerConfig> layers;

  int q_size() const { return num_heads * head_dim; }
  int kv_size() const { return num_kv_heads * head_dim; }
  int qkv_size() const { return q_size() + 2 * kv_size(); }
  // Throws std::invalid_argument naming the field that is impossible.
  void validate() const;
};

}  // namespace ni
