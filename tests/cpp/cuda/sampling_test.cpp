// The device's sampler against double-precision loops: sorted probabilities, cumulative sums.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "../draw_reference.h"
#include "core/check.h"
#include "tests/cpp/cuda/device_array.h"

namespace ni::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Rows to sample, and the lists they refer to.
struct Batch {
  explicit Batch(size_t vocab) : vocab(vocab) {}

  void add(const std::vector<float>& row_logits, const SamplingRow& row) {
    logits.insert(logits.end(), row_logits.begin(), row_logits.end());
    rows.push_back(row);
  }
  void set_biases(SamplingRow& row, const std::vector<TokenBias>& list) {
    row.bias_begin = static_cast<int32_t>(biases.size());
    biases.insert(biases.end(), list.begin(), list.end());
    row.bias_end = static_cast<int32_t>(biases.size());
  }
  void set_counts(SamplingRow& row, const std::vector<TokenCount>& list) {
    row.counts_begin = static_cast<int32_t>(counts.size());
    counts.insert(counts.end(), list.begin(), list.end());
    row.counts_end = static_cast<int32_t>(counts.size());
  }
  void set_mask(SamplingRow& row, const std::vector<int32_t>& tokens) {
    const size_t words = (vocab + 31) / 32;
    row.mask_row = static_cast<int32_t>(masks.size() / words);
    masks.resize(masks.size() + words, 0u);
    uint32_t* mask = masks.data() + masks.size() - words;
    for (const int32_t t : tokens) mask[t / 32] |= 1u << (t % 32);
  }
  bool is_allowed(const SamplingRow& row, size_t id) const {
    if (row.mask_row < 0) return true;
    const size_t words = (vocab + 31) / 32;
    return (masks[static_cast<size_t>(row.mask_row) * words + id / 32] >> (id % 32) & 1u) != 0;
  }
  std::vector<float> logits_of(size_t row) const {
    const auto begin = logits.begin() + static_cast<ptrdiff_t>(row * vocab);
    return {begin, begin + static_cast<ptrdiff_t>(vocab)};
  }
  // With the lists and the logits of one row.
  Batch alone(size_t row) const {
    Batch one = *this;
    one.logits = logits_of(row);
    one.rows = {rows[row]};
    return one;
  }

  size_t vocab;
  std::vector<float> logits;  // [rows, vocab]
  std::vector<SamplingRow> rows;
  std::vector<TokenCount> counts;
  std::vector<TokenBias> biases;
  std::vector<uint32_t> masks;
};

// What was written for the batch's rows; floats that were not are NaN, integers -1.
struct Result {
  std::vector<int32_t> ids, ranks, top_ids;
  std::vector<float> logprobs, top_logprobs;
};

// A batch in device memory. Its rows are sampling rows [first, first + n); others come before, and
// none of those may be touched.
class DeviceBatch {
 public:
  explicit DeviceBatch(const Batch& b, int32_t max_logprobs = 0, int32_t first = 2,
                       bool plain = false)
      : batch_(b),
        first_(first),
        plain_(plain),
        max_logprobs_(max_logprobs),
        stride_(b.vocab + 5),
        logits_(b.rows.size() * stride_),
        sampling_(b.rows.size() + static_cast<size_t>(first)),
        counts_(b.counts),
        biases_(b.biases),
        masks_(b.masks),
        step_(1),
        ids_(rows()),
        host_ids_(rows()),
        ranks_(rows()),
        top_ids_(rows() * static_cast<size_t>(max_logprobs)),
        logprobs_(rows()),
        top_logprobs_(rows() * static_cast<size_t>(max_logprobs)),
        workspace_(cuda::sample_workspace_bytes(static_cast<int64_t>(b.rows.size()),
                                                static_cast<int64_t>(b.vocab))) {
    for (size_t r = 0; r < b.rows.size(); ++r)
      check_device(cudaMemcpy(logits_.data() + r * stride_, b.logits.data() + r * b.vocab,
                              b.vocab * sizeof(float), cudaMemcpyHostToDevice));
    set_rows(b.rows, static_cast<int32_t>(rows()));
  }

