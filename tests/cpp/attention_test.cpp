// Attention over the paged cache: against double precision, and promise 1: the same bits whatever
// the chunks, the neighbours, the threads and the block size. On every device of this machine.
#include "reference.h"

namespace ni::test {
namespace {

struct Model {
  int32_t heads, kv_heads, head_dim, window;
  float softcap = 0;
  int32_t cols() const { return (heads + 2 * kv_heads) * head_dim; }
};

// One sequence: its rows of qkv and how many are already in the cache.
struct Sequence {
  std::vector<float> qkv;  // [tokens, cols]
  int32_t tokens = 0, done = 0;
};

Sequence random_sequence(const std::string& device, const Model& m, int32_t tokens, uint32_t seed) {
  const auto values = random_floats(static_cast<size_t>(tokens * m.cols()), seed);
  return {rounded(values, activation_type(device)), tokens, 0};
}

// Powers of two, so that scaling leaves the mantissas.
constexpr float kKScale = 0.5f, kVScale = 2.0f;

// A paged cache for a few sequences, full of NaN, blocks handed out in a shuffled order and with
// room between them, as in a cache of several layers.
class Cache {
 public:
  Cache(Backend& backend, const Model& m, DType dtype, int32_t block_size, int32_t max_seqs,
        int32_t max_tokens) {
    stride_ = (max_tokens + block_size - 1) / block_size;
    view_ = {nullptr, nullptr, dtype, max_seqs * stride_, block_size, m.kv_heads, m.head_dim};
    view_.block_stride = 3 * view_.block_elements();
    view_.k_tile = backend.info().k_tile;
    if (dtype == DType::fp8_e4m3) view_.k_scale = kKScale, view_.v_scale = kVScale;
    const auto elements = static_cast<size_t>(view_.num_blocks * view_.block_stride);
    const auto poison = encode(std::vector<float>(elements, NAN), dtype);
    k_ = std::make_unique<BackendBytes>(backend, poison);
    v_ = std::make_unique<BackendBytes>(backend, poison);
    view_.k = k_->data();
    view_.v = v_->data();
    for (int32_t b = 0; b < view_.num_blocks; ++b) table_.push_back(b);
    std::shuffle(table_.begin(), table_.end(), std::mt19937(11));
  }
  const KvView& view() const { return view_; }
  int32_t stride() const { return stride_; }
  const int32_t* table(size_t seq) const {
    return table_.data() + static_cast<int32_t>(seq) * stride_;
  }

