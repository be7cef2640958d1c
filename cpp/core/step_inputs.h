// What one step needs, as plain arrays: the scheduler side fills them on the host, kernels read
// them. Everything lives in one block of memory (engine/step_batch.h), so a step is one upload.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ni {

// One row to sample: a query row's logits become one token id (or, with `target >= 0`, the score of
// a given one). Stop rules are not here: they belong to Scheduler::update.
// Order of operations: raw logprobs are taken; then bias -> mask -> penalties -> temperature ->
// top-k -> top-p -> min-p -> draw.
struct SamplingRow {
  float temperature = 1.0f;         // 0: greedy
  float top_p = 1.0f;               // 1: off
  float min_p = 0.0f;               // 0: off
  float repetition_penalty = 1.0f;  // 1: off; over prompt and output tokens
  float presence_penalty = 0.0f;    // over output tokens
  float frequency_penalty = 0.0f;   // over output tokens
  int32_t top_k = 0;                // 0: off
  int32_t num_logprobs = -1;        // -1: none; 0: the chosen token's; n: also the n most likely
  int32_t target = -1;              // >= 0: do not draw, score this token (prompt logprobs)
  uint32_t choice = 0;              // with `seed` and `position`: the key of the random draw
  uint64_t seed = 0;
  int32_t position = 0;                      // position of the token that is drawn
  int32_t counts_begin = 0, counts_end = 0;  // range in StepInputs::token_counts
  int32_t bias_begin = 0, bias_end = 0;      // range in StepInputs::token_biases
  int32_t mask_row = -1;  // row of StepInputs::token_masks; -1: every token allowed
};

// A token that the sequence already holds. Each id once per row.
struct TokenCount {
  int32_t token;
  int32_t output_count;  // times in the output; 0 when only in the prompt
};

// Added to the logit; -infinity bans the token. An id may come twice: both are added.
struct TokenBias {
  int32_t token;
  float bias;
};

// How a backend wants attention cut into the work lists of StepInputs. All 0: no lists.
struct AttnTiling {
  int32_t kv_chunk = 0;     // tokens of a chunk of the cache, at absolute multiples of it
  int32_t q_tile = 0;       // query rows of a tile
  int32_t decode_rows = 0;  // sequences with at most so many query rows are cut along the cache
  // Most chunks that may be listed where one of the sequences that are cut has decode_rows rows;
  // where the longest has fewer, as many times more. Beyond that the shortest sequences are left
  // whole: one item with the index -1.
  int32_t max_items = 0;
  int32_t decode_ranges = 0;  // wanted of decode_cuts; 0: none
  int32_t item_cost = 0;      // of a chunk, beside its tokens, in tokens: for decode_cuts

  int32_t most_items(int32_t max_decode_query_len) const {
    if (decode_rows <= 0) return 0;
    return max_items * decode_rows / std::clamp(max_decode_query_len, 1, decode_rows);
  }
};

// A piece of attention work, for backends that want lists of them (BackendInfo::tiling): chunk
// `index` of the context of a sequence, or tile `index` of its query rows.
struct AttnItem {
  int32_t seq;
  int32_t index;
};

// Where a range of decode work begins that has as much work as any other: tokens of the cache, and
// AttnTiling::item_cost for each chunk.
struct DecodeCut {
  int32_t item;     // the first of a sequence, in decode_items
  int32_t context;  // of that sequence
  uint32_t part;    // of the sequence's work comes before the range, in 2^-32
};

// Copy-on-write: block `dst` becomes a copy of block `src`, in every layer, before the step's
// writes.
struct BlockCopy {
  int32_t src;
  int32_t dst;
};

// T query rows of S sequences, of which L rows yield logits. Decode rows come first.
// Rows of one sequence are consecutive positions. Padding rows have slot_mapping -1 and write
// nothing.
struct StepInputs {
  int32_t num_tokens = 0;  // T
  int32_t num_seqs = 0;    // S
  int32_t num_logits = 0;  // L
  int32_t num_copies = 0;
  int32_t max_query_len = 0;  // longest query of a sequence in this step
  int32_t max_context_len = 0;
  int32_t block_table_stride = 0;
  int32_t max_decode_query_len = 0;  // longest query of a sequence in decode_items
  int32_t max_decode_chunks = 0;     // most chunks of a sequence there
  int32_t num_decode_items = 0;
  int32_t num_whole_items = 0;  // those of them that are a whole sequence, index -1
  int32_t num_prefill_items = 0;
  int32_t num_decode_ranges = 0;
  // Every row is greedy, or drawn from all tokens at a temperature: none has top-k, top-p, min-p,
  // biases, a mask, penalties or logprobs, none is only scored. False also where nobody looked.
  bool plain_sampling = false;
  bool logits_are_rows = false;  // logits_rows is 0, 1, …, L - 1; false also where nobody looked

  // [T]; an id below 0 stands for sampled_ids[-1 - id]: a token of the step before, which the host
  // has not seen yet.
  const int32_t* token_ids = nullptr;
  const int32_t* sampled_ids = nullptr;   // token ids that the step before sampled, or null
  const int32_t* positions = nullptr;     // [T]
  const int64_t* slot_mapping = nullptr;  // [T] block * block_size + offset in the block; -1: none
  const int32_t* cu_seqlens_q = nullptr;  // [S + 1] first query row of each sequence
  const int32_t* context_lens = nullptr;  // [S] tokens in the cache, those of this step included
  const int32_t* block_tables = nullptr;  // [S, block_table_stride]
  const BlockCopy* copies = nullptr;      // [num_copies]
  // Of every sequence of at most tiling.decode_rows query rows: all chunks of its context, one
  // after the other, or one item for the whole. Every tile of query rows of the others, those with
  // the longest contexts first. Null where no tiling was asked for.
  const AttnItem* decode_items = nullptr;   // [num_decode_items]
  const AttnItem* prefill_items = nullptr;  // [num_prefill_items]
  // Ends of ranges that have equal shares of decode_items' work; no ranges where one of the items
  // is a whole sequence, or nobody asked for them.
  const DecodeCut* decode_cuts = nullptr;  // [num_decode_ranges + 1]

  const int32_t* logits_rows =
      nullptr;  // [L] query row; ascending; a row may come several times (n > 1)
  const SamplingRow* sampling = nullptr;  // [L]
  const TokenCount* token_counts = nullptr;
  const TokenBias* token_biases = nullptr;
  const uint32_t* token_masks = nullptr;  // [mask rows, ceil(vocab / 32)], bit set: allowed
  // [L] or null: where the sampler puts the token ids, too, for the host. Memory of alloc_host().
  int32_t* host_ids = nullptr;

  // This struct as it lies in device memory, at an address that does not change: what a captured
  // step must not take from its launch (counts, strides, lists of any length) is read there.
  const StepInputs* device = nullptr;
};

}  // namespace ni
