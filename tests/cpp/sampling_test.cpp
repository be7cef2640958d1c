// The sampler against an independent reference: sorted double-precision probabilities. On every
// device of this machine.
#include <map>
#include <set>

#include "draw_reference.h"
#include "reference.h"

namespace ni::test {
namespace {

class SamplingTest : public testing::TestWithParam<std::string> {
 protected:
  struct Result {
    std::vector<int32_t> ids, ranks, top_ids;
    std::vector<float> logprobs, top_logprobs;
  };
  // Samples rows that all have the same logits.
  Result sample(const std::vector<float>& logits, const std::vector<SamplingRow>& rows,
                int32_t max_logprobs = 0, int threads = 2) {
    const auto n = static_cast<int32_t>(rows.size());
    Guarded tensor(n, static_cast<int64_t>(logits.size()), 3);
    for (int32_t r = 0; r < n; ++r)
      for (size_t i = 0; i < logits.size(); ++i) tensor.at(r, static_cast<int64_t>(i)) = logits[i];
    in_.num_logits = n;
    in_.sampling = rows.data();
    in_.token_counts = counts_.data();
    in_.token_biases = biases_.data();
    in_.token_masks = masks_.data();
    const auto size = static_cast<size_t>(n), tops = static_cast<size_t>(n * max_logprobs);
    Result r{std::vector<int32_t>(size, -7), std::vector<int32_t>(size, -7),
             std::vector<int32_t>(tops, -7), std::vector<float>(size, NAN),
             std::vector<float>(tops, NAN)};
    shared_device(GetParam(), threads)
        .sample(tensor.tensor(), in_, 0,
                {r.ids.data(), r.logprobs.data(), r.ranks.data(), r.top_ids.data(),
                 r.top_logprobs.data(), max_logprobs});
    EXPECT_TRUE(tensor.intact());
    return r;
  }
  int32_t sample_one(const std::vector<float>& logits, const SamplingRow& row) {
    return sample(logits, {row}).ids[0];
  }
  // How often each token comes in `draws` rows that differ by position.
  std::map<int32_t, int> frequencies(const std::vector<float>& logits, SamplingRow row, int draws) {
    std::vector<SamplingRow> rows(static_cast<size_t>(draws), row);
    for (int i = 0; i < draws; ++i) rows[static_cast<size_t>(i)].position = i;
    std::map<int32_t, int> counts;
    for (const int32_t id : sample(logits, rows).ids) ++counts[id];
    return counts;
  }

