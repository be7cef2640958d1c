// Launchers of all kernels: raw pointers and a stream, no framework's types. Each is defined in the
// file named above it; what it computes is told in backend/backend.h, how, at the top of that file.
//
// A kernel's launch depends only on sizes that are fixed for a GraphKey; counts, lists and strides
// that change from step to step are read from `step`, the StepInputs in device memory.
//
// `dtype` is that of activations: bf16 or f16. Rows are `…_stride` elements apart.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/op_args.h"
#include "core/philox.h"
#include "core/step_inputs.h"
#include "cuda/attention_plan.h"

namespace ni::cuda {

// What kernels need to know of the card to choose a launch.
struct Card {
  int arch = 0;  // 80, 89, 90, …
  int num_sms = 0;
  int max_smem = 0;     // bytes of shared memory that a block may have (opt-in)
  int smem_per_sm = 0;  // bytes of shared memory of a multiprocessor
};

// -- embed_act.cu ---------------------------------------------------------------------------------
// table: [vocab, table_stride]; positions_table: null or [positions, table_stride].
void embed(const int32_t* token_ids, const int32_t* sampled_ids, const int32_t* positions,
           int64_t rows, const void* table, const void* positions_table, int64_t table_stride,
           int64_t n, float scale, DType dtype, void* out, int64_t out_stride, cudaStream_t stream);
void activation(const void* x, int64_t x_stride, int64_t rows, int64_t n, Activation act,
                bool gated, DType dtype, void* out, int64_t out_stride, cudaStream_t stream);
void gather_rows(const void* x, int64_t x_stride, const int32_t* rows, int64_t count, int64_t n,
                 DType dtype, void* out, int64_t out_stride, cudaStream_t stream);
void copy_blocks(const BlockCopy* copies, int32_t num_copies, const KvView& kv,
                 cudaStream_t stream);
// dst[rows, dst_stride] (bf16, f16 or f32) = src[rows, cols] of another or the same type.
void convert_rows(const void* src, DType src_dtype, int64_t src_stride, int64_t rows, int64_t cols,
                  void* dst, DType dst_dtype, int64_t dst_stride, cudaStream_t stream);

// -- norm.cu --------------------------------------------------------------------------------------
// residual: null, or [rows, n]: x is added to it (and rounded) and the sum normalised.
// settled (common.cuh): of w.
void norm(const void* x, int64_t x_stride, void* residual, int64_t residual_stride, int64_t rows,
          int64_t n, const NormWeight& w, const NormArgs& a, DType dtype, void* out,
          int64_t out_stride, bool settled, cudaStream_t stream);

// -- rope_kv.cu -----------------------------------------------------------------------------------
// settled (common.cuh): of positions and slot_mapping.
void rope_kv_write(void* qkv, int64_t qkv_stride, int64_t rows, int32_t num_heads,
                   const int32_t* positions, const int64_t* slot_mapping, const RopeArgs& a,
                   const KvView& kv, DType dtype, bool settled, cudaStream_t stream);

// -- attention_decode.cu, attention_prefill.cu, attention_prefill_sm90.cu -------------------------
inline constexpr int kMaxAttentionHeads = 256;  // attention_decode counts so many a sequence

struct AttnParams {
  const void* q = nullptr;  // columns [0, num_heads * head_dim) of rows q_stride apart
  int64_t q_stride = 0;
  void* out = nullptr;  // [T, num_heads * head_dim]
  int64_t out_stride = 0;
  DType dtype = DType::bf16;  // of q and out
  KvView kv;
  AttnArgs args;
  const StepInputs* step = nullptr;  // in device memory
  // (common.cuh): of `step`, and of K and V of tokens before the queries.
  bool settled = false;
  // Where fuses_rope() says so: q, k and v in `q`, [T, (num_heads + 2 kv_heads) * head_dim], are
  // still to be normalised, rotated and written (rope_kv.cu). Then settled: no kernel since one
  // that waited before it let the next one start may write this cache.
  bool with_rope = false;
  RopeArgs rope;
};
// Whether attention_decode() takes with_rope, for queries of so many rows.
bool fuses_rope(const AttnArgs& a, const RopeArgs& rope, const KvView& kv, int32_t max_query_len,
                const Card& card);

// How attention_decode() and attention_prefill() want their work cut.
inline AttnTiling attention_tiling(const Card& card) {
  AttnTiling tiling{kKvChunk, kPrefillRows, kDecodeRows, 2048};
  if (card.arch == 90) {
    tiling.decode_ranges = kDecodeCtasPerSm * card.num_sms;
    tiling.item_cost = kTile;
  }
  return tiling;
}
// Sequences cut along the cache: step->decode_items. max_query_len: the longest query among them.
// workspace: decode_workspace_bytes(), zero at first and left so where it must be. max_items: of
// kDecodeRows query rows each; of shorter queries as many times more fit.
size_t decode_workspace_bytes(int64_t max_items, int64_t max_seqs, int32_t num_heads,
                              int32_t head_dim);
void attention_decode(const AttnParams& p, int32_t max_query_len, int64_t max_seqs, void* workspace,
                      const Card& card, cudaStream_t stream);
// Sequences cut along their query rows: step->prefill_items, `num_items` of them.
void attention_prefill(const AttnParams& p, int32_t num_items, const Card& card,
                       cudaStream_t stream);

// -- sampling.cu ----------------------------------------------------------------------------------
// Of 16 neighbouring logits, a unit: the largest, the sum of exp((z - max) / temperature), and
// which of them is drawn if the unit is (core/philox.h); of a greedy row, or where the largest is
// infinite, the first of the largest, and no sum.
struct alignas(8) LogitUnit {
  float max;
  uint32_t bits;  // the sum in 1 / 2^24 (it is in [1, 16], or 0), and 4 bits of the choice

  NI_HD float mass() const { return static_cast<float>(bits >> 4) * 0x1.0p-24f; }
  NI_HD int32_t choice() const { return static_cast<int32_t>(bits & 15); }
};
// Of a row; even, so that pairs are aligned.
NI_HD inline int64_t logit_units(int64_t vocab) {
  return (vocab + 31) / 32 * 2;
}
// Where a product leaves those of its result, for sample(). What the step says of its rows must not
// be written by a kernel that may still run (common.cuh).
struct LogitUnits {
  LogitUnit* units = nullptr;        // [rows, logit_units(vocab)]; null: not wanted
  const StepInputs* step = nullptr;  // in device memory
  int32_t first = 0;                 // sampling row of the first
  bool only = false;                 // nobody reads the result itself: it need not be written
};
inline LogitUnit* sample_units(void* workspace) {
  return static_cast<LogitUnit*>(workspace);
}

// logits: [rows, vocab] fp32, sampling rows [first, first + rows) of step. has_units: they are in
// sample_units(). plain: all rows are (StepInputs::plain_sampling); then, too, no kernel that may
// still run has written the step's inputs.
size_t sample_workspace_bytes(int64_t rows, int64_t vocab);
void sample(const float* logits, int64_t logits_stride, int64_t rows, int64_t vocab,
            const StepInputs* step, int32_t first, bool has_units, bool plain,
            const SampleOutputs& out, void* workspace, cudaStream_t stream);
// Units of rows without biases, masks and penalties.
void sum_up_logits(const float* logits, int64_t logits_stride, int64_t rows, int64_t vocab,
                   const LogitUnits& units, cudaStream_t stream);

}  // namespace ni::cuda