 private:
  KvView view_;
  std::unique_ptr<BackendBytes> k_, v_;
  int32_t stride_;
  std::vector<int32_t> table_;
};

// One step: `counts[i]` further tokens of sequence i; their attention rows are appended to out[i].
void step(Backend& backend, const Model& m, Cache& cache, std::vector<Sequence>& seqs,
          const std::vector<int32_t>& counts, std::vector<std::vector<float>>& out) {
  std::vector<float> rows;
  std::vector<int32_t> positions, starts{0}, contexts, tables;
  std::vector<int64_t> slots;
  const int32_t bs = cache.view().block_size;
  for (size_t s = 0; s < seqs.size(); ++s) {
    Sequence& q = seqs[s];
    const auto from = q.qkv.begin() + q.done * m.cols();
    rows.insert(rows.end(), from, from + counts[s] * m.cols());
    for (int32_t i = 0; i < counts[s]; ++i, ++q.done) {
      positions.push_back(q.done);
      slots.push_back(int64_t{cache.table(s)[q.done / bs]} * bs + q.done % bs);
    }
    starts.push_back(starts.back() + counts[s]);
    contexts.push_back(q.done);
    tables.insert(tables.end(), cache.table(s), cache.table(s) + cache.stride());
  }
  StepInputs in;
  in.num_tokens = starts.back();
  in.num_seqs = static_cast<int32_t>(seqs.size());
  in.positions = positions.data();
  in.slot_mapping = slots.data();
  in.cu_seqlens_q = starts.data();
  in.context_lens = contexts.data();
  in.block_tables = tables.data();
  in.block_table_stride = cache.stride();
  Guarded qkv(in.num_tokens, m.cols(), rows), result(in.num_tokens, m.heads * m.head_dim);
  backend.rope_kv_write(qkv.tensor(), in, {}, cache.view());
  const float scale = 1 / std::sqrt(static_cast<float>(m.head_dim));
  backend.attention(qkv.tensor(), in, {m.heads, scale, m.window, m.softcap}, cache.view(),
                    result.tensor());
  ASSERT_TRUE(result.intact() && qkv.intact());
  for (size_t s = 0; s < seqs.size(); ++s)
    for (int32_t r = starts[s]; r < starts[s + 1]; ++r)
      out[s].insert(out[s].end(), result.row(r), result.row(r) + m.heads * m.head_dim);
}

// The whole sequence alone, in chunks of the given sizes (the last one repeats).
std::vector<float> run_alone(const std::string& device, const Model& m, DType dtype,
                             int32_t block_size, Sequence seq, const std::vector<int32_t>& chunks,
                             int threads = 2) {
  Backend& backend = shared_device(device, threads);
  Cache cache(backend, m, dtype, block_size, 1, seq.tokens);
  std::vector<Sequence> seqs{std::move(seq)};
  std::vector<std::vector<float>> out(1);
  for (size_t i = 0; seqs[0].done < seqs[0].tokens; ++i)
    step(backend, m, cache, seqs,
         {std::min(chunks[std::min(i, chunks.size() - 1)], seqs[0].tokens - seqs[0].done)}, out);
  return out[0];
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class AttentionTest : public testing::TestWithParam<std::string> {
 protected:
  // A card's kernels know four head sizes.
  const std::vector<Model>& models() const {
    static const std::vector<Model> any{{4, 2, 64, 0},  {3, 3, 10, 0},  {14, 2, 16, 0},
                                        {7, 1, 80, 0},  {4, 2, 32, 37}, {2, 1, 6, 5},
                                        {26, 2, 16, 64}};
    static const std::vector<Model> cuda{
        {4, 2, 64, 0},    {3, 3, 96, 0},         {14, 2, 64, 0},
        {7, 1, 128, 0},   {4, 2, 64, 37},        {2, 1, 256, 5},
        {26, 2, 128, 64}, {4, 2, 128, 0, 20.0f}, {2, 1, 64, 30, 5.0f}};
    return on_cuda(GetParam()) ? cuda : any;
  }
  const std::vector<int32_t>& block_sizes() const {
    static const std::vector<int32_t> any{1, 2, 4, 8, 32, 48, 256}, cuda{32, 48, 64, 256};
    return on_cuda(GetParam()) ? cuda : any;
  }
  Sequence sequence(const Model& m, int32_t tokens, uint32_t seed) const {
    return random_sequence(GetParam(), m, tokens, seed);
  }
  DType cache_type(size_t i) const {
    const auto types = cache_types(GetParam());
    return types[i % types.size()];
  }
};
INSTANTIATE_TEST_SUITE_P(Device, AttentionTest, testing::ValuesIn(device_names()), test_name);

// What comes out of the cache for a value that went in.
float stored(float v, DType dtype, float scale) {
  return dtype == DType::fp8_e4m3 ? rounded(v / scale, dtype) * scale : rounded(v, dtype);
}

TEST_P(AttentionTest, MatchesDouble) {
  const DType type = activation_type(GetParam());
  const double narrow = type == DType::f32 ? 0 : ulp(1, type) / 2;
  for (const Model& m : models()) {
    for (const DType dtype : cache_types(GetParam())) {
      const int32_t tokens = 150, d = m.head_dim;
      const Sequence seq = sequence(m, tokens, 1);
      const auto out = run_alone(GetParam(), m, dtype, 16, seq, {tokens});
      for (int32_t h = 0; h < m.heads; ++h) {
        const int32_t kv_head = h / (m.heads / m.kv_heads);
        std::vector<std::vector<float>> k, v;
        for (int32_t t = 0; t < tokens; ++t) {
          const float* row = seq.qkv.data() + t * m.cols() + (m.heads + kv_head) * d;
          k.emplace_back(row, row + d);
          v.emplace_back(row + m.kv_heads * d, row + (m.kv_heads + 1) * d);
          for (float& x : k.back()) x = stored(x, dtype, kKScale);
          for (float& x : v.back()) x = stored(x, dtype, kVScale);
        }
        for (int32_t t = 0; t < tokens; ++t) {
          const int begin = m.window > 0 ? std::max(0, t - m.window + 1) : 0;
          const double scale = static_cast<double>(1 / std::sqrt(static_cast<float>(d)));
          const auto want = attend(seq.qkv.data() + t * m.cols() + h * d, k, v, begin, t + 1, scale,
                                   static_cast<double>(m.softcap), narrow);
          for (int32_t i = 0; i < d; ++i)
            expect_close(out[static_cast<size_t>((t * m.heads + h) * d + i)],
                         want[static_cast<size_t>(i)],
                         testing::PrintToString(std::vector{t, h, i, m.heads, d}), type);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_P(AttentionTest, ChunksThreadsAndBlockSizesLeaveTheBits) {
  for (const Model& m : models()) {
    const DType dtype = cache_type(static_cast<size_t>(m.heads));
    const Sequence seq = sequence(m, 203, 2);
    const auto whole = run_alone(GetParam(), m, dtype, 16, seq, {203});
    EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, 16, seq, {1})))
        << "token by token";
    EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, 16, seq, {5, 64, 1, 33})))
        << "chunks";
    EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, 16, seq, {150, 1}, 3)))
        << "threads";
    EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, 16, seq, {203}, 1)))
        << "one thread";
    for (const int32_t block_size : block_sizes())
      EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, block_size, seq, {100, 50, 1})))
          << block_size;
  }
}