  StepInputs in_;
  std::vector<TokenCount> counts_;
  std::vector<TokenBias> biases_;
  std::vector<uint32_t> masks_;
};
INSTANTIATE_TEST_SUITE_P(Device, SamplingTest, testing::ValuesIn(device_names()), test_name);

SamplingRow greedy() {
  SamplingRow row;
  row.temperature = 0;
  return row;
}

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
  double top = -INFINITY, sum = 0;
  for (const float v : logits) top = std::max(top, static_cast<double>(v));
  std::vector<double> p;
  for (const float v : logits) p.push_back(std::exp((static_cast<double>(v) - top) / temperature));
  for (const double v : p) sum += v;
  for (double& v : p) v /= sum;
  return p;
}

// Probabilities after temperature, top-k, top-p and min-p, by sorting.
std::map<int32_t, double> allowed(const std::vector<float>& logits, const SamplingRow& row) {
  const auto p = softmax(logits, static_cast<double>(row.temperature));
  std::vector<int32_t> order(p.size());
  for (size_t i = 0; i < p.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < order.size())
    order.resize(static_cast<size_t>(row.top_k));
  double kept = 0, before = 0;
  for (const int32_t id : order) kept += p[static_cast<size_t>(id)];
  std::map<int32_t, double> result;
  for (const int32_t id : order) {
    const double mass = p[static_cast<size_t>(id)];
    const bool in_nucleus = before < static_cast<double>(row.top_p) * kept || before == 0;
    if (in_nucleus && mass >= static_cast<double>(row.min_p) * p[static_cast<size_t>(order[0])])
      result[id] = mass;
    before += mass;
  }
  double sum = 0;
  for (const auto& [id, mass] : result) sum += mass;
  for (auto& [id, mass] : result) mass /= sum;
  return result;
}

TEST(Philox, KnownAnswers) {  // Random123's kat_vectors, philox4x32 with 10 rounds
  const auto expect = [](Philox4 r, std::array<uint32_t, 4> want) {
    for (size_t i = 0; i < 4; ++i) EXPECT_EQ(r.v[i], want[i]);
  };
  expect(philox4x32(0, 0, 0, 0, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  expect(philox4x32(~0ull, ~0u, ~0u, ~0u, ~0u), {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  expect(philox4x32(0x299f31d0a4093822ull, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344),
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_P(SamplingTest, GreedyTakesTheFirstMaximum) {
  auto logits = random_floats(5003, 1);
  logits[4000] = logits[17] = 50;
  EXPECT_EQ(sample_one(logits, greedy()), 17);
  logits[16] = NAN;
  EXPECT_EQ(sample_one(logits, greedy()), 17);
  logits[5002] = INFINITY;
  EXPECT_EQ(sample_one(logits, greedy()), 5002);
  EXPECT_EQ(sample_one(logits, {}), 5002);
}

TEST_P(SamplingTest, LogprobsRanksAndTopTokensAreRaw) {
  auto logits = random_floats(3001, 2, 4);
  logits[100] = logits[99];
  const auto p = softmax(logits, 1);
  biases_ = {{7, 100.0f}};
  SamplingRow row = greedy();
  row.bias_end = 1;
  row.num_logprobs = 6;
  SamplingRow scored = row;
  scored.target = 100;
  scored.num_logprobs = 0;
  SamplingRow silent = greedy();
  const Result r = sample(logits, {row, scored, silent}, 8);
  EXPECT_EQ(r.ids[0], 7);
  EXPECT_EQ(r.ids[1], 100);
  for (const size_t i : {size_t{0}, size_t{1}}) {
    const auto id = static_cast<size_t>(r.ids[i]);
    EXPECT_NEAR(static_cast<double>(r.logprobs[i]), std::log(p[id]), 4e-6);
    EXPECT_EQ(r.ranks[i], 1 + std::count_if(logits.begin(), logits.end(),
                                            [&](float v) { return v > logits[id]; }));
  }
  std::vector<int32_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(r.top_ids[i], order[i]);
    EXPECT_NEAR(static_cast<double>(r.top_logprobs[i]), std::log(p[static_cast<size_t>(order[i])]),
                4e-6);
  }
  EXPECT_EQ(r.top_ids[6], -7);             // beyond the row's number: untouched
  EXPECT_TRUE(std::isnan(r.logprobs[2]));  // nothing asked for, nothing written
}

TEST_P(SamplingTest, BiasAndMask) {
  const auto logits = random_floats(70, 3);
  biases_ = {{5, 40.0f}, {69, 20.0f}, {69, 30.0f}, {69, -INFINITY}};
  SamplingRow row = greedy();
  row.bias_begin = 1;
  row.bias_end = 3;
  EXPECT_EQ(sample_one(logits, row), 69);  // 20 + 30
  row.bias_begin = 0;
  EXPECT_EQ(sample_one(logits, row), 69);
  row.bias_end = 4;
  EXPECT_EQ(sample_one(logits, row), 5);
  masks_ = {~0u, ~0u, ~0u, 1u << 9, 0, 1u << 2};  // the second row allows 9 and 66
  row.mask_row = 0;
  EXPECT_EQ(sample_one(logits, row), 5);
  row.mask_row = 1;
  EXPECT_EQ(sample_one(logits, row), logits[9] > logits[66] ? 9 : 66);
  row = {};
  row.mask_row = 1;
  std::set<int32_t> seen;
  for (const auto& [id, n] : frequencies(logits, row, 300)) seen.insert(id);
  EXPECT_EQ(seen, (std::set<int32_t>{9, 66}));
  biases_ = {{70, 1.0f}};
  row.bias_begin = 0;
  row.bias_end = 1;
  EXPECT_THROW(sample_one(logits, row), std::invalid_argument);
}

TEST_P(SamplingTest, Penalties) {
  counts_ = {{0, 0}, {1, 3}, {2, 1}};
  const auto winner = [&](std::vector<float> logits, float repetition, float presence,
                          float frequency) {
    SamplingRow row = greedy();
    row.counts_end = 3;
    row.repetition_penalty = repetition;
    row.presence_penalty = presence;
    row.frequency_penalty = frequency;
    return sample_one(logits, row);
  };
  // Repetition touches prompt tokens too; negative logits move down as well.
  EXPECT_EQ(winner({4, 0, 0, 2.1f}, 1.95f, 0, 0), 3);
  EXPECT_EQ(winner({4, 0, 0, 2.1f}, 1.85f, 0, 0), 0);
  EXPECT_EQ(winner({-9, -1, -9, -1.5f}, 1.6f, 0, 0), 3);
  EXPECT_EQ(winner({-9, -1, -9, -1.5f}, 1.4f, 0, 0), 1);
  // Presence and frequency touch output tokens only.
  EXPECT_EQ(winner({4, 0, 0, 2}, 1, 100, 100), 0);
  EXPECT_EQ(winner({0, 4, 0, 2}, 1, 2.1f, 0), 3);
  EXPECT_EQ(winner({0, 4, 0, 2}, 1, 1.9f, 0), 1);
  EXPECT_EQ(winner({0, 5, 0, 2}, 1, 0, 0.9f), 1);
  EXPECT_EQ(winner({0, 5, 0, 2}, 1, 0, 1.1f), 3);
}

TEST_P(SamplingTest, KeepsExactlyTheAllowedTokens) {
  for (const size_t vocab : {size_t{40}, size_t{1100}}) {
    const auto logits = random_floats(vocab, 4, 2);
    for (const auto& [k, p, m, t] : {std::tuple{5, 1.0f, 0.0f, 1.0f},
                                     {0, 0.6f, 0.0f, 1.0f},
                                     {0, 1.0f, 0.2f, 1.0f},
                                     {12, 0.8f, 0.0f, 1.5f},
                                     {12, 0.9f, 0.15f, 0.7f},
                                     {1, 1.0f, 0.0f, 1.0f},
                                     {0, 0.0f, 0.0f, 1.0f},
                                     {9, 1.0f, 0.0f, 0.5f}}) {
      SamplingRow row;
      row.top_k = k;
      row.top_p = p;
      row.min_p = m;
      row.temperature = t;
      row.seed = 99;
      const auto want = allowed(logits, row);
      const int draws = 4000;
      const auto got = frequencies(logits, row, draws);
      for (const auto& [id, n] : got)
        EXPECT_TRUE(want.count(id)) << id << " k " << k << " p " << p << " min_p " << m;
      for (const auto& [id, mass] : want)
        if (mass * draws > 30) {
          EXPECT_TRUE(got.count(id)) << id;
        }
      // Chi-square over tokens that are expected often enough; 5 sigma.
      double chi = 0;
      int freedom = 0;
      for (const auto& [id, mass] : want) {
        if (mass * draws < 10) continue;
        const double n = got.count(id) ? got.at(id) : 0;
        chi += (n - mass * draws) * (n - mass * draws) / (mass * draws);
        ++freedom;
      }
      EXPECT_LT(chi, freedom + 5 * std::sqrt(2.0 * freedom) + 10)
          << "k " << k << " p " << p << " min_p " << m;
    }
  }
}

// With the draw's own numbers known, the token is the reference's; few others would be.
TEST_P(SamplingTest, DrawsAsPhiloxSays) {
  const auto logits = random_floats(300, 6, 3);
  const auto p = softmax(logits, 1);
  int wrong = 0;
  size_t right = 0;
  for (int position = 0; position < 200; ++position) {
    SamplingRow row;
    row.seed = 1234567890123ull;
    row.choice = 3;
    row.position = position;
    const auto is_right = [&](size_t id) { return is_drawn(p, row, id, 1e-6); };
    wrong += !is_right(static_cast<size_t>(sample_one(logits, row)));
    for (size_t id = 0; id < p.size(); ++id) right += is_right(id);
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_LE(right, size_t{201});
}

// Far below the rest nothing is cut, and nothing drawn: not with the least number that a round may
// have, as here, where token 9 has all but 1e-30 of its unit.
TEST_P(SamplingTest, ARoundGivesNothingToATokenThatHasNothing) {
  std::vector<float> logits(40, -200.0f);
  logits[9] = 0;
  logits[0] = -70;
  logits[1] = -75;
  SamplingRow row;
  row.position = 2553129;
  EXPECT_LT(philox_rounds(0, 0, 2553129).v[0], 1e-7f);
  EXPECT_EQ(sample_one(logits, row), 9);
  row.top_k = 2;
  EXPECT_EQ(sample_one(logits, row), 9);
}

TEST_P(SamplingTest, TiesKeepExactlyKLowestIds) {
  SamplingRow row;
  row.top_k = 3;
  std::set<int32_t> seen;
  for (const auto& [id, n] : frequencies(std::vector<float>(50, 1.0f), row, 400)) seen.insert(id);
  EXPECT_EQ(seen, (std::set<int32_t>{0, 1, 2}));
}

TEST_P(SamplingTest, BannedEverythingFallsBack) {
  std::vector<float> logits = {1, 5, 3, 4};
  masks_ = {0xdu};  // not token 1
  biases_ = {{0, -INFINITY}, {2, -INFINITY}, {3, -INFINITY}};
  for (SamplingRow row : {greedy(), SamplingRow{}}) {
    row.mask_row = 0;
    row.bias_end = 3;
    EXPECT_EQ(sample_one(logits, row), 3);  // the best that the mask allows
  }
  EXPECT_EQ(sample_one(std::vector<float>(9, -INFINITY), {}), 0);
  masks_ = {0};
  SamplingRow row;
  row.mask_row = 0;
  EXPECT_EQ(sample_one(logits, row), 0);
}

TEST_P(SamplingTest, NanNeverEscapesTheVocabulary) {
  for (const auto& logits : {std::vector<float>(33, NAN), std::vector<float>{NAN, 1, NAN, 0}}) {
    SamplingRow row;
    row.top_k = 2;
    row.top_p = 0.5f;
    row.min_p = 0.1f;
    row.num_logprobs = 4;
    SamplingRow plain;
    const Result r = sample(logits, {row, plain, greedy()}, 4);
    for (const int32_t id : r.ids) {
      EXPECT_GE(id, 0);
      EXPECT_LT(id, static_cast<int32_t>(logits.size()));
      if (logits.size() == 4) {
        EXPECT_EQ(id % 2, 1) << "NaN was drawn";
      }
    }
  }
}

TEST_P(SamplingTest, NanIsScoredAsTheLeastLikelyToken) {
  SamplingRow row;
  row.num_logprobs = 0;
  row.target = 2;
  const Result r = sample({1, -INFINITY, NAN, 0, NAN}, {row});
  EXPECT_EQ(r.logprobs[0], -INFINITY);
  EXPECT_EQ(r.ranks[0], 3);
  const Result none = sample(std::vector<float>(5, NAN), {row});
  EXPECT_EQ(none.logprobs[0], -INFINITY);
  EXPECT_EQ(none.ranks[0], 1);
}

TEST_P(SamplingTest, ALargeVocabularyAndAnyThreads) {
  const auto logits = random_floats(151936, 7, 3);
  std::vector<SamplingRow> rows;
  for (int i = 0; i < 12; ++i) {
    SamplingRow row;
    row.temperature = 0.7f;
    row.top_k = i % 3 == 0 ? 50 : 0;
    row.top_p = i % 2 == 0 ? 0.95f : 1.0f;
    row.min_p = i % 4 == 0 ? 0.01f : 0.0f;
    row.num_logprobs = 5;
    row.position = i;
    rows.push_back(row);
  }
  const Result two = sample(logits, rows, 5), one = sample(logits, rows, 5, 1),
               three = sample(logits, rows, 5, 3);
  EXPECT_EQ(two.ids, one.ids);
  EXPECT_EQ(two.ids, three.ids);
  EXPECT_EQ(std::memcmp(two.logprobs.data(), one.logprobs.data(), 12 * sizeof(float)), 0);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_TRUE(allowed(logits, rows[i]).count(two.ids[i])) << i;
    EXPECT_EQ(sample(logits, {rows[i]}, 5).ids[0], two.ids[i]);  // alone
  }
}

}  // namespace
}  // namespace ni::test
