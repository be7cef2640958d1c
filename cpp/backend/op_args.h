// Plain structs that the operators of a backend take beside their tensors.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace ni {

struct StepInputs;

// How one weight matrix [out_features, in_features] is to be stored.
struct WeightSpec {
  int64_t out_features = 0;
  int64_t in_features = 0;
  DType dtype = DType::f32;
  bool has_bias = false;
};

// A weight matrix as the backend keeps it (its own layout: only the backend reads `data`).
// y = x W^T + bias. Embedding tables are the same type, so that a tied one is stored once.
// Room for quantization: a format, scales, zeros and a group size join these fields.
struct LinearWeight {
  WeightSpec spec;
  void* data = nullptr;   // weight_bytes(spec) bytes
  float* bias = nullptr;  // [out_features] or null; fp32 on every backend
};

// Weight and, for LayerNorm, bias of a normalisation; fp32 on every backend.
struct NormWeight {
  float* weight = nullptr;  // [n]
  float* bias = nullptr;    // [n] or null
};

enum class NormKind : uint8_t { rms, layer };

struct NormArgs {
  NormKind kind = NormKind::rms;
  float eps = 1e-6f;
};

enum class Activation : uint8_t { silu, gelu_tanh, gelu, relu };

// A cache layer. Block b of head h holds block_size slots; K is kept in tiles of `tile` slots,
// transposed, so that one vector load fetches the same dimension of `tile` neighbouring tokens:
//   K[b][h][slot / tile][d][slot % tile]      V[b][h][slot][d]
// With a tile of 1 (BackendInfo::k_tile) K is plain rows like V.
// `k_offset` and `v_offset` are the only address computation there is.
struct KvView {
  void* k = nullptr;
  void* v = nullptr;
  DType dtype = DType::f32;
  int32_t num_blocks = 0;
  int32_t block_size = 16;  // a multiple of 16, or a power of two below
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int64_t block_stride = 0;  // elements from a block to the next; 0: they follow one another
  int32_t k_tile = 16;
  float k_scale = 1.0f, v_scale = 1.0f;  // fp8 caches: what is stored times this is meant

  NI_HD int32_t tile() const { return block_size < k_tile ? block_size : k_tile; }
  NI_HD int64_t head_elements() const { return static_cast<int64_t>(block_size) * head_dim; }
  NI_HD int64_t block_elements() const { return head_elements() * num_kv_heads; }
  NI_HD int64_t head_offset(int64_t block, int32_t head) const {
    const int64_t stride = block_stride > 0 ? block_stride : block_elements();
    return block * stride + head * head_elements();
  }
  NI_HD int64_t k_offset(int64_t block, int32_t head, int32_t slot, int32_t d) const {
    return head_offset(block, head) + (slot / tile()) * tile() * static_cast<int64_t>(head_dim) +
           d * static_cast<int64_t>(tile()) + slot % tile();
  }
  NI_HD int64_t v_offset(int64_t block, int32_t head, int32_t slot, int32_t d) const {
    return head_offset(block, head) + slot * static_cast<int64_t>(head_dim) + d;
  }
  // Bytes of K plus V of one block of one layer.
  int64_t block_bytes() const {
    return 2 * block_elements() * static_cast<int64_t>(dtype_size(dtype));
  }
};

// cos/sin of every position; the rotation pairs dimension i with i + rotary_dim / 2 (Hugging Face's
// order).
struct RopeArgs {
  const float* cos = nullptr;  // [max_positions, rotary_dim / 2]; null: no rotation
  const float* sin = nullptr;
  int32_t rotary_dim = 0;
  NormWeight q_norm, k_norm;  // per-head RMSNorm before the rotation (Qwen3); weight null: none
  float norm_eps = 1e-6f;
};

// What a rope_kv_write() is given beside qkv.
struct RopeKvWrite {
  const StepInputs* in = nullptr;
  RopeArgs rope;
  KvView kv;
};

// What stands before and after a product. norm, gated and rope: only where Backend::fuses() says
// so; then the result is that of operators of their own, to the bit.
struct LinearArgs {
  bool accumulate = false;           // out = out + (x W^T + bias), the product rounded before
  const NormWeight* norm = nullptr;  // x is normalised first
  NormArgs norm_args = {};
  bool gated = false;  // out[T, n / 2] = act(y[:, :n / 2]) * y[:, n / 2:] of y = x W^T + bias
  Activation act = Activation::silu;
  // Not null: out is qkv, and this follows; k and v of `out` are then nobody's.
  const RopeKvWrite* rope = nullptr;
  // Not null: out (fp32) are logits, of sampling rows from first_sampled on. If the next one to use
  // them is sample(), nobody has changed them until then: a backend may sum up for it what it
  // writes. Of plain rows (StepInputs::plain_sampling) sample() is the only one to use them: a
  // backend need not write them at all.
  const StepInputs* sampled = nullptr;
  int32_t first_sampled = 0;
  // Rows behind those of x and out that may be read and written: their values are nobody's.
  int64_t spare_rows = 0;
};

struct EmbedArgs {
  float scale = 1.0f;
  const LinearWeight* positions = nullptr;  // learned positions (GPT-2), added after scaling
};

struct AttnArgs {
  int32_t num_heads = 0;
  float scale = 1.0f;
  int32_t window = 0;    // > 0: a query at p sees positions p - window + 1 .. p
  float softcap = 0.0f;  // > 0: a score s becomes softcap * tanh(s / softcap) (Gemma 2)
  // Not null: rope_kv_write() first, as part of attention (where Backend::fuses() says so).
  const RopeArgs* rope = nullptr;
};

// Where a sampler writes; rows as in StepInputs::sampling.
struct SampleOutputs {
  int32_t* token_ids = nullptr;   // [L]
  float* logprobs = nullptr;      // [L] log-probability of the token, before any processing
  int32_t* ranks = nullptr;       // [L] 1 = most likely, before any processing
  int32_t* top_ids = nullptr;     // [L, max_logprobs] most likely first; ties: lower id first
  float* top_logprobs = nullptr;  // [L, max_logprobs]
  int32_t max_logprobs = 0;
};

}  // namespace ni
