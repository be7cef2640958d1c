// Turns a StepPlan into StepInputs: one contiguous host block, so that a step is one upload.
//
// The block begins with the StepInputs struct itself, then come the arrays whose lengths follow
// from the numbers of rows (T, S, L), then lists of any length. So in a batch that is padded to B
// rows the addresses of the former depend on B alone, and a captured step finds them where they
// were; what it needs of the latter it reads through the struct (StepInputs::device).
#pragma once

#include <functional>
#include <vector>

#include "core/attn_items.h"
#include "core/step_inputs.h"
#include "core/tensor.h"
#include "engine/scheduler.h"

namespace ni {

// What a logits row is for.
struct LogitsRow {
  int item = 0;           // index in plan.items
  int prompt_index = -1;  // >= 0: scores prompt token `prompt_index`; -1: samples a token
};

class StepBatch {
 public:
  // Memory for the host block, 64-byte aligned.
  using Allocate = std::function<Buffer(size_t bytes)>;
  StepBatch(int block_size, int vocab_size, std::vector<int32_t> eos_token_ids,
            const AttnTiling& tiling, Allocate allocate);

  // Bytes of the largest step's block, but for the lists whose lengths requests choose (token
  // counts, biases, masks) beyond what other arrays leave free. max_blocks: of one sequence.
  static size_t max_bytes(int max_tokens, int max_seqs, int max_blocks, const AttnTiling& tiling);
  // Allocates that much, so that steps do not.
  void reserve(int max_tokens, int max_seqs, int max_blocks);
  // Fills the block from the plan. Reuses its memory; grows it when a step needs more.
  // padded_rows > 0: the plan's items are decodes of one row; harmless rows, sequences and logits
  // rows are appended until there are padded_rows of each.
  void build(const StepPlan& plan, int padded_rows = 0);
  // No row writes to the cache (for steps whose results nobody wants).
  void forbid_writes();

  // Pointers into the host block.
  const StepInputs& inputs() const { return inputs_; }
  // The same for a copy of the block at `base`; also written to the front of the block, so that the
  // copy, if made afterwards, begins with it.
  StepInputs inputs_at(const void* base, const int32_t* sampled_ids, int32_t* host_ids);
  const void* data() const { return block_.data(); }
  size_t bytes() const { return bytes_; }
  size_t capacity() const { return block_.bytes(); }

  // Those of the plan: padding has none.
  const std::vector<LogitsRow>& rows() const { return rows_; }
  // Some row wants log-probabilities; those of the most likely tokens, too.
  bool wants_logprobs() const { return wants_logprobs_; }
  bool wants_top() const { return wants_top_; }
  // Logits row of each of the plan's samples.
  const std::vector<int32_t>& sample_rows() const { return sample_rows_; }

 private:
  void add_item(const StepPlan& plan, int index);
  void add_tokens(const Sequence& seq, int count);
  void add_row(const Sequence& seq, int item, int query_row, int choice, int num_drafts);
  void add_score(const Sequence& seq, int item, int query_row, int prompt_index);
  void add_mask(SamplingRow& row, const SamplingParams& params);
  void add_biases(SamplingRow& row, const Sequence& seq, int num_drafts);
  void add_counts(SamplingRow& row, const Sequence& seq, int num_drafts);
  void add_padding(int rows);
  void pack();

  int block_size_;
  int vocab_size_;
  std::vector<int32_t> eos_token_ids_;
  AttnTiling tiling_;
  Allocate allocate_;

  // Cleared and refilled every step; they keep their capacity.
  std::vector<int32_t> token_ids_, positions_, cu_seqlens_q_, context_lens_, block_tables_;
  std::vector<int64_t> slot_mapping_;
  std::vector<int32_t> logits_rows_, sample_rows_;
  std::vector<SamplingRow> sampling_;
  std::vector<TokenCount> counts_;
  std::vector<TokenBias> biases_;
  std::vector<uint32_t> masks_;
  std::vector<BlockCopy> copies_;
  AttnLists lists_;
  std::vector<LogitsRow> rows_;
  std::vector<int32_t> count_index_;  // [vocab] scratch of add_counts: 1 + index in counts_, or 0

  StepInputs inputs_;
  bool wants_logprobs_ = false, wants_top_ = false;
  Buffer block_;
  size_t bytes_ = 0;
};

}  // namespace ni