// A sequence in a changing batch gives the bits it gives alone.
TEST_P(AttentionTest, NeighboursLeaveTheBits) {
  const DType dtype = on_cuda(GetParam()) ? activation_type(GetParam()) : DType::bf16;
  for (const Model& m : models()) {
    Backend& backend = shared_device(GetParam());
    std::vector<Sequence> seqs;
    for (uint32_t s = 0; s < 5; ++s)
      seqs.push_back(sequence(m, 90 + 17 * static_cast<int32_t>(s), s));
    const auto alone = seqs;
    Cache cache(backend, m, dtype, 16, 5, 200);
    std::vector<std::vector<float>> out(5);
    std::mt19937 rng(3);
    for (bool more = true; more;) {
      std::vector<int32_t> counts;
      more = false;
      for (const Sequence& q : seqs) {
        const int32_t choice[] = {0, 1, 1, 30};
        counts.push_back(std::min(choice[rng() % 4], q.tokens - q.done));
        more = more || q.done + counts.back() < q.tokens;
      }
      step(backend, m, cache, seqs, counts, out);
    }
    for (size_t s = 0; s < 5; ++s)
      EXPECT_TRUE(
          same_bits(out[s], run_alone(GetParam(), m, dtype, 16, alone[s], {alone[s].tokens})));
  }
}

// A soft cap far above the scores changes next to nothing, a low one much; CPUs refuse it.
TEST_P(AttentionTest, SoftCap) {
  Model m{2, 1, 64, 0};
  const Sequence seq = sequence(m, 70, 5);
  const auto plain = run_alone(GetParam(), m, cache_type(0), 16, seq, {70});
  m.softcap = 1.0f;
  if (!on_cuda(GetParam())) {
    EXPECT_THROW(run_alone(GetParam(), m, cache_type(0), 16, seq, {70}), std::invalid_argument);
    return;
  }
  const auto difference = [&](float softcap) {
    m.softcap = softcap;
    const auto out = run_alone(GetParam(), m, cache_type(0), 16, seq, {70});
    double most = 0;
    for (size_t i = 0; i < out.size(); ++i)
      most = std::max(most, std::abs(static_cast<double>(out[i] - plain[i])));
    return most;
  };
  EXPECT_LT(difference(1000.0f), 0.04);
  EXPECT_GT(difference(0.5f), 0.1);
}

// The inverse: a key at a place that is seen does change the result.
TEST_P(AttentionTest, EverySeenTokenMatters) {
  const Model m{2, 1, on_cuda(GetParam()) ? 64 : 16, 40};
  const Sequence seq = sequence(m, 100, 4);
  const auto base = run_alone(GetParam(), m, cache_type(0), 16, seq, {100});
  for (const int32_t changed : {0, 30, 60, 99}) {
    Sequence other = seq;
    for (int32_t c = 0; c < m.head_dim; ++c)
      other.qkv[static_cast<size_t>(changed * m.cols() + 3 * m.head_dim + c)] += 1;
    const auto out = run_alone(GetParam(), m, cache_type(0), 16, other, {100});
    for (int32_t t = 0; t < 100; ++t) {
      const bool sees = t >= changed && t - changed < m.window;
      const auto row = static_cast<size_t>(2 * m.head_dim), at = static_cast<size_t>(t) * row;
      EXPECT_EQ(std::memcmp(&base[at], &out[at], row * sizeof(float)) != 0, sees)
          << changed << " " << t;
    }
  }
}

TEST_P(AttentionTest, WrongTablesThrow) {
  const Model m{2, 1, on_cuda(GetParam()) ? 64 : 16, 0};
  Backend& backend = shared_device(GetParam());
  Cache cache(backend, m, cache_type(0), 16, 1, 32);
  Guarded qkv(1, m.cols(), random_floats(static_cast<size_t>(m.cols()), 1)), out(1, 2 * m.head_dim);
  int32_t starts[] = {0, 1}, contexts[] = {20}, table[] = {0, 1}, positions[] = {19};
  int64_t slots[] = {35};
  StepInputs in;
  in.num_tokens = in.num_seqs = 1;
  in.positions = positions;
  in.slot_mapping = slots;
  in.cu_seqlens_q = starts;
  in.context_lens = contexts;
  in.block_tables = table;
  in.block_table_stride = 2;
  const auto attend = [&] {
    backend.attention(qkv.tensor(), in, {2, 1, 0}, cache.view(), out.tensor());
  };
  EXPECT_THROW(backend.rope_kv_write(qkv.tensor(), in, {}, cache.view()), std::invalid_argument);
  contexts[0] = 33;  // more blocks than the table has
  EXPECT_THROW(attend(), std::invalid_argument);
  contexts[0] = -1;
  EXPECT_THROW(attend(), std::invalid_argument);
  contexts[0] = 0;  // a padding row: nothing is read or written
  attend();
  EXPECT_TRUE(std::isnan(out.at(0, 0)) && out.intact());
  contexts[0] = 20;
  table[1] = 2;
  EXPECT_THROW(attend(), std::invalid_argument);
  table[1] = 1;
  starts[1] = 2;
  EXPECT_THROW(attend(), std::invalid_argument);
  KvView odd = cache.view();
  odd.block_size = 12;
  EXPECT_THROW(backend.attention(qkv.tensor(), in, {2, 1, 0}, odd, out.tensor()),
               std::invalid_argument);
}

}  // namespace
}  // namespace ni::test
