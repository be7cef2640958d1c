// Several query rows and several logits rows of one sequence in a step: drafts, right or wrong,
// change the number of steps and nothing else.
#include <gtest/gtest.h>

#include <random>

#include "engine_helpers.h"

namespace ni {
namespace {

std::vector<Request> requests() {
  std::vector<Request> out;
  for (uint64_t id = 1; id <= 5; ++id) {
    Request r = make_request(id, random_prompt(id, 5 + 9 * static_cast<int>(id)), 40);
    r.params.logprobs = 3;
    r.params.seed = id;
    out.push_back(r);
  }
  out[1].params.temperature = 0.9f;
  out[1].params.repetition_penalty = 1.3f;
  out[1].params.frequency_penalty = 0.5f;
  out[1].params.presence_penalty = -0.5f;
  out[2].params.n = 3;
  out[2].params.temperature = 1.0f;
  out[3].params.min_tokens = 12;
  out[3].params.ignore_eos = false;
  out[3].params.temperature = 1.0f;
  out[3].params.bad_words = {{1, 2}, {3}, {50, 60, 70}};
  for (int32_t t = 0; t < 131; t += 3) out[4].params.allowed_token_ids.push_back(t);
  out[4].params.temperature = 1.0f;
  out[4].params.top_k = 20;
  return out;
}

EngineConfig draft_config() {
  EngineConfig c = tiny_config();
  c.block_size = 4;
  c.max_num_seqs = 8;
  c.max_num_batched_tokens = 64;
  c.eos_token_ids = {0, 7, 9, 12, 33, 90};
  return c;
}

// How many of the next tokens a draft holds, and how many of these are right.
struct Drafting {
  const char* name;
  int length;
  int right;
};

class Drafts : public ::testing::TestWithParam<Drafting> {};

TEST_P(Drafts, ChangeNothingButTheNumberOfSteps) {
  const std::unique_ptr<Engine> plain = make_engine(draft_config());
  for (const Request& r : requests()) plain->submit(r);
  const Results expected = run_all(*plain);
  const uint64_t plain_steps = plain->stats().steps;

  for (const int num_blocks : {512, 70}) {  // roomy; tight, so that drafts lack blocks
    SCOPED_TRACE(num_blocks);
    EngineConfig config = draft_config();
    config.num_blocks = num_blocks;
    const std::unique_ptr<Engine> engine = make_engine(config);
    for (const Request& r : requests()) engine->submit(r);
    const auto draft = [&](int) {
      for (const auto& [key, got] : expected) {
        Sequence* seq = engine->scheduler().find(key.first, key.second);
        if (seq == nullptr || seq->num_output() == 0) continue;
        // The slots of drafts that proved wrong were given back.
        EXPECT_LE(seq->block_table.size(), static_cast<size_t>(seq->num_tokens() + 3) / 4);
        seq->draft_tokens.clear();
        for (int i = 0; i < GetParam().length; ++i) {
          const auto at = static_cast<size_t>(seq->num_output() + i);
          const int32_t right = at < got.tokens.size() ? got.tokens[at] : 5;
          seq->draft_tokens.push_back(i < GetParam().right ? right : (right + 1) % 131);
        }
      }
    };
    const Results results = run_all(*engine, draft);
    ASSERT_EQ(results.size(), expected.size());
    for (const auto& [key, a] : expected) {
      SCOPED_TRACE(concat("request ", key.first, ", choice ", key.second));
      const Got& b = results.at(key);
      EXPECT_EQ(a.tokens, b.tokens);
      EXPECT_TRUE(a.logprobs == b.logprobs);
      EXPECT_EQ(a.reason, b.reason);
      EXPECT_EQ(b.ends, 1);
    }
    EXPECT_TRUE(engine->stats().healthy);
    EXPECT_TRUE(all_blocks_back(engine->stats()));
    int most_samples = 0;
    for (const StepRecord& r : engine->trace(0))
      for (const StepRecord::Entry& e : r.entries)
        if (e.is_decode) most_samples = std::max(most_samples, e.num_samples);
    EXPECT_EQ(most_samples, GetParam().length + 1);
    if (num_blocks == 512) {
      if (GetParam().right > 0) {
        EXPECT_LT(engine->stats().steps, plain_steps / 2 + 8);
      } else {
        EXPECT_EQ(engine->stats().steps, plain_steps);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Drafts,
                         ::testing::Values(Drafting{"right", 4, 4}, Drafting{"wrong", 3, 0},
                                           Drafting{"partly_right", 5, 2},
                                           Drafting{"longer_than_a_block", 9, 9}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace ni
