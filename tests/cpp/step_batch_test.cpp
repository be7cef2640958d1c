#include "engine/step_batch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

namespace ni {
namespace {

constexpr int kBlockSize = 4;
constexpr int kVocab = 70;
const std::vector<int32_t> kEos = {2, 9};

Sequence make_sequence(std::vector<int32_t> prompt, std::vector<int32_t> output, SamplingParams p,
                       std::vector<int32_t> block_table, int num_computed) {
  auto request = std::make_shared<Request>();
  request->prompt = prompt;
  request->params = std::move(p);
  Sequence seq;
  seq.num_prompt = static_cast<int>(prompt.size());
  seq.tokens = std::move(prompt);
  seq.tokens.insert(seq.tokens.end(), output.begin(), output.end());
  seq.block_table = std::move(block_table);
  seq.num_computed = num_computed;
  seq.request = std::move(request);
  return seq;
}

template <typename T>
std::vector<T> values(const T* data, int count) {
  return std::vector<T>(data, data + count);
}

using Ints = std::vector<int32_t>;
using Longs = std::vector<int64_t>;
using Counts = std::vector<std::pair<int32_t, int32_t>>;
using Biases = std::vector<std::pair<int32_t, float>>;

constexpr float kBan = -std::numeric_limits<float>::infinity();

Counts counts_of(const StepInputs& in, int row) {
  Counts out;
  for (int i = in.sampling[row].counts_begin; i < in.sampling[row].counts_end; ++i)
    out.emplace_back(in.token_counts[i].token, in.token_counts[i].output_count);
  std::sort(out.begin(), out.end());
  return out;
}

Biases biases_of(const StepInputs& in, int row) {
  Biases out;
  for (int i = in.sampling[row].bias_begin; i < in.sampling[row].bias_end; ++i)
    out.emplace_back(in.token_biases[i].token, in.token_biases[i].bias);
  return out;
}

Ints allowed_by(const StepInputs& in, int row) {
  Ints out;
  const uint32_t* mask = in.token_masks + in.sampling[row].mask_row * ((kVocab + 31) / 32);
  for (int32_t t = 0; t < kVocab; ++t)
    if (mask[t / 32] >> (t % 32) & 1u) out.push_back(t);
  return out;
}

int allocations = 0;

Buffer allocate(size_t bytes) {
  ++allocations;
  return {std::aligned_alloc(64, (bytes + 63) / 64 * 64), bytes,
          [](void* data, size_t) { std::free(data); }};
}

StepBatch make_batch(const AttnTiling& tiling = {}) {
  return StepBatch(kBlockSize, kVocab, kEos, tiling, allocate);
}

TEST(StepBatch, LaysOutADecodeAndAChunk) {
  Sequence decode = make_sequence({10, 11, 12}, {13, 14}, {}, {7, 5}, 4);
  Sequence chunk = make_sequence({20, 21, 22, 23, 24, 25, 26, 27, 28, 29}, {}, {}, {3, 8, 1}, 3);
  StepPlan plan;
  plan.items = {{&decode, 1, 1, 0, true}, {&chunk, 6, 0, 0, false}};
  plan.copies = {{6, 5}};
  StepBatch batch = make_batch();
  batch.build(plan);
  const StepInputs& in = batch.inputs();
  EXPECT_EQ(in.num_tokens, 7);
  EXPECT_EQ(in.num_seqs, 2);
  EXPECT_EQ(in.num_logits, 1);
  EXPECT_EQ(in.max_query_len, 6);
  EXPECT_EQ(in.max_context_len, 9);
  EXPECT_EQ(values(in.token_ids, 7), (Ints{14, 23, 24, 25, 26, 27, 28}));
  EXPECT_EQ(values(in.positions, 7), (Ints{4, 3, 4, 5, 6, 7, 8}));
  EXPECT_EQ(values(in.slot_mapping, 7), (Longs{20, 15, 32, 33, 34, 35, 4}));
  EXPECT_EQ(values(in.cu_seqlens_q, 3), (Ints{0, 1, 7}));
  EXPECT_EQ(values(in.context_lens, 2), (Ints{5, 9}));
  ASSERT_EQ(in.block_table_stride, 3);
  EXPECT_EQ(values(in.block_tables, 2), (Ints{7, 5}));
  EXPECT_EQ(values(in.block_tables + 3, 3), (Ints{3, 8, 1}));
  ASSERT_EQ(in.num_copies, 1);
  EXPECT_EQ(in.copies[0].src, 6);
  EXPECT_EQ(in.copies[0].dst, 5);
  EXPECT_EQ(values(in.logits_rows, 1), Ints{0});
  EXPECT_TRUE(in.logits_are_rows);
  EXPECT_EQ(in.sampling[0].position, 5);  // of the token that is drawn
  EXPECT_EQ(batch.sample_rows(), Ints{0});
  EXPECT_EQ(batch.rows().size(), 1u);
}

TEST(StepBatch, PassesEverySamplingParameterOn) {
  SamplingParams p;
  p.temperature = 0.5f;
  p.top_p = 0.9f;
  p.min_p = 0.1f;
  p.top_k = 7;
  p.repetition_penalty = 1.5f;
  p.presence_penalty = 0.25f;
  p.frequency_penalty = -0.5f;
  p.seed = 0x123456789abcdefull;
  p.logprobs = 4;
  p.logit_bias = {{3, 2.0f}, {5, -1.0f}};
  p.allowed_token_ids = {0, 31, 32, 69};
  Sequence seq = make_sequence({10, 11, 10}, {12, 11, 12}, p, {1, 2}, 5);
  seq.choice = 6;
  Sequence plain = make_sequence({1}, {}, {}, {3}, 0);
  StepPlan plan;
  plan.items = {{&seq, 1, 1, 0, true}, {&plain, 1, 1, 0, false}};
  StepBatch batch = make_batch();
  batch.build(plan);
  const StepInputs& in = batch.inputs();
  const SamplingRow& row = in.sampling[0];
  EXPECT_EQ(row.temperature, 0.5f);
  EXPECT_EQ(row.top_p, 0.9f);
  EXPECT_EQ(row.min_p, 0.1f);
  EXPECT_EQ(row.top_k, 7);
  EXPECT_EQ(row.repetition_penalty, 1.5f);
  EXPECT_EQ(row.presence_penalty, 0.25f);
  EXPECT_EQ(row.frequency_penalty, -0.5f);
  EXPECT_EQ(row.seed, 0x123456789abcdefull);
  EXPECT_EQ(row.choice, 6u);
  EXPECT_EQ(row.num_logprobs, 4);
  EXPECT_EQ(row.target, -1);
  EXPECT_EQ(row.position, 6);
  EXPECT_EQ(counts_of(in, 0), (Counts{{10, 0}, {11, 1}, {12, 2}}));
  EXPECT_EQ(biases_of(in, 0), (Biases{{3, 2.0f}, {5, -1.0f}}));
  EXPECT_EQ(allowed_by(in, 0), (Ints{0, 31, 32, 69}));
  EXPECT_FALSE(in.plain_sampling);
  // The row beside it has none of this.
  EXPECT_EQ(in.sampling[1].mask_row, -1);
  EXPECT_TRUE(counts_of(in, 1).empty());
  EXPECT_TRUE(biases_of(in, 1).empty());
  EXPECT_EQ(in.sampling[1].num_logprobs, -1);
}

// What a sampler that has only seen sums of the logits cannot do.
TEST(StepBatch, TellsWhetherAllRowsAreDrawnPlainly) {
  const auto is_plain = [](const std::function<void(SamplingParams&)>& change) {
    SamplingParams warm, other;
    warm.temperature = 0.7f;
    warm.seed = 3;
    other.temperature = 0;
    change(other);
    Sequence first = make_sequence({1}, {}, warm, {3}, 0);
    Sequence second = make_sequence({4, 5}, {}, other, {1}, 0);
    StepPlan plan;
    plan.items = {{&first, 1, 1, 0, false}, {&second, 2, 1, 0, false}};
    StepBatch batch = make_batch();
    batch.build(plan);
    return batch.inputs().plain_sampling;
  };
  EXPECT_TRUE(is_plain([](SamplingParams&) {}));
  EXPECT_FALSE(is_plain([](SamplingParams& p) { p.top_k = 5; }));
  EXPECT_FALSE(is_plain([](SamplingParams& p) { p.top_p = 0.5f; }));
  EXPECT_FALSE(is_plain([](SamplingParams& p) { p.min_p = 0.5f; }));
  EXPECT_FALSE(is_plain([](SamplingParams& p) { p.logit_bias = {{3, 1.0f}}; }));
  EXPECT_FALSE(is_plain([](SamplingParams& p) { p.allowed_token_ids = {3}; }));
  EXPECT_FALSE(is_plain([](SamplingParams& p) { p.frequency_penalty = 1; }));
  EXPECT_FALSE(is_plain([](SamplingParams& p) { p.logprobs = 0; }));
  EXPECT_FALSE(is_plain([](SamplingParams& p) { p.prompt_logprobs = 0; }));
}

TEST(StepBatch, TopKOffIsZero) {
  SamplingParams p;
  p.top_k = -1;
  Sequence seq = make_sequence({1}, {}, p, {3}, 0);
  StepPlan plan;
  plan.items = {{&seq, 1, 1, 0, false}};
  StepBatch batch = make_batch();
  batch.build(plan);
  EXPECT_EQ(batch.inputs().sampling[0].top_k, 0);
}

TEST(StepBatch, BansTheEndBeforeMinTokens) {
  const auto bans = [](int outputs, bool ignore_eos) {
    SamplingParams p;
    p.min_tokens = 2;
    p.ignore_eos = ignore_eos;
    p.stop_token_ids = {40};
    Sequence seq = make_sequence({5}, Ints(static_cast<size_t>(outputs), 6), p, {1, 2}, outputs);
    StepPlan plan;
    plan.items = {{&seq, 1, 1, 0, true}};
    StepBatch batch = make_batch();
    batch.build(plan);
    return biases_of(batch.inputs(), 0);
  };
  EXPECT_EQ(bans(0, false), (Biases{{2, kBan}, {9, kBan}, {40, kBan}}));
  EXPECT_EQ(bans(1, false), (Biases{{2, kBan}, {9, kBan}, {40, kBan}}));
  EXPECT_EQ(bans(2, false), Biases{});  // the third token may end it
  EXPECT_EQ(bans(1, true), (Biases{{40, kBan}}));
}

TEST(StepBatch, BansTheLastTokenOfABadWord) {
  SamplingParams p;
  p.bad_words = {{8}, {20, 21}, {30, 20, 22}, {5, 23}, {20, 20, 24}, {1, 30, 20, 25}};
  // The word {5, 23} begins in the prompt: only generated tokens count. The last word is longer
  // than the output.
  Sequence seq = make_sequence({1, 5}, {30, 20}, p, {1, 2}, 3);
  StepPlan plan;
  plan.items = {{&seq, 1, 1, 0, true}};
  StepBatch batch = make_batch();
  batch.build(plan);
  EXPECT_EQ(biases_of(batch.inputs(), 0), (Biases{{8, kBan}, {21, kBan}, {22, kBan}}));
}

TEST(StepBatch, AForkSamplesEveryChoiceFromTheLastRow) {
  SamplingParams p;
  p.n = 3;
  Sequence seq = make_sequence({1, 2, 3, 4, 5}, {}, p, {1, 2}, 2);
  seq.forks = true;
  StepPlan plan;
  plan.items = {{&seq, 3, 3, 0, false}};
  StepBatch batch = make_batch();
  batch.build(plan);
  const StepInputs& in = batch.inputs();
  ASSERT_EQ(in.num_logits, 3);
  EXPECT_EQ(values(in.logits_rows, 3), (Ints{2, 2, 2}));
  EXPECT_FALSE(in.logits_are_rows);
  for (int c = 0; c < 3; ++c) {
    EXPECT_EQ(in.sampling[c].choice, static_cast<uint32_t>(c));
    EXPECT_EQ(in.sampling[c].position, 5);
  }
}

// Each row of a draft sees the tokens before it, drafts included.
TEST(StepBatch, DraftsAreFedAndEachRowSeesThoseBeforeIt) {
  SamplingParams p;
  p.frequency_penalty = 0.5f;
  p.bad_words = {{13, 50, 60}};
  p.min_tokens = 3;
  Sequence seq = make_sequence({10, 11}, {13}, p, {4, 6}, 2);
  seq.choice = 1;
  seq.draft_tokens = {50, 51};
  StepPlan plan;
  plan.items = {{&seq, 3, 3, 2, true}};
  StepBatch batch = make_batch();
  batch.build(plan);
  const StepInputs& in = batch.inputs();
  EXPECT_EQ(values(in.token_ids, 3), (Ints{13, 50, 51}));
  EXPECT_EQ(values(in.positions, 3), (Ints{2, 3, 4}));
  EXPECT_EQ(values(in.slot_mapping, 3), (Longs{18, 19, 24}));
  EXPECT_EQ(values(in.logits_rows, 3), (Ints{0, 1, 2}));
  for (int r = 0; r < 3; ++r) {
    EXPECT_EQ(in.sampling[r].position, 3 + r);
    EXPECT_EQ(in.sampling[r].choice, 1u);
  }
  EXPECT_EQ(counts_of(in, 0), (Counts{{10, 0}, {11, 0}, {13, 1}}));
  EXPECT_EQ(counts_of(in, 1), (Counts{{10, 0}, {11, 0}, {13, 1}, {50, 1}}));
  EXPECT_EQ(counts_of(in, 2), (Counts{{10, 0}, {11, 0}, {13, 1}, {50, 1}, {51, 1}}));
  EXPECT_EQ(biases_of(in, 0), (Biases{{2, kBan}, {9, kBan}}));
  EXPECT_EQ(biases_of(in, 1), (Biases{{2, kBan}, {9, kBan}, {60, kBan}}));
  EXPECT_EQ(biases_of(in, 2), Biases{});
}

// The rows of prompt scores in chunks are those of the whole prompt.
TEST(StepBatch, PromptScoresInChunksEqualTheWhole) {
  SamplingParams p;
  p.prompt_logprobs = 3;
  p.logprobs = 1;
  const Ints prompt = {10, 11, 12, 13, 14, 15, 16};
  struct Score {
    int position, prompt_index;
    int32_t target;
    bool operator==(const Score&) const = default;
  };
  const auto scores = [&](const std::vector<int>& chunks) {
    Sequence seq = make_sequence(prompt, {}, p, {1, 2}, 0);
    StepBatch batch = make_batch();
    std::vector<Score> out;
    for (const int chunk : chunks) {
      const bool last = seq.num_computed + chunk == 7;
      StepPlan plan;
      plan.items = {{&seq, chunk, last ? 1 : 0, 0, false}};
      batch.build(plan);
      const StepInputs& in = batch.inputs();
      EXPECT_EQ(in.num_logits, chunk);
      EXPECT_EQ(batch.sample_rows().size(), last ? 1u : 0u);
      for (int r = 0; r < in.num_logits; ++r) {
        const LogitsRow& row = batch.rows()[static_cast<size_t>(r)];
        EXPECT_EQ(in.logits_rows[r], r);
        EXPECT_EQ(in.sampling[r].num_logprobs, row.prompt_index >= 0 ? 3 : 1);
        if (row.prompt_index >= 0)
          out.push_back({in.positions[in.logits_rows[r]], row.prompt_index, in.sampling[r].target});
      }
      seq.num_computed += chunk;
    }
    return out;
  };
  const std::vector<Score> whole = scores({7});
  ASSERT_EQ(whole.size(), 6u);
  for (int i = 0; i < 6; ++i)
    EXPECT_EQ(whole[static_cast<size_t>(i)], (Score{i, i + 1, prompt[static_cast<size_t>(i + 1)]}));
  EXPECT_EQ(scores({3, 4}), whole);
  EXPECT_EQ(scores({1, 1, 1, 1, 1, 1, 1}), whole);
  EXPECT_EQ(scores({6, 1}), whole);
}

// A preempted prompt is computed again, but not delivered again.
TEST(StepBatch, ScoresThatWereDeliveredAreNotRepeated) {
  SamplingParams p;
  p.prompt_logprobs = 0;
  Sequence seq = make_sequence({10, 11, 12, 13, 14, 15}, {}, p, {1, 2}, 0);
  seq.num_prompt_scored = 3;
  StepPlan plan;
  plan.items = {{&seq, 6, 1, 0, false}};
  StepBatch batch = make_batch();
  batch.build(plan);
  ASSERT_EQ(batch.inputs().num_logits, 3);
  EXPECT_EQ(values(batch.inputs().logits_rows, 3), (Ints{3, 4, 5}));
  EXPECT_FALSE(batch.inputs().logits_are_rows);
  EXPECT_EQ(batch.rows()[0].prompt_index, 4);
  EXPECT_EQ(batch.sample_rows(), Ints{2});
  seq.num_prompt_scored = 5;  // resumed while decoding: only the sample
  seq.tokens.push_back(16);
  plan.items = {{&seq, 7, 1, 0, false}};
  batch.build(plan);
  EXPECT_EQ(batch.inputs().num_logits, 1);
}

TEST(StepBatch, ScoresAndSamplesOfSeveralSequencesKeepTheirOrder) {
  SamplingParams scored;
  scored.prompt_logprobs = 0;
  scored.n = 2;
  Sequence a = make_sequence({1, 2}, {3}, {}, {1}, 2);
  Sequence b = make_sequence({4, 5, 6}, {}, scored, {2}, 0);
  b.forks = true;
  Sequence c = make_sequence({7, 8}, {}, {}, {3}, 0);
  StepPlan plan;
  plan.items = {{&a, 1, 1, 0, true}, {&b, 3, 2, 0, false}, {&c, 2, 1, 0, false}};
  StepBatch batch = make_batch();
  batch.build(plan);
  EXPECT_EQ(values(batch.inputs().logits_rows, 6), (Ints{0, 1, 2, 3, 3, 5}));
  EXPECT_EQ(batch.sample_rows(), (Ints{0, 3, 4, 5}));
  EXPECT_EQ(batch.rows()[1].item, 1);
  EXPECT_EQ(batch.rows()[1].prompt_index, 1);
  EXPECT_EQ(batch.rows()[5].item, 2);
}

TEST(StepBatch, IsOneBlockThatCanBeMoved) {
  SamplingParams p;
  p.repetition_penalty = 2.0f;
  p.logit_bias = {{3, 1.0f}};
  p.allowed_token_ids = {1, 2};
  Sequence seq = make_sequence({10, 11, 12}, {13}, p, {7}, 3);
  StepPlan plan;
  plan.items = {{&seq, 1, 1, 0, true}};
  plan.copies = {{1, 2}};
  StepBatch batch = make_batch();
  batch.build(plan);
  std::vector<char> copy(batch.bytes() + 64);
  char* base = copy.data() + (64 - reinterpret_cast<uintptr_t>(copy.data()) % 64) % 64;
  const int32_t sampled = 5;
  int32_t host_id = 0;
  const StepInputs moved = batch.inputs_at(base, &sampled, &host_id);
  std::memcpy(base, batch.data(), batch.bytes());
  batch.build(StepPlan{});  // what is at `base` is independent of the batch
  EXPECT_EQ(batch.inputs().num_tokens, 0);
  EXPECT_EQ(batch.inputs().num_logits, 0);
  // The copy begins with the struct.
  ASSERT_EQ(static_cast<const void*>(moved.device), base);
  EXPECT_EQ(moved.device->token_ids, moved.token_ids);
  EXPECT_EQ(moved.device->token_masks, moved.token_masks);
  EXPECT_EQ(moved.device->num_tokens, 1);
  EXPECT_EQ(moved.device->max_context_len, 4);
  EXPECT_EQ(moved.device->block_table_stride, 1);
  EXPECT_EQ(moved.device->sampled_ids, &sampled);
  EXPECT_EQ(moved.device->host_ids, &host_id);
  EXPECT_EQ(moved.device->device, moved.device);
  EXPECT_EQ(moved.decode_items, nullptr);  // nobody asked for lists
  EXPECT_EQ(moved.prefill_items, nullptr);
  EXPECT_EQ(moved.token_ids[0], 13);
  EXPECT_EQ(moved.positions[0], 3);
  EXPECT_EQ(moved.slot_mapping[0], 31);
  EXPECT_EQ(moved.cu_seqlens_q[1], 1);
  EXPECT_EQ(moved.context_lens[0], 4);
  EXPECT_EQ(moved.block_tables[0], 7);
  EXPECT_EQ(moved.copies[0].dst, 2);
  EXPECT_EQ(moved.logits_rows[0], 0);
  EXPECT_EQ(counts_of(moved, 0), (Counts{{10, 0}, {11, 0}, {12, 0}, {13, 1}}));
  EXPECT_EQ(biases_of(moved, 0), (Biases{{3, 1.0f}}));
  EXPECT_EQ(allowed_by(moved, 0), (Ints{1, 2}));
  for (const void* array :
       {static_cast<const void*>(moved.token_ids), static_cast<const void*>(moved.slot_mapping),
        static_cast<const void*>(moved.sampling), static_cast<const void*>(moved.token_masks)})
    EXPECT_EQ((static_cast<const char*>(array) - base) % 64, 0);
  EXPECT_LE(reinterpret_cast<const char*>(moved.token_masks + 3), base + batch.bytes() + 1024);
}

TEST(StepBatch, PaddingIsHarmlessAndTheRowsStandWhereTheyStood) {
  SamplingParams heavy;
  heavy.logit_bias = {{3, 1.0f}};
  heavy.allowed_token_ids = {1, 2};
  heavy.frequency_penalty = 1.0f;
  heavy.logprobs = 2;
  std::vector<Sequence> seqs;
  for (int i = 0; i < 3; ++i)
    seqs.push_back(make_sequence({10, 11, 12, 13, 14, 15, 16, 17, 18}, {20 + i},
                                 i == 1 ? heavy : SamplingParams(), {7, 5, 3 + i}, 9));
  StepBatch batch = make_batch({.kv_chunk = 4, .q_tile = 8, .decode_rows = 2, .max_items = 50});
  batch.reserve(64, 16, 8);
  const int before = allocations;
  alignas(64) char base[64];  // an address; nothing is read there
  std::vector<std::vector<const void*>> places;
  for (const int count : {3, 2, 1, 0}) {
    StepPlan plan;
    for (int i = 0; i < count; ++i)
      plan.items.push_back({&seqs[static_cast<size_t>(i)], 1, 1, 0, true});
    batch.build(plan, 4);
    const StepInputs& in = batch.inputs();
    EXPECT_EQ(in.num_tokens, 4);
    EXPECT_EQ(in.num_seqs, 4);
    EXPECT_EQ(in.num_logits, 4);
    EXPECT_EQ(in.max_query_len, 1);
    EXPECT_GE(in.block_table_stride, 1);
    EXPECT_EQ(values(in.cu_seqlens_q, 5), (Ints{0, 1, 2, 3, 4}));
    EXPECT_EQ(values(in.logits_rows, 4), (Ints{0, 1, 2, 3}));
    EXPECT_TRUE(in.logits_are_rows);
    EXPECT_EQ(batch.rows().size(), static_cast<size_t>(count));
    EXPECT_EQ(batch.sample_rows().size(), static_cast<size_t>(count));
    EXPECT_EQ(in.num_decode_items, 3 * count);  // none of them of padding
    EXPECT_EQ(batch.wants_top(), count > 1);
    EXPECT_EQ(batch.wants_logprobs(), count > 1);
    for (int r = 0; r < 4; ++r) {
      const bool real = r < count;
      EXPECT_EQ(in.token_ids[r], real ? 20 + r : 0);
      EXPECT_EQ(in.positions[r], real ? 9 : 0);
      EXPECT_EQ(in.slot_mapping[r], real ? (3 + r) * kBlockSize + 1 : -1);
      EXPECT_EQ(in.context_lens[r], real ? 10 : 0);
      EXPECT_EQ(in.sampling[r].target, -1);
      EXPECT_EQ(in.sampling[r].temperature, real ? 1.0f : 0.0f);
      EXPECT_EQ(in.sampling[r].num_logprobs, r == 1 && real ? 2 : -1);
      EXPECT_EQ(in.sampling[r].mask_row, r == 1 && real ? 0 : -1);
    }
    const StepInputs at = batch.inputs_at(base, nullptr, nullptr);
    places.push_back({at.token_ids, at.positions, at.slot_mapping, at.cu_seqlens_q, at.context_lens,
                      at.logits_rows, at.sampling, at.block_tables, at.device});
  }
  for (const auto& place : places) EXPECT_EQ(place, places[0]);
  EXPECT_EQ(allocations, before);
}

TEST(StepBatch, WritesCanBeForbidden) {
  Sequence seq = make_sequence({1, 2, 3}, {}, {}, {3}, 0);
  StepPlan plan;
  plan.items = {{&seq, 3, 1, 0, false}};
  StepBatch batch = make_batch();
  batch.build(plan);
  batch.forbid_writes();
  EXPECT_EQ(values(batch.inputs().slot_mapping, 3), (Longs{-1, -1, -1}));
  EXPECT_EQ(values(batch.inputs().token_ids, 3), (Ints{1, 2, 3}));
  EXPECT_EQ(values(batch.inputs().cu_seqlens_q, 2), (Ints{0, 3}));
}

using Items = std::vector<std::pair<int32_t, int32_t>>;

Items items(const AttnItem* list, int count) {
  Items out;
  for (int i = 0; i < count; ++i) out.emplace_back(list[i].seq, list[i].index);
  return out;
}

TEST(StepBatch, ListsTheWorkOfAttention) {
  const auto prompt = [](int length) { return Ints(static_cast<size_t>(length), 1); };
  const Ints table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  // Contexts of 17 and 8; a draft of 3 rows; prompts of 20 rows after 12, 9 rows after 23, and of 4
  // rows, few enough to be cut along the cache.
  Sequence a = make_sequence(prompt(16), {5}, {}, table, 16);
  Sequence b = make_sequence(prompt(7), {5}, {}, table, 7);
  Sequence c = make_sequence(prompt(5), {5}, {}, table, 5);
  c.draft_tokens = {6, 7};
  Sequence d = make_sequence(prompt(32), {}, {}, table, 12);
  Sequence e = make_sequence(prompt(32), {}, {}, table, 23);
  Sequence f = make_sequence(prompt(4), {}, {}, table, 0);
  StepPlan plan;
  plan.items = {{&a, 1, 1, 0, true},   {&b, 1, 1, 0, true},  {&c, 3, 3, 2, true},
                {&d, 20, 1, 0, false}, {&e, 9, 1, 0, false}, {&f, 4, 1, 0, false}};
  const auto build = [&](int max_items) {
    StepBatch batch =
        make_batch({.kv_chunk = 8, .q_tile = 8, .decode_rows = 4, .max_items = max_items});
    batch.build(plan);
    const StepInputs& in = batch.inputs();
    // d's tiles end at 20, 28 and 32, those of e at 31 and 32: the earlier of equals comes first.
    EXPECT_EQ(items(in.prefill_items, in.num_prefill_items),
              (Items{{3, 2}, {4, 1}, {4, 0}, {3, 1}, {3, 0}}));
    return items(in.decode_items, in.num_decode_items);
  };
  EXPECT_EQ(build(6), (Items{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {2, 0}, {5, 0}}));
  // One place less: a's three chunks would leave too few for those behind it; the others fit.
  EXPECT_EQ(build(5), (Items{{0, -1}, {1, 0}, {2, 0}, {5, 0}}));
  EXPECT_EQ(build(4), (Items{{0, -1}, {1, 0}, {2, 0}, {5, 0}}));
}

// Random steps: no list is longer than was planned for.
TEST(StepBatch, MaxBytesHoldsTheLargestStep) {
  const AttnTiling tiling{.kv_chunk = 4, .q_tile = 8, .decode_rows = 2, .max_items = 24};
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<Sequence> seqs(6);
    StepPlan plan;
    int left = 48;
    for (Sequence& seq : seqs) {
      const int rows = 1 + static_cast<int>(random() % static_cast<unsigned>(std::min(left, 32)));
      left = std::max(left - rows, 1);
      seq = make_sequence(Ints(32, 1), {}, {}, {1, 2, 3, 4, 5, 6, 7, 8}, 32 - rows);
      if (plan.num_tokens + rows > 48) break;
      plan.num_tokens += rows;
      plan.items.push_back({&seq, rows, 1, 0, false});
    }
    StepBatch batch = make_batch(tiling);
    batch.reserve(48, 6, 8);
    const int before = allocations;
    batch.build(plan);
    EXPECT_EQ(allocations, before);
    EXPECT_LE(batch.bytes(), StepBatch::max_bytes(48, 6, 8, tiling));
    EXPECT_LE(batch.inputs().num_decode_items, 24);
  }
}

}  // namespace
}  // namespace ni