  void set_rows(const std::vector<SamplingRow>& sampled, int32_t num_logits) {
    std::vector<SamplingRow> all(static_cast<size_t>(first_));
    all.insert(all.end(), sampled.begin(), sampled.end());
    sampling_.upload(all.data(), all.size() * sizeof(SamplingRow));
    StepInputs step;
    step.num_logits = num_logits;
    step.sampling = sampling_.data();
    step.token_counts = counts_.data();
    step.token_biases = biases_.data();
    step.token_masks = masks_.data();
    step.host_ids = host_ids_.data();
    step_.upload(&step, sizeof(step));
  }
  void launch(cudaStream_t stream = nullptr) {
    const SampleOutputs out{ids_.data(),     logprobs_.data(),     ranks_.data(),
                            top_ids_.data(), top_logprobs_.data(), max_logprobs_};
    cuda::sample(logits_.data(), static_cast<int64_t>(stride_),
                 static_cast<int64_t>(batch_.rows.size()), static_cast<int64_t>(batch_.vocab),
                 step_.data(), first_, has_units_, plain_, out, workspace_.data(), stream);
  }
  // As a product does that makes the logits.
  void sum_up() {
    cuda::sum_up_logits(logits_.data(), static_cast<int64_t>(stride_),
                        static_cast<int64_t>(batch_.rows.size()),
                        static_cast<int64_t>(batch_.vocab),
                        {cuda::sample_units(workspace_.data()), step_.data(), first_}, nullptr);
    has_units_ = true;
  }
  void poison() {
    for (DeviceBytes* bytes : all_outputs()) bytes->poison();
    workspace_.poison();
  }
  Result read() {
    for (DeviceBytes* bytes : all_outputs()) EXPECT_TRUE(bytes->intact());
    EXPECT_TRUE(workspace_.intact());
    EXPECT_TRUE(logits_.intact());
    const auto top = static_cast<ptrdiff_t>(first_) * max_logprobs_;
    EXPECT_EQ(host_ids_.read(), ids_.read());
    return {tail(ids_.read(), first_), tail(ranks_.read(), first_), tail(top_ids_.read(), top),
            tail(logprobs_.read(), first_), tail(top_logprobs_.read(), top)};
  }

 private:
  size_t rows() const { return batch_.rows.size() + static_cast<size_t>(first_); }
  std::vector<DeviceBytes*> all_outputs() {
    return {&ids_, &host_ids_, &ranks_, &top_ids_, &logprobs_, &top_logprobs_};
  }
  // What comes after the first `skip`, which nothing may have written.
  template <typename T>
  static std::vector<T> tail(const std::vector<T>& v, ptrdiff_t skip) {
    for (ptrdiff_t i = 0; i < skip; ++i) {
      const T x = v[static_cast<size_t>(i)];
      EXPECT_TRUE(std::is_integral_v<T> ? x == static_cast<T>(-1) : x != x) << "before the rows";
    }
    return {v.begin() + skip, v.end()};
  }

  const Batch& batch_;
  int32_t first_;
  bool plain_, has_units_ = false;
  int32_t max_logprobs_;
  size_t stride_;
  DeviceArray<float> logits_;
  DeviceArray<SamplingRow> sampling_;
  DeviceArray<TokenCount> counts_;
  DeviceArray<TokenBias> biases_;
  DeviceArray<uint32_t> masks_;
  DeviceArray<StepInputs> step_;
  DeviceArray<int32_t> ids_, host_ids_, ranks_, top_ids_;  // host_ids_: any memory will do
  DeviceArray<float> logprobs_, top_logprobs_;
  DeviceBytes workspace_;
};

// `plain`: all rows are.
Result sample(const Batch& batch, int32_t max_logprobs = 0, bool plain = false) {
  DeviceBatch device(batch, max_logprobs, 2, plain);
  device.launch();
  return device.read();
}

Result sample_summed_up(const Batch& batch, int32_t max_logprobs, bool plain) {
  DeviceBatch device(batch, max_logprobs, 2, plain);
  device.sum_up();
  device.launch();
  return device.read();
}

int32_t sample_one(const std::vector<float>& logits, const SamplingRow& row) {
  Batch batch(logits.size());
  batch.add(logits, row);
  return sample(batch).ids[0];
}

SamplingRow greedy() {
  SamplingRow row;
  row.temperature = 0;
  return row;
}

float clean(float v) {
  return std::isnan(v) ? -kInf : v;
}

// Ids by falling logit; ties: lower ids first.
std::vector<size_t> by_likelihood(const std::vector<float>& z) {
  std::vector<size_t> order(z.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return z[a] > z[b]; });
  return order;
}

// -- Reference ------------------------------------------------------------------------------------

std::vector<float> processed(const Batch& b, size_t at) {
  const SamplingRow& row = b.rows[at];
  std::vector<float> z = b.logits_of(at);
  for (int32_t i = row.bias_begin; i < row.bias_end; ++i)
    z[static_cast<size_t>(b.biases[static_cast<size_t>(i)].token)] +=
        b.biases[static_cast<size_t>(i)].bias;
  for (size_t i = 0; i < z.size(); ++i) z[i] = b.is_allowed(row, i) ? clean(z[i]) : -kInf;
  for (int32_t i = row.counts_begin; i < row.counts_end; ++i) {
    const TokenCount c = b.counts[static_cast<size_t>(i)];
    float& v = z[static_cast<size_t>(c.token)];
    v = v > 0 ? v / row.repetition_penalty : v * row.repetition_penalty;
    const float frequency = row.frequency_penalty * static_cast<float>(c.output_count);
    const float penalty = row.presence_penalty + frequency;
    if (c.output_count > 0) v -= penalty;
  }
  return z;
}

// What may be drawn, and how likely.
struct Distribution {
  std::vector<double> mass;  // of each token; 0: cut
  double total = 0;
  double ambiguous = 0;  // mass of tokens that rounding may cut or keep
};

