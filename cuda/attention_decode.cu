// Attention of few query rows (at most kDecodeRows a sequence) over the paged cache, in the
// arithmetic of attention.cuh (flash decoding: Dao et al., 2023), cut along the cache:
//   out[t, h] = softmax(q[t, h] K^T scale) V    over the tokens that row t sees
// Layouts: q, out [T, heads * d]; K, V [block][kv head][slot][d]. Here: checks and the choice of
// the kernel. attention_decode.cuh has what a unit of work is.
#include "cuda/attention_decode.cuh"

namespace ni::cuda {
namespace {

// Where the counters end does not depend on the model, so that a workspace may serve several: what
// is zero for one is for all.
int64_t counter_bytes(int64_t max_seqs) {
  return max_seqs * kMaxAttentionHeads * static_cast<int64_t>(sizeof(DecodeCounter));
}

DecodeParams decode_params(const AttnParams& p, int32_t max_query_len, int64_t max_seqs,
                           void* workspace) {
  check_attention(p, "attention_decode");
  check_arg(max_query_len > 0 && max_query_len <= kDecodeRows, "attention_decode: ", max_query_len,
            " query rows of a sequence; at most ", kDecodeRows);
  check_arg(p.args.num_heads <= kMaxAttentionHeads, "attention_decode: num_heads ",
            p.args.num_heads, " is above ", kMaxAttentionHeads);
  const int group = p.args.num_heads / p.kv.num_kv_heads;
  const int row_tiles = (max_query_len * group + kMmaRows - 1) / kMmaRows;
  return {p,
          score_scale(p.args, p.kv.k_scale),
          group,
          max_query_len,
          row_tiles,
          Divisor(p.kv.num_kv_heads * row_tiles),
          Divisor(p.kv.block_size),
          decode_partial_rows(max_query_len, p.args.num_heads),
          0,
          static_cast<DecodeCounter*>(workspace),
          reinterpret_cast<float*>(static_cast<char*>(workspace) + counter_bytes(max_seqs))};
}

}  // namespace

// A unit has q of all heads of a group, k, v and the angles of one token in its 16 rows, copied in
// multiples of 16 bytes.
bool fuses_rope(const AttnArgs& a, const RopeArgs& rope, const KvView& kv, int32_t max_query_len,
                const Card& card) {
  return card.arch == 90 && max_query_len == 1 && a.num_heads / kv.num_kv_heads + 4 <= kMmaRows &&
         rope.rotary_dim % 8 == 0 && rope.rotary_dim <= kv.head_dim &&
         is_vector_aligned(rope.cos, 8) && is_vector_aligned(rope.sin, 8) &&
         int64_t{kv.num_blocks} * kv.block_size < int64_t{1} << 31;
}

size_t decode_workspace_bytes(int64_t max_items, int64_t max_seqs, int32_t num_heads,
                              int32_t head_dim) {
  const int64_t partials = max_items * decode_item_bytes(num_heads, head_dim);
  return static_cast<size_t>(counter_bytes(max_seqs) + partials);
}

void attention_decode(const AttnParams& p, int32_t max_query_len, int64_t max_seqs, void* workspace,
                      const Card& card, cudaStream_t stream) {
  if (max_query_len == 0) return;
  const DecodeParams params = decode_params(p, max_query_len, max_seqs, workspace);
  if (!decode_sm90(params, card, stream)) decode_sm80(params, card, stream);
}

void attention_decode_sm80(const AttnParams& p, int32_t max_query_len, int64_t max_seqs,
                           void* workspace, const Card& card, cudaStream_t stream) {
  if (max_query_len == 0) return;
  decode_sm80(decode_params(p, max_query_len, max_seqs, workspace), card, stream);
}

}  // namespace ni::cuda
