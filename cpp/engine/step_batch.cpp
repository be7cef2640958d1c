#include "engine/step_batch.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/check.h"

namespace ni {
namespace {

// A token of the sequence followed by its drafts.
int32_t token_at(const Sequence& seq, int index) {
  const int known = seq.num_tokens();
  return index < known ? seq.tokens[static_cast<size_t>(index)]
                       : seq.draft_tokens[static_cast<size_t>(index - known)];
}

// StepInputs::plain_sampling, of a row.
bool is_plain(const SamplingRow& r) {
  const bool is_narrowed = r.top_k > 0 || r.top_p < 1 || r.min_p > 0;
  const bool is_processed =
      r.bias_end > r.bias_begin || r.counts_end > r.counts_begin || r.mask_row >= 0;
  const bool is_scored = r.num_logprobs >= 0 || r.target >= 0;
  return !is_narrowed && !is_processed && !is_scored;
}

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// Most tiles of query rows that a step can have: each sequence may leave one partly filled.
size_t max_tiles(size_t max_tokens, size_t max_seqs, const AttnTiling& tiling) {
  return tiling.kv_chunk > 0 ? max_tokens / static_cast<size_t>(tiling.q_tile) + max_seqs : 0;
}

}  // namespace

StepBatch::StepBatch(int block_size, int vocab_size, std::vector<int32_t> eos_token_ids,
                     const AttnTiling& tiling, Allocate allocate)
    : block_size_(block_size),
      vocab_size_(vocab_size),
      eos_token_ids_(std::move(eos_token_ids)),
      tiling_(tiling),
      allocate_(std::move(allocate)),
      count_index_(static_cast<size_t>(vocab_size)) {}

size_t StepBatch::max_bytes(int max_tokens, int max_seqs, int max_blocks,
                            const AttnTiling& tiling) {
  const auto t = static_cast<size_t>(max_tokens), s = static_cast<size_t>(max_seqs);
  const size_t tables = s * static_cast<size_t>(max_blocks), rows = t + s;
  const size_t words = 2 * t + 2 * t + (s + 1) + s + tables + rows;  // of four bytes
  const size_t items = static_cast<size_t>(tiling.most_items(1)) + max_tiles(t, s, tiling);
  const size_t cuts = static_cast<size_t>(tiling.decode_ranges) + 1;
  constexpr size_t kArrays = 15;
  return aligned(sizeof(StepInputs)) + words * 4 + s * sizeof(BlockCopy) +
         items * sizeof(AttnItem) + cuts * sizeof(DecodeCut) + rows * sizeof(SamplingRow) +
         kArrays * 64;
}

void StepBatch::reserve(int max_tokens, int max_seqs, int max_blocks) {
  const auto t = static_cast<size_t>(max_tokens), s = static_cast<size_t>(max_seqs);
  for (std::vector<int32_t>* v : {&token_ids_, &positions_}) v->reserve(t);
  slot_mapping_.reserve(t);
  cu_seqlens_q_.reserve(s + 1);
  context_lens_.reserve(s);
  block_tables_.reserve(s * static_cast<size_t>(max_blocks));
  copies_.reserve(s);
  lists_.decode.reserve(static_cast<size_t>(tiling_.most_items(1)));
  lists_.prefill.reserve(max_tiles(t, s, tiling_));
  lists_.cuts.reserve(static_cast<size_t>(tiling_.decode_ranges) + 1);
  for (auto* v : {&logits_rows_, &sample_rows_}) v->reserve(t + s);
  sampling_.reserve(t + s);
  rows_.reserve(t + s);
  block_ = allocate_(max_bytes(max_tokens, max_seqs, max_blocks, tiling_));
}

void StepBatch::build(const StepPlan& plan, int padded_rows) {
  token_ids_.clear();
  positions_.clear();
  slot_mapping_.clear();
  context_lens_.clear();
  logits_rows_.clear();
  sample_rows_.clear();
  sampling_.clear();
  counts_.clear();
  biases_.clear();
  masks_.clear();
  rows_.clear();
  cu_seqlens_q_.assign(1, 0);
  copies_.assign(plan.copies.begin(), plan.copies.end());

  inputs_ = StepInputs{};
  if (padded_rows > 0) inputs_.max_query_len = inputs_.block_table_stride = 1;
  for (const ScheduledSequence& item : plan.items) {
    const int context = item.seq->num_computed + item.num_query;
    inputs_.max_query_len = std::max(inputs_.max_query_len, item.num_query);
    inputs_.max_context_len = std::max(inputs_.max_context_len, context);
    inputs_.block_table_stride =
        std::max(inputs_.block_table_stride, static_cast<int>(item.seq->block_table.size()));
  }
  const size_t num_seqs = std::max(plan.items.size(), static_cast<size_t>(padded_rows));
  block_tables_.assign(num_seqs * static_cast<size_t>(inputs_.block_table_stride), 0);
  for (int i = 0; i < static_cast<int>(plan.items.size()); ++i) add_item(plan, i);
  const auto any_row = [this](int num_logprobs) {
    return std::any_of(sampling_.begin(), sampling_.end(), [num_logprobs](const SamplingRow& row) {
      return row.num_logprobs >= num_logprobs;
    });
  };
  wants_logprobs_ = any_row(0);
  wants_top_ = any_row(1);
  inputs_.plain_sampling = std::all_of(sampling_.begin(), sampling_.end(), is_plain);
  if (padded_rows > 0) add_padding(padded_rows);
  if (tiling_.kv_chunk > 0)
    build_attn_items(cu_seqlens_q_.data(), context_lens_.data(),
                     static_cast<int32_t>(context_lens_.size()), tiling_, lists_, inputs_);
  // A captured step's sizes are those of its key.
  if (padded_rows > 0) inputs_.max_decode_query_len = 1;

  inputs_.num_tokens = static_cast<int32_t>(token_ids_.size());
  inputs_.num_seqs = static_cast<int32_t>(context_lens_.size());
  inputs_.num_logits = static_cast<int32_t>(sampling_.size());
  inputs_.num_copies = static_cast<int32_t>(copies_.size());
  inputs_.logits_are_rows = true;
  for (size_t i = 0; i < logits_rows_.size(); ++i)
    inputs_.logits_are_rows &= logits_rows_[i] == static_cast<int32_t>(i);
  const bool is_square = inputs_.num_logits == inputs_.num_tokens && inputs_.logits_are_rows;
  check_invariant(padded_rows == 0 || is_square, "only decodes of one row each can be padded");
  pack();
}

void StepBatch::add_item(const StepPlan& plan, int index) {
  const ScheduledSequence& item = plan.items[static_cast<size_t>(index)];
  const Sequence& seq = *item.seq;
  const int first_row = static_cast<int>(token_ids_.size());
  add_tokens(seq, item.num_query);
  cu_seqlens_q_.push_back(first_row + item.num_query);
  context_lens_.push_back(seq.num_computed + item.num_query);
  std::copy(seq.block_table.begin(), seq.block_table.end(),
            block_tables_.begin() + static_cast<ptrdiff_t>(index) * inputs_.block_table_stride);

  if (seq.request->params.prompt_logprobs >= 0) {  // the row at p scores prompt token p + 1
    for (int i = 0; i < item.num_query; ++i) {
      const int scored = seq.num_computed + i + 1;
      if (scored < seq.num_prompt && scored > seq.num_prompt_scored)
        add_score(seq, index, first_row + i, scored);
    }
  }
  const int last_row = first_row + item.num_query - 1;
  if (seq.forks) {
    for (int c = 0; c < item.num_samples; ++c) add_row(seq, index, last_row, c, 0);
  } else {
    for (int s = 0; s < item.num_samples; ++s)
      add_row(seq, index, last_row - (item.num_samples - 1) + s, seq.choice, s);
  }
}

// A prompt may be long, and the card waits meanwhile: a block at a time.
void StepBatch::add_tokens(const Sequence& seq, int count) {
  const size_t first_row = token_ids_.size(), rows = first_row + static_cast<size_t>(count);
  token_ids_.resize(rows);
  positions_.resize(rows);
  slot_mapping_.resize(rows);
  int32_t* tokens = token_ids_.data() + first_row;
  int32_t* positions = positions_.data() + first_row;
  int64_t* slots = slot_mapping_.data() + first_row;
  const int end = seq.num_computed + count, known = std::min(end, seq.num_tokens());
  for (int position = seq.num_computed; position < end;) {
    const int block = position / block_size_, first = block * block_size_;
    const int64_t slot = int64_t{seq.block_table[static_cast<size_t>(block)]} * block_size_ - first;
    for (const int last = std::min(first + block_size_, end); position < last; ++position) {
      *tokens++ =
          position < known ? seq.tokens[static_cast<size_t>(position)] : token_at(seq, position);
      *positions++ = position;
      *slots++ = slot + position;
    }
  }
}

// A row that samples the token after `num_drafts` of the sequence's drafts.
void StepBatch::add_row(const Sequence& seq, int item, int query_row, int choice, int num_drafts) {
  const SamplingParams& p = seq.request->params;
  SamplingRow row;
  row.temperature = p.temperature;
  row.top_p = p.top_p;
  row.min_p = p.min_p;
  row.top_k = std::max(p.top_k, 0);
  row.repetition_penalty = p.repetition_penalty;
  row.presence_penalty = p.presence_penalty;
  row.frequency_penalty = p.frequency_penalty;
  row.num_logprobs = p.logprobs;
  row.choice = static_cast<uint32_t>(choice);
  row.seed = p.seed;
  row.position = positions_[static_cast<size_t>(query_row)] + 1;
  add_mask(row, p);
  add_biases(row, seq, num_drafts);
  add_counts(row, seq, num_drafts);
  sample_rows_.push_back(static_cast<int32_t>(sampling_.size()));
  logits_rows_.push_back(query_row);
  sampling_.push_back(row);
  rows_.push_back({item, -1});
}

void StepBatch::add_score(const Sequence& seq, int item, int query_row, int prompt_index) {
  SamplingRow row;
  row.target = seq.tokens[static_cast<size_t>(prompt_index)];
  row.num_logprobs = seq.request->params.prompt_logprobs;
  logits_rows_.push_back(query_row);
  sampling_.push_back(row);
  rows_.push_back({item, prompt_index});
}

void StepBatch::add_mask(SamplingRow& row, const SamplingParams& params) {
  if (params.allowed_token_ids.empty()) return;
  const size_t words = (static_cast<size_t>(vocab_size_) + 31) / 32;
  row.mask_row = static_cast<int32_t>(masks_.size() / words);
  masks_.resize(masks_.size() + words, 0u);
  uint32_t* mask = masks_.data() + masks_.size() - words;
  for (const int32_t token : params.allowed_token_ids) mask[token / 32] |= 1u << (token % 32);
}

// logit_bias; end-of-sequence and stop tokens before min_tokens; last tokens of bad words whose
// other tokens have just been generated.
void StepBatch::add_biases(SamplingRow& row, const Sequence& seq, int num_drafts) {
  constexpr float kBan = -std::numeric_limits<float>::infinity();
  const SamplingParams& p = seq.request->params;
  const int end = seq.num_tokens() + num_drafts;
  row.bias_begin = static_cast<int32_t>(biases_.size());
  biases_.insert(biases_.end(), p.logit_bias.begin(), p.logit_bias.end());
  if (end - seq.num_prompt < p.min_tokens) {
    if (!p.ignore_eos)
      for (const int32_t token : eos_token_ids_) biases_.push_back({token, kBan});
    for (const int32_t token : p.stop_token_ids) biases_.push_back({token, kBan});
  }
  for (const std::vector<int32_t>& word : p.bad_words) {
    const int prefix = static_cast<int>(word.size()) - 1;
    if (prefix > end - seq.num_prompt) continue;
    bool matches = true;
    for (int i = 0; i < prefix && matches; ++i)
      matches = token_at(seq, end - prefix + i) == word[static_cast<size_t>(i)];
    if (matches) biases_.push_back({word.back(), kBan});
  }
  row.bias_end = static_cast<int32_t>(biases_.size());
}

void StepBatch::add_counts(SamplingRow& row, const Sequence& seq, int num_drafts) {
  if (row.repetition_penalty == 1.0f && row.presence_penalty == 0.0f &&
      row.frequency_penalty == 0.0f)
    return;
  row.counts_begin = static_cast<int32_t>(counts_.size());
  // Nothing may throw below: count_index_ must be all zero again at the end.
  const size_t most = counts_.size() + static_cast<size_t>(seq.num_tokens() + num_drafts);
  if (counts_.capacity() < most) counts_.reserve(2 * most);
  for (int i = 0; i < seq.num_tokens() + num_drafts; ++i) {
    const int32_t token = token_at(seq, i);
    int32_t& index = count_index_[static_cast<size_t>(token)];
    if (index == 0) {
      counts_.push_back({token, 0});
      index = static_cast<int32_t>(counts_.size());
    }
    if (i >= seq.num_prompt) ++counts_[static_cast<size_t>(index - 1)].output_count;
  }
  row.counts_end = static_cast<int32_t>(counts_.size());
  for (int32_t i = row.counts_begin; i < row.counts_end; ++i)
    count_index_[static_cast<size_t>(counts_[static_cast<size_t>(i)].token)] = 0;
}

// Rows of sequences without a context, which nobody reads.
void StepBatch::add_padding(int rows) {
  const auto wanted = static_cast<size_t>(rows);
  check_invariant(token_ids_.size() == context_lens_.size() && token_ids_.size() <= wanted,
                  "only decodes of one row each can be padded");
  SamplingRow row;
  row.temperature = 0;  // the cheapest: no score, no draw
  while (token_ids_.size() < wanted) {
    const auto index = static_cast<int32_t>(token_ids_.size());
    token_ids_.push_back(0);
    positions_.push_back(0);
    slot_mapping_.push_back(-1);
    context_lens_.push_back(0);
    cu_seqlens_q_.push_back(index + 1);
    logits_rows_.push_back(index);
    sampling_.push_back(row);
  }
}

// Lays the struct and the arrays one after another (each 64-byte aligned) into the block.
void StepBatch::pack() {
  const auto each = [&](const auto& visit) {
    visit(token_ids_, inputs_.token_ids);
    visit(positions_, inputs_.positions);
    visit(slot_mapping_, inputs_.slot_mapping);
    visit(cu_seqlens_q_, inputs_.cu_seqlens_q);
    visit(context_lens_, inputs_.context_lens);
    visit(logits_rows_, inputs_.logits_rows);
    visit(sampling_, inputs_.sampling);
    visit(block_tables_, inputs_.block_tables);  // from here on, lists of any length
    visit(copies_, inputs_.copies);
    visit(counts_, inputs_.token_counts);
    visit(biases_, inputs_.token_biases);
    visit(masks_, inputs_.token_masks);
    if (tiling_.kv_chunk == 0) return;
    visit(lists_.decode, inputs_.decode_items);
    visit(lists_.prefill, inputs_.prefill_items);
    visit(lists_.cuts, inputs_.decode_cuts);
  };
  bytes_ = aligned(sizeof(StepInputs));
  each([&](const auto& v, const auto*&) { bytes_ += aligned(v.size() * sizeof(v[0])); });
  if (block_.bytes() < bytes_) block_ = allocate_(2 * bytes_);
  char* next = block_.data() + aligned(sizeof(StepInputs));
  each([&]<typename T>(const std::vector<T>& v, const T*& pointer) {
    if (!v.empty()) std::memcpy(next, v.data(), v.size() * sizeof(T));
    pointer = reinterpret_cast<const T*>(next);
    next += aligned(v.size() * sizeof(T));
  });
}

void StepBatch::forbid_writes() {
  const ptrdiff_t offset =
      reinterpret_cast<const char*>(inputs_.slot_mapping) - static_cast<const char*>(block_.data());
  std::fill_n(reinterpret_cast<int64_t*>(block_.data() + offset), inputs_.num_tokens, -1);
}

StepInputs StepBatch::inputs_at(const void* base, const int32_t* sampled_ids, int32_t* host_ids) {
  StepInputs in = inputs_;
  const auto move = [&](auto*& pointer) {
    if (pointer == nullptr) return;
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    const ptrdiff_t offset = reinterpret_cast<const char*>(pointer) - block_.data();
    pointer = reinterpret_cast<Pointer>(static_cast<const char*>(base) + offset);
  };
  move(in.token_ids);
  move(in.positions);
  move(in.slot_mapping);
  move(in.cu_seqlens_q);
  move(in.context_lens);
  move(in.block_tables);
  move(in.copies);
  move(in.decode_items);
  move(in.prefill_items);
  move(in.decode_cuts);
  move(in.logits_rows);
  move(in.sampling);
  move(in.token_counts);
  move(in.token_biases);
  move(in.token_masks);
  in.sampled_ids = sampled_ids;
  in.host_ids = host_ids;
  in.device = static_cast<const StepInputs*>(base);
  std::memcpy(block_.data(), &in, sizeof(in));
  return in;
}

}  // namespace ni