Distribution distribution(const std::vector<float>& z, const SamplingRow& row) {
  const double factor = static_cast<double>(1.0f / row.temperature);
  const double top_p = static_cast<double>(row.top_p), min_p = static_cast<double>(row.min_p);
  std::vector<size_t> order = by_likelihood(z);
  const auto best = static_cast<double>(z[order[0]]);
  const auto p = [&](size_t id) { return std::exp((static_cast<double>(z[id]) - best) * factor); };
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < order.size())
    order.resize(static_cast<size_t>(row.top_k));
  double kept = 0, before = 0;
  for (const size_t id : order) kept += p(id);
  Distribution d;
  d.mass.assign(z.size(), 0.0);
  for (const size_t id : order) {
    const double mass = p(id), from_cut = before - top_p * kept;
    const bool in_nucleus = row.top_p >= 1 || before == 0 || from_cut < 0;
    const bool near_cut = row.top_p < 1 && before > 0 && std::abs(from_cut) < 1e-6 * kept;
    const bool near_min = mass < 1 && row.min_p > 0 && std::abs(mass / min_p - 1) < 1e-5;
    if (in_nucleus && mass >= min_p) d.mass[id] = mass;
    if (near_cut || near_min) d.ambiguous += mass;
    before += mass;
  }
  d.total = std::accumulate(d.mass.begin(), d.mass.end(), 0.0);
  return d;
}

void expect_draw(const Distribution& d, const SamplingRow& row, size_t token) {
  EXPECT_TRUE(is_drawn(d.mass, row, token, 1e-5, d.ambiguous)) << token;
  if (d.ambiguous == 0) {
    EXPECT_GT(d.mass[token], 0) << "cut";
  }
}

// Every row's token is the reference's. Of rows, few may be such that rounding decides more.
void expect_tokens(const Batch& b, const std::vector<int32_t>& ids) {
  size_t unclear = 0;
  for (size_t r = 0; r < b.rows.size(); ++r) {
    const SamplingRow& row = b.rows[r];
    SCOPED_TRACE(concat("row ", r, " vocabulary ", b.vocab, " temperature ", row.temperature,
                        " top_k ", row.top_k, " top_p ", row.top_p, " min_p ", row.min_p));
    const std::vector<float> z = processed(b, r);
    const size_t best = by_likelihood(z)[0];
    ASSERT_GE(ids[r], 0);
    ASSERT_LT(ids[r], static_cast<int32_t>(b.vocab));
    if (row.temperature < 1e-5f || z[best] == kInf) {
      EXPECT_EQ(ids[r], static_cast<int32_t>(best));
      continue;
    }
    const Distribution d = distribution(z, row);
    expect_draw(d, row, static_cast<size_t>(ids[r]));
    unclear += d.ambiguous > 1e-4 * d.total;
  }
  EXPECT_LE(unclear, b.rows.size() / 10 + 1);
}

// -- Tests ----------------------------------------------------------------------------------------

TEST(CudaSampling, GreedyTakesTheFirstMaximum) {
  for (const size_t vocab : {size_t{5003}, size_t{151936}, size_t{200003}}) {
    std::vector<float> logits = normal_floats(vocab, 1);
    logits[4000] = logits[17] = logits[vocab - 1] = 50;
    EXPECT_EQ(sample_one(logits, greedy()), 17);
    logits[16] = NAN;
    EXPECT_EQ(sample_one(logits, greedy()), 17);
    logits[3] = -kInf;
    EXPECT_EQ(sample_one(logits, greedy()), 17);
    SamplingRow almost = greedy();
    almost.temperature = 0.9e-5f;
    EXPECT_EQ(sample_one(logits, almost), 17);
    logits[vocab - 1] = logits[vocab - 2] = kInf;
    for (SamplingRow row : {greedy(), SamplingRow{}}) {
      EXPECT_EQ(sample_one(logits, row), static_cast<int32_t>(vocab - 2));
      row.top_k = 4;
      row.top_p = 0.5f;
      EXPECT_EQ(sample_one(logits, row), static_cast<int32_t>(vocab - 2));
    }
  }
  EXPECT_EQ(sample_one({-1, -0.0f, 0.0f}, greedy()), 1);  // they are equal
}

