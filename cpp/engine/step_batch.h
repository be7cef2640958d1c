// Turns a StepPlan into StepInputs: one contiguous host block, so that a step is one upload.
#pragma once

#include <vector>

#include "core/step_inputs.h"
#include "engine/scheduler.h"

namespace ni {

// What a logits row is for.
struct LogitsRow {
  int item = 0;           // index in plan.items
  int prompt_index = -1;  // >= 0: scores prompt token `prompt_index`; -1: samples a token
};

class StepBatch {
 public:
  StepBatch(int block_size, int vocab_size, std::vector<int32_t> eos_token_ids);

  // Bytes of the largest step's block, but for the lists whose lengths requests choose (token
  // counts, biases, masks) beyond what other arrays leave free. max_blocks: of one sequence.
  static size_t max_bytes(int max_tokens, int max_seqs, int max_blocks);
  // Allocates that much, so that steps do not.
  void reserve(int max_tokens, int max_seqs, int max_blocks);
  // Fills the block from the plan. Reuses its memory; grows it when a step needs more.
  void build(const StepPlan& plan);

  // Pointers into the host block, or into a copy of it at `base`.
  const StepInputs& inputs() const { return inputs_; }
  StepInputs inputs_at(const void* base) const;
  const void* data() const { return block_.data(); }
  size_t bytes() const { return bytes_; }
  size_t capacity() const { return block_.size(); }

  const std::vector<LogitsRow>& rows() const { return rows_; }
  // Some row wants the most likely tokens' log-probabilities.
  bool wants_top() const { return wants_top_; }
  // Logits row of each of the plan's samples.
  const std::vector<int32_t>& sample_rows() const { return sample_rows_; }

 private:
  void add_item(const StepPlan& plan, int index);
  void add_row(const Sequence& seq, int item, int query_row, int choice, int num_drafts);
  void add_score(const Sequence& seq, int item, int query_row, int prompt_index);
  void add_mask(SamplingRow& row, const SamplingParams& params);
  void add_biases(SamplingRow& row, const Sequence& seq, int num_drafts);
  void add_counts(SamplingRow& row, const Sequence& seq, int num_drafts);
  void pack();

  int block_size_;
  int vocab_size_;
  std::vector<int32_t> eos_token_ids_;

  // Cleared and refilled every step; they keep their capacity.
  std::vector<int32_t> token_ids_, positions_, cu_seqlens_q_, context_lens_, block_tables_;
  std::vector<int64_t> slot_mapping_;
  std::vector<int32_t> logits_rows_, sample_rows_;
  std::vector<SamplingRow> sampling_;
  std::vector<TokenCount> counts_;
  std::vector<TokenBias> biases_;
  std::vector<uint32_t> masks_;
  std::vector<BlockCopy> copies_;
  std::vector<LogitsRow> rows_;
  std::vector<int32_t> count_index_;  // [vocab] scratch of add_counts: 1 + index in counts_, or 0

  StepInputs inputs_;
  bool wants_top_ = false;
  std::vector<char> block_;
  size_t bytes_ = 0;
};

}  // namespace ni