// Random rows of every kind of parameter.
Batch random_batch(size_t vocab, size_t rows, uint32_t seed) {
  Batch b(vocab);
  std::mt19937 rng(seed);
  const auto below = [&](size_t n) { return static_cast<size_t>(rng() % n); };
  const auto one_of = [&](const std::vector<float>& v) { return v[below(v.size())]; };
  for (size_t r = 0; r < rows; ++r) {
    SamplingRow row;
    row.temperature = one_of({0, 0.2f, 0.7f, 1, 1, 1.7f, 30});
    const std::vector<int32_t> ks = {0, 0, 1, 2, 20, 300, 5000};
    row.top_k = ks[below(ks.size())];
    row.top_p = one_of({1, 1, 0.95f, 0.6f, 0.1f, 0});
    row.min_p = one_of({0, 0, 0, 0.02f, 0.3f, 1});
    row.seed = rng() * 0x100000001ull;
    row.choice = static_cast<uint32_t>(below(4));
    row.position = static_cast<int32_t>(below(100000));
    if (below(3) == 0) {
      std::vector<TokenBias> biases;
      for (size_t i = 0; i < 40; ++i)
        biases.push_back(
            {static_cast<int32_t>(below(vocab)), i % 7 == 3 ? -kInf : one_of({-3, 2, 5})});
      b.set_biases(row, biases);
    }
    if (below(3) == 0) {
      row.repetition_penalty = one_of({1, 1.3f, 0.8f});
      row.presence_penalty = one_of({0, 0.7f});
      row.frequency_penalty = one_of({0, 0.3f, -0.2f});
      std::map<int32_t, int32_t> counts;
      for (size_t i = 0; i < 700; ++i)
        counts[static_cast<int32_t>(below(vocab))] = static_cast<int32_t>(below(4));
      std::vector<TokenCount> list;
      for (const auto& [token, count] : counts) list.push_back({token, count});
      b.set_counts(row, list);
    }
    if (below(4) == 0) {
      std::vector<int32_t> tokens;
      for (size_t i = 0; i < vocab; ++i)
        if (i % 3 != 1 || vocab < 3) tokens.push_back(static_cast<int32_t>(i));
      b.set_mask(row, tokens);
    }
    std::vector<float> logits =
        normal_floats(vocab, seed + static_cast<uint32_t>(r) * 977 + 5, one_of({0.05f, 1, 3, 8}));
    if (below(4) == 0)
      for (float& v : logits) v = std::round(v * 2) / 2;  // many ties
    if (below(4) == 0) logits[below(vocab)] = NAN;
    if (below(4) == 0) logits[below(vocab)] = -kInf;
    logits[below(vocab)] = 4;  // not everything is banned
    b.add(logits, row);
  }
  return b;
}

TEST(CudaSampling, RandomParametersGiveTheReferencesTokens) {
  for (const auto& [vocab, rows] : {std::pair<size_t, size_t>{1, 20},
                                    {2, 60},
                                    {31, 200},
                                    {1000, 200},
                                    {4099, 100},
                                    {32000, 60},
                                    {151936, 30},
                                    {262144, 6}}) {
    Batch b = random_batch(vocab, rows, static_cast<uint32_t>(vocab));
    for (size_t r = 0; r < rows; ++r) {  // a row that bans everything is another test's
      const std::vector<float> z = processed(b, r);
      if (*std::max_element(z.begin(), z.end()) == -kInf) b.rows[r] = greedy();
    }
    const std::vector<int32_t> ids = sample(b).ids;
    expect_tokens(b, ids);
    EXPECT_EQ(sample_summed_up(b, 0, false).ids, ids);
  }
}

// Where units of the logits are there, rows that nothing but a temperature shapes are not read
// again; they have the tokens of a step that reads all.
TEST(CudaSampling, PlainRowsNeedNoMoreThanUnits) {
  for (const size_t vocab : {1, 15, 16, 17, 1000, 4099, 40000, 151936, 600000}) {
    Batch b(vocab), mixed(vocab), odd(vocab);
    for (size_t r = 0; r < (vocab > 100000 ? 4 : 40); ++r) {
      std::vector<float> logits = normal_floats(vocab, static_cast<uint32_t>(100 + r), 4);
      SamplingRow row;
      row.temperature = std::array{0.0f, 0.6f, 1.0f, 30.0f}[r % 4];
      row.seed = 5 * r;
      row.position = static_cast<int32_t>(r);
      b.add(logits, row);
      if (r % 2 == 0) row.num_logprobs = 0;
      mixed.add(logits, row);
      row.num_logprobs = -1;
      if (r % 3 == 1) logits[r % vocab] = NAN;
      if (r % 3 == 2) std::fill_n(logits.begin(), vocab / 2, -kInf);
      if (r % 8 == 5) std::fill(logits.begin(), logits.end(), -kInf);
      if (r % 8 == 6) logits[vocab / 2] = kInf;
      odd.add(logits, row);
    }
    EXPECT_EQ(sample_summed_up(odd, 0, true).ids, sample(odd).ids) << vocab;
    const std::vector<int32_t> ids = sample_summed_up(b, 0, true).ids;
    expect_tokens(b, ids);
    EXPECT_EQ(ids, sample(b).ids) << vocab;
    EXPECT_EQ(ids, sample(b, 0, true).ids) << vocab;
    EXPECT_EQ(ids, sample_summed_up(b, 0, false).ids) << vocab;
    const Result scored = sample(mixed), summed_up = sample_summed_up(mixed, 0, false);
    EXPECT_EQ(ids, summed_up.ids) << vocab;
    EXPECT_EQ(scored.ranks, summed_up.ranks) << vocab;
    for (size_t r = 0; r < ids.size(); r += 2)
      EXPECT_EQ(scored.logprobs[r], summed_up.logprobs[r]) << vocab << " " << r;
  }
}

// The tokens that are kept, listed and not: at the ends of a bin, as many as a list holds and one
// more, all of them equal.
TEST(CudaSampling, ListsEndWhereTheyShould) {
  const size_t vocab = 6000;
  Batch b(vocab);
  const std::vector<float> spread = normal_floats(vocab, 77, 3);
  std::vector<float> steps(vocab), two(vocab, -20.0f), few(vocab, -INFINITY);
  for (size_t i = 0; i < vocab; ++i) steps[i] = -static_cast<float>(i * 7919 % vocab) / 64;
  for (size_t i = 0; i < 2049; ++i) two[(i * 7) % vocab] = 1;
  for (size_t i = 0; i < 5; ++i) few[1000 * i + 7] = static_cast<float>(i);
  for (const std::vector<float>& logits : {spread, steps, two, few})
    for (const int32_t k : {1, 2, 5, 2047, 2048, 2049, 5999})
      for (const float p : {1.0f, 0.999f, 0.5f, 0.0f})
        for (const float min_p : {0.0f, 1e-3f, 0.5f, 1.0f}) {
          SamplingRow row;
          row.top_k = k == 5999 ? 0 : k;
          row.top_p = p;
          row.min_p = min_p;
          row.seed = 5;
          row.position = static_cast<int32_t>(b.rows.size());
          b.add(logits, row);
        }
  expect_tokens(b, sample(b).ids);
}

TEST(CudaSampling, DrawsAsPhiloxSays) {
  Batch b(3000);
  const std::vector<float> logits = normal_floats(b.vocab, 6, 3);
  for (int32_t i = 0; i < 300; ++i) {
    SamplingRow row;
    row.seed = 1234567890123ull;
    row.choice = static_cast<uint32_t>(i % 3);
    row.position = i;
    b.add(logits, row);
  }
  expect_tokens(b, sample(b).ids);
}

TEST(CudaSampling, TokensComeAsOftenAsTheyAreLikely) {
  struct Cut {
    int32_t k;
    float p, min_p, temperature;
  };
  for (const size_t vocab : {size_t{40}, size_t{1100}}) {
    const std::vector<float> logits = normal_floats(vocab, 4, 2);
    for (const Cut& c : {Cut{0, 1, 0, 1}, Cut{5, 1, 0, 1}, Cut{0, 0.6f, 0, 1}, Cut{0, 1, 0.2f, 1},
                         Cut{12, 0.8f, 0, 1.5f}, Cut{12, 0.9f, 0.15f, 0.7f}, Cut{1, 1, 0, 1},
                         Cut{0, 0, 0, 1}, Cut{9, 1, 0, 0.5f}}) {
      SamplingRow row;
      row.top_k = c.k;
      row.top_p = c.p;
      row.min_p = c.min_p;
      row.temperature = c.temperature;
      row.seed = 99;
      const int draws = 4000;
      Batch b(vocab);
      for (int i = 0; i < draws; ++i) {
        row.position = i;
        b.add(logits, row);
      }
      std::map<int32_t, int> got;
      for (const int32_t id : sample(b).ids) ++got[id];
      const Distribution d = distribution(logits, row);
      for (const auto& [id, n] : got)
        EXPECT_GT(d.mass[static_cast<size_t>(id)], 0) << id << " of k " << c.k << " p " << c.p;
      double chi = 0;
      int freedom = 0;
      for (size_t i = 0; i < vocab; ++i) {
        const double expected = d.mass[i] / d.total * draws;
        if (expected < 10) continue;  // too few for chi-square
        const double n = got[static_cast<int32_t>(i)];
        chi += (n - expected) * (n - expected) / expected;
        ++freedom;
      }
      EXPECT_GT(freedom, 0);
      EXPECT_LT(chi, freedom + 5 * std::sqrt(2.0 * freedom) + 10) << "k " << c.k << " p " << c.p;
    }
  }
}

// More equal, or nearly equal, tokens than are sorted at once.
TEST(CudaSampling, CutsAmongManyEqualTokensKeepTheLowestIds) {
  for (const size_t vocab : {size_t{50}, size_t{5000}, size_t{151936}}) {
    Batch b(vocab);
    const std::vector<float> equal(vocab, 1.5f);
    for (int32_t i = 0; i < 40; ++i) {
      SamplingRow row;
      row.position = i;
      row.top_k = 3;
      b.add(equal, row);
      row.top_k = 0;
      row.top_p = 0.5f;
      b.add(equal, row);
    }
    const std::vector<int32_t> ids = sample(b).ids;
    std::set<int32_t> of_three;
    for (size_t i = 0; i < ids.size(); i += 2) {
      of_three.insert(ids[i]);
      EXPECT_LT(ids[i + 1], static_cast<int32_t>(vocab / 2));
    }
    EXPECT_EQ(of_three, (std::set<int32_t>{0, 1, 2}));
  }
}

TEST(CudaSampling, CutsAmongManyNearlyEqualTokens) {
  const size_t vocab = 40000;
  Batch b(vocab);
  std::mt19937 rng(8);
  for (int32_t i = 0; i < 60; ++i) {
    std::vector<float> logits(vocab);
    for (float& v : logits)  // a few thousand values in a bin, most of them several times
      v = (i % 3 == 0 ? -1.0f : 1.0f) + static_cast<float>(rng() % 6000) * 1e-6f;
    if (i % 4 == 0) logits[777] = 3;
    if (i % 5 == 0) std::fill(logits.begin() + 100, logits.begin() + 30000, 1.0001f);
    SamplingRow row;
    row.position = i;
    const std::vector<int32_t> ks = {0, 1000, 2500, 30000};
    row.top_k = ks[rng() % ks.size()];
    row.top_p = row.top_k == 0 || i % 2 == 0 ? 0.3f : 1;
    b.add(logits, row);
  }
  expect_tokens(b, sample(b).ids);
  for (SamplingRow& row : b.rows) {  // the last token that is kept, exactly
    row.top_p = 1;
    row.top_k = 2100;
    row.num_logprobs = 2100;
  }
  const Result r = sample(b, 2100);
  for (size_t i = 0; i < b.rows.size(); ++i) {
    const std::vector<size_t> order = by_likelihood(b.logits_of(i));
    for (size_t j = 0; j < 2100; ++j)
      ASSERT_EQ(r.top_ids[i * 2100 + j], static_cast<int32_t>(order[j])) << i << " " << j;
    const auto kept_end = order.begin() + 2100;
    EXPECT_NE(std::find(order.begin(), kept_end, static_cast<size_t>(r.ids[i])), kept_end);
  }
}

// Against a row's raw logits in double.
void expect_scores(const std::vector<float>& raw, const SamplingRow& row, const Result& r,
                   size_t at, size_t max_logprobs) {
  std::vector<float> z = raw;
  for (float& v : z) v = clean(v);
  const std::vector<size_t> order = by_likelihood(z);
  const auto best = static_cast<double>(z[order[0]]);
  double sum = 0;
  for (const float v : z) sum += std::exp(static_cast<double>(v) - best);
  const auto logprob = [&](size_t id) { return static_cast<double>(z[id]) - best - std::log(sum); };
  const auto expect_logprob = [&](float got, size_t id) {
    if (z[id] == -kInf) {
      EXPECT_EQ(got, -kInf);
    } else {
      EXPECT_NEAR(static_cast<double>(got), logprob(id), 1e-5) << id;
    }
  };
  const auto id = static_cast<size_t>(r.ids[at]);
  expect_logprob(r.logprobs[at], id);
  EXPECT_EQ(r.ranks[at], 1 + std::count_if(z.begin(), z.end(), [&](float v) { return v > z[id]; }));
  const size_t wanted = std::min(static_cast<size_t>(std::max(row.num_logprobs, 0)), max_logprobs);
  for (size_t i = 0; i < max_logprobs; ++i) {
    const int32_t top_id = r.top_ids[at * max_logprobs + i];
    const float top_logprob = r.top_logprobs[at * max_logprobs + i];
    if (i >= wanted) {
      EXPECT_TRUE(std::isnan(top_logprob)) << "written, but not asked for";
    } else if (i >= z.size()) {
      EXPECT_EQ(top_id, -1);
      EXPECT_EQ(top_logprob, -kInf);
    } else {
      ASSERT_EQ(top_id, static_cast<int32_t>(order[i])) << i << " of " << z.size();
      expect_logprob(top_logprob, order[i]);
    }
  }
}

TEST(CudaSampling, LogprobsRanksAndTopTokensAreRaw) {
  const size_t max_logprobs = 24;
  for (const size_t vocab :
       {size_t{1}, size_t{2}, size_t{31}, size_t{1000}, size_t{32000}, size_t{151936}}) {
    Batch b = random_batch(vocab, 24, 100 + static_cast<uint32_t>(vocab));
    const std::vector<int32_t> wanted = {-1, 0, 1, 5, 20, 24, 1000};
    for (size_t i = 0; i < b.rows.size(); ++i) {
      b.rows[i].num_logprobs = wanted[i % wanted.size()];
      if (i % 3 == 0) b.rows[i].target = static_cast<int32_t>((i * 7919) % vocab);
      for (size_t j = 0; j < vocab && i % 8 == 1; ++j)  // fewer finite ones than are wanted
        b.logits[i * vocab + j] = j % 7 == 0 && j < 50 ? b.logits[i * vocab + j] : -kInf;
    }
    const Result r = sample(b, static_cast<int32_t>(max_logprobs));
    for (size_t i = 0; i < b.rows.size(); ++i) {
      const SamplingRow& row = b.rows[i];
      if (row.target >= 0) {
        EXPECT_EQ(r.ids[i], row.target);
      }
      if (row.num_logprobs >= 0 || row.target >= 0) {
        expect_scores(b.logits_of(i), row, r, i, max_logprobs);
      } else {
        EXPECT_TRUE(std::isnan(r.logprobs[i])) << "written, but not asked for";
        EXPECT_EQ(r.ranks[i], -1);
        for (size_t j = 0; j < max_logprobs; ++j)
          EXPECT_TRUE(std::isnan(r.top_logprobs[i * max_logprobs + j]));
      }
    }
  }
}

TEST(CudaSampling, TopTokensMayBeTheWholeVocabulary) {
  for (const size_t vocab : {size_t{2048}, size_t{2049}, size_t{7001}}) {
    Batch b(vocab);
    std::vector<float> logits = normal_floats(vocab, 12, 20);
    for (size_t i = 0; i < 3000 && i < vocab; i += 2) logits[i] = 0.25f;  // ties across the rounds
    logits[5] = NAN;
    logits[vocab - 3] = -kInf;
    SamplingRow row;
    row.num_logprobs = static_cast<int32_t>(vocab);
    b.add(logits, row);
    std::fill(logits.begin(), logits.end(), -kInf);
    b.add(logits, row);
    const Result r = sample(b, row.num_logprobs);
    expect_scores(b.logits_of(0), row, r, 0, vocab);
    EXPECT_EQ(r.ids[1], 0);
    EXPECT_EQ(r.logprobs[1], -kInf);
    for (size_t i = 0; i < vocab; ++i) ASSERT_EQ(r.top_ids[vocab + i], static_cast<int32_t>(i));
  }
}

TEST(CudaSampling, InfiniteLogitsHaveAllTheProbability) {
  std::vector<float> logits = normal_floats(3000, 3);
  logits[2000] = logits[1000] = kInf;
  Batch b(logits.size());
  SamplingRow row;
  row.num_logprobs = 3;
  b.add(logits, row);
  const Result r = sample(b, 3);
  EXPECT_EQ(r.ids[0], 1000);
  EXPECT_EQ(r.ranks[0], 1);
  EXPECT_EQ(r.logprobs[0], 0);
  EXPECT_EQ(r.top_ids[0], 1000);
  EXPECT_EQ(r.top_ids[1], 2000);
  EXPECT_EQ(r.top_logprobs[1], 0);
  EXPECT_EQ(r.top_logprobs[2], -kInf);
}

TEST(CudaSampling, BiasesOfATokenAddInTheirOrder) {
  Batch b(700);
  const std::vector<float> logits(b.vocab, 0.0f);
  SamplingRow row = greedy();
  b.set_biases(row, {{600, 1e8f}, {5, 0.5f}, {600, -1e8f}, {600, 1}});
  b.add(logits, row);
  b.set_biases(row, {{600, 1}, {5, 0.5f}, {600, 1e8f}, {600, -1e8f}});  // the 1 is rounded away
  b.add(logits, row);
  b.set_biases(row, {{600, 1}, {5, 0.5f}, {600, -kInf}});
  b.add(logits, row);
  const std::vector<int32_t> ids = sample(b).ids;
  EXPECT_EQ(ids, (std::vector<int32_t>{600, 5, 5}));
}

TEST(CudaSampling, AMaskOfOneTokenLeavesIt) {
  for (const size_t vocab : {size_t{31}, size_t{32}, size_t{5003}, size_t{151936}}) {
    Batch b(vocab);
    for (int32_t i = 0; i < 6; ++i) {
      SamplingRow row = i % 2 == 0 ? greedy() : SamplingRow{};
      row.top_k = i > 1 ? 20 : 0;
      row.top_p = i > 3 ? 0.8f : 1;
      b.set_mask(row, {static_cast<int32_t>(vocab) - 1 - i});
      b.add(normal_floats(vocab, 40 + static_cast<uint32_t>(i)), row);
    }
    const std::vector<int32_t> ids = sample(b).ids;
    for (int32_t i = 0; i < 6; ++i)
      EXPECT_EQ(ids[static_cast<size_t>(i)], static_cast<int32_t>(vocab) - 1 - i);
  }
}

TEST(CudaSampling, WhereEverythingIsBannedTheBestThatTheMaskAllowsIsTaken) {
  Batch b(4);
  for (SamplingRow row : {greedy(), SamplingRow{}}) {
    row.top_p = 0.9f;
    row.top_k = 2;
    b.set_mask(row, {0, 2, 3});
    b.set_biases(row, {{0, -kInf}, {2, -kInf}, {3, -kInf}});
    b.add({1, 5, 3, 4}, row);
    b.add({-kInf, 5, -kInf, NAN}, row);
    SamplingRow no_mask = row;
    no_mask.mask_row = -1;
    no_mask.bias_end = no_mask.bias_begin;
    b.add({NAN, -kInf, NAN, NAN}, no_mask);
    b.set_mask(row, {});
    b.add({1, 5, 3, 4}, row);
    b.set_mask(row, {2, 3});
    b.add({1, NAN, -kInf, -kInf}, row);
  }
  EXPECT_EQ(sample(b).ids, (std::vector<int32_t>{3, 0, 0, 0, 2, 3, 0, 0, 0, 2}));
}

TEST(CudaSampling, NanIsNeverDrawn) {
  Batch b(100);
  for (int32_t i = 0; i < 60; ++i) {
    std::vector<float> logits = normal_floats(b.vocab, static_cast<uint32_t>(i), 2);
    for (size_t j = 0; j < b.vocab; j += 2) logits[j] = NAN;
    SamplingRow row;
    row.position = i;
    row.top_k = i % 3 == 1 ? 60 : 0;
    row.top_p = i % 3 == 2 ? 0.99f : 1;
    b.add(logits, row);
  }
  for (const int32_t id : sample(b).ids) EXPECT_EQ(id % 2, 1);
}

template <typename T>
bool same_bits(const std::vector<T>& part, const std::vector<T>& all, size_t from) {
  return std::memcmp(part.data(), all.data() + from, part.size() * sizeof(T)) == 0;
}

TEST(CudaSampling, ARowsBitsDoNotDependOnTheOthers) {
  for (const size_t vocab : {size_t{997}, size_t{32000}}) {
    Batch b = random_batch(vocab, 300, 77);
    for (size_t i = 0; i < b.rows.size(); ++i) {
      b.rows[i].num_logprobs = static_cast<int32_t>(i % 7) - 1;
      if (i % 11 == 3) b.rows[i].target = static_cast<int32_t>(i);
    }
    const Result all = sample(b, 5), again = sample(b, 5);
    EXPECT_TRUE(same_bits(again.ids, all.ids, 0));
    EXPECT_TRUE(same_bits(again.logprobs, all.logprobs, 0));
    for (size_t i = 0; i < b.rows.size(); i += 9) {
      const Result one = sample(b.alone(i), 5);
      EXPECT_TRUE(same_bits(one.ids, all.ids, i)) << i;
      EXPECT_TRUE(same_bits(one.ranks, all.ranks, i)) << i;
      EXPECT_TRUE(same_bits(one.logprobs, all.logprobs, i)) << i;
      EXPECT_TRUE(same_bits(one.top_ids, all.top_ids, 5 * i)) << i;
      EXPECT_TRUE(same_bits(one.top_logprobs, all.top_logprobs, 5 * i)) << i;
    }
  }
}

TEST(CudaSampling, RowsBeyondTheStepsAreLeftAlone) {
  const Batch b = random_batch(500, 9, 31);
  DeviceBatch device(b, 4);
  device.set_rows(b.rows, 2 + 5);  // two come before
  device.launch();
  const Result r = device.read();
  EXPECT_TRUE(std::all_of(r.ids.begin(), r.ids.begin() + 5, [](int32_t id) { return id >= 0; }));
  EXPECT_TRUE(std::all_of(r.ids.begin() + 5, r.ids.end(), [](int32_t id) { return id == -1; }));
}

// What changes from step to step is read on the device: parameters and the number of rows.
TEST(CudaSampling, ACapturedGraphFollowsItsInputs) {
  Batch b = random_batch(5000, 12, 51);
  for (size_t i = 0; i < b.rows.size(); ++i) b.rows[i].num_logprobs = static_cast<int32_t>(i % 4);
  DeviceBatch device(b, 3);
  cudaStream_t stream = nullptr;
  check_device(cudaStreamCreate(&stream));
  check_device(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  device.launch(stream);
  cudaGraph_t graph = nullptr;
  check_device(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t exec = nullptr;
  check_device(cudaGraphInstantiate(&exec, graph, 0));
  Batch other = b;
  std::rotate(other.rows.begin(), other.rows.begin() + 5, other.rows.end());
  for (const Batch* each : {&b, &other}) {
    const Result want = sample(*each, 3);
    device.poison();
    device.set_rows(each->rows, 2 + 12);
    check_device(cudaDeviceSynchronize());
    check_device(cudaGraphLaunch(exec, stream));
    check_device(cudaStreamSynchronize(stream));
    const Result got = device.read();
    EXPECT_EQ(got.ids, want.ids);
    EXPECT_EQ(got.ranks, want.ranks);
    EXPECT_TRUE(same_bits(got.top_logprobs, want.top_logprobs, 0));
  }
  check_device(cudaGraphExecDestroy(exec));
  check_device(cudaGraphDestroy(graph));
  check_device(cudaStreamDestroy(stream));
}

TEST(CudaSampling, WrongArgumentsAreRefused) {
  DeviceArray<float> logits(8);
  DeviceArray<int32_t> ids(1);
  DeviceArray<StepInputs> step(1);
  DeviceBytes workspace(cuda::sample_workspace_bytes(1, 8));
  const auto call = [&](int64_t rows, int64_t vocab, int32_t first, const SampleOutputs& out) {
    cuda::sample(logits.data(), 8, rows, vocab, step.data(), first, false, false, out,
                 workspace.data(), nullptr);
  };
  SampleOutputs out;
  EXPECT_THROW(call(1, 8, 0, out), std::invalid_argument);  // no token_ids
  out.token_ids = ids.data();
  EXPECT_THROW(call(1, 0, 0, out), std::invalid_argument);
  EXPECT_THROW(call(1, int64_t{1} << 31, 0, out), std::invalid_argument);
  EXPECT_THROW(call(-1, 8, 0, out), std::invalid_argument);
  EXPECT_THROW(call(1, 8, -1, out), std::invalid_argument);
  out.max_logprobs = 2;
  EXPECT_THROW(call(1, 8, 0, out), std::invalid_argument);  // no top_ids
  out.max_logprobs = 0;
  EXPECT_NO_THROW(call(0, 8, 0, out));
}

}  // namespace
}  // namespace ni::test
