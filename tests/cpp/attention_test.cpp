// Attention over the paged cache: against double precision, and promise 1: the same bits whatever
// the chunks, the neighbours, the threads and the block size.
#include "reference.h"

namespace ni::test {
namespace {

struct Model {
  int32_t heads, kv_heads, head_dim, window;
  int32_t cols() const { return (heads + 2 * kv_heads) * head_dim; }
};

// One sequence: its rows of qkv and how many are already in the cache.
struct Sequence {
  std::vector<float> qkv;  // [tokens, cols]
  int32_t tokens = 0, done = 0;
};

Sequence random_sequence(const Model& m, int32_t tokens, uint32_t seed) {
  return {random_floats(static_cast<size_t>(tokens * m.cols()), seed), tokens, 0};
}

// A paged cache for a few sequences, full of NaN, blocks handed out in a shuffled order and with
// room between them, as in a cache of several layers.
class Cache {
 public:
  Cache(const Model& m, DType dtype, int32_t block_size, int32_t max_seqs, int32_t max_tokens) {
    stride_ = (max_tokens + block_size - 1) / block_size;
    view_ = {nullptr, nullptr, dtype, max_seqs * stride_, block_size, m.kv_heads, m.head_dim};
    view_.block_stride = 3 * view_.block_elements();
    const auto elements = static_cast<size_t>(view_.num_blocks * view_.block_stride);
    k_ = v_ = encode(std::vector<float>(elements, NAN), dtype);
    view_.k = k_.data();
    view_.v = v_.data();
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
  std::vector<char> k_, v_;
  int32_t stride_;
  std::vector<int32_t> table_;
};

// One step: `counts[i]` further tokens of sequence i; their attention rows are appended to out[i].
void step(CpuBackend& backend, const Model& m, Cache& cache, std::vector<Sequence>& seqs,
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
  backend.attention(qkv.tensor(), in, {m.heads, scale, m.window}, cache.view(), result.tensor());
  ASSERT_TRUE(result.intact() && qkv.intact());
  for (size_t s = 0; s < seqs.size(); ++s)
    for (int32_t r = starts[s]; r < starts[s + 1]; ++r)
      out[s].insert(out[s].end(), result.row(r), result.row(r) + m.heads * m.head_dim);
}

// The whole sequence alone, in chunks of the given sizes (the last one repeats).
std::vector<float> run_alone(const std::string& isa, const Model& m, DType dtype,
                             int32_t block_size, Sequence seq, const std::vector<int32_t>& chunks,
                             int threads = 2) {
  const auto backend = make_cpu(isa, threads);
  Cache cache(m, dtype, block_size, 1, seq.tokens);
  std::vector<Sequence> seqs{std::move(seq)};
  std::vector<std::vector<float>> out(1);
  for (size_t i = 0; seqs[0].done < seqs[0].tokens; ++i)
    step(*backend, m, cache, seqs,
         {std::min(chunks[std::min(i, chunks.size() - 1)], seqs[0].tokens - seqs[0].done)}, out);
  return out[0];
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class AttentionTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, testing::ValuesIn(isas()),
                         [](const testing::TestParamInfo<std::string>& info) {
                           return info.param;
                         });

constexpr Model kModels[] = {{4, 2, 64, 0},  {3, 3, 10, 0}, {14, 2, 16, 0}, {7, 1, 80, 0},
                             {4, 2, 32, 37}, {2, 1, 6, 5},  {26, 2, 16, 64}};
constexpr DType kCacheTypes[] = {DType::f32, DType::bf16, DType::f16};

TEST_P(AttentionTest, MatchesDouble) {
  for (const Model& m : kModels) {
    for (const DType dtype : kCacheTypes) {
      const int32_t tokens = 150, d = m.head_dim;
      const Sequence seq = random_sequence(m, tokens, 1);
      const auto out = run_alone(GetParam(), m, dtype, 16, seq, {tokens});
      for (int32_t h = 0; h < m.heads; ++h) {
        const int32_t kv_head = h / (m.heads / m.kv_heads);
        std::vector<std::vector<float>> k, v;
        for (int32_t t = 0; t < tokens; ++t) {
          const float* row = seq.qkv.data() + t * m.cols() + (m.heads + kv_head) * d;
          k.emplace_back(row, row + d);
          v.emplace_back(row + m.kv_heads * d, row + (m.kv_heads + 1) * d);
          for (float& x : k.back()) x = rounded(x, dtype);
          for (float& x : v.back()) x = rounded(x, dtype);
        }
        for (int32_t t = 0; t < tokens; ++t) {
          const int begin = m.window > 0 ? std::max(0, t - m.window + 1) : 0;
          const double scale = static_cast<double>(1 / std::sqrt(static_cast<float>(d)));
          const auto want =
              attend(seq.qkv.data() + t * m.cols() + h * d, k, v, begin, t + 1, scale);
          for (int32_t i = 0; i < d; ++i)
            expect_close(out[static_cast<size_t>((t * m.heads + h) * d + i)],
                         want[static_cast<size_t>(i)],
                         testing::PrintToString(std::vector{t, h, i, m.heads, d}));
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_P(AttentionTest, ChunksThreadsAndBlockSizesLeaveTheBits) {
  for (const Model& m : kModels) {
    const DType dtype = kCacheTypes[m.heads % 3];
    const Sequence seq = random_sequence(m, 203, 2);
    const auto whole = run_alone(GetParam(), m, dtype, 16, seq, {203});
    EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, 16, seq, {1})))
        << "token by token";
    EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, 16, seq, {5, 64, 1, 33})))
        << "chunks";
    EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, 16, seq, {150, 1}, 3)))
        << "threads";
    EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, 16, seq, {203}, 1)))
        << "one thread";
    for (const int32_t block_size : {1, 2, 4, 8, 32, 48, 256})
      EXPECT_TRUE(same_bits(whole, run_alone(GetParam(), m, dtype, block_size, seq, {100, 50, 1})))
          << block_size;
  }
}

// A sequence in a changing batch gives the bits it gives alone.
TEST_P(AttentionTest, NeighboursLeaveTheBits) {
  for (const Model& m : kModels) {
    const auto backend = make_cpu(GetParam());
    std::vector<Sequence> seqs;
    for (uint32_t s = 0; s < 5; ++s)
      seqs.push_back(random_sequence(m, 90 + 17 * static_cast<int32_t>(s), s));
    const auto alone = seqs;
    Cache cache(m, DType::bf16, 16, 5, 200);
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
      step(*backend, m, cache, seqs, counts, out);
    }
    for (size_t s = 0; s < 5; ++s)
      EXPECT_TRUE(same_bits(
          out[s], run_alone(GetParam(), m, DType::bf16, 16, alone[s], {alone[s].tokens})));
  }
}

// The inverse: a key at a place that is seen does change the result.
TEST_P(AttentionTest, EverySeenTokenMatters) {
  const Model m{2, 1, 16, 40};
  const Sequence seq = random_sequence(m, 100, 4);
  const auto base = run_alone(GetParam(), m, DType::f32, 16, seq, {100});
  for (const int32_t changed : {0, 30, 60, 99}) {
    Sequence other = seq;
    for (int32_t c = 0; c < m.head_dim; ++c)
      other.qkv[static_cast<size_t>(changed * m.cols() + 3 * m.head_dim + c)] += 1;
    const auto out = run_alone(GetParam(), m, DType::f32, 16, other, {100});
    for (int32_t t = 0; t < 100; ++t) {
      const bool sees = t >= changed && t - changed < m.window;
      const auto at = static_cast<size_t>(t * 32);
      EXPECT_EQ(std::memcmp(&base[at], &out[at], 128) != 0, sees) << changed << " " << t;
    }
  }
}

TEST_P(AttentionTest, WrongTablesThrow) {
  const Model m{2, 1, 16, 0};
  const auto backend = make_cpu(GetParam());
  Cache cache(m, DType::f32, 16, 1, 32);
  Guarded qkv(1, m.cols(), random_floats(64, 1)), out(1, 32);
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
    backend->attention(qkv.tensor(), in, {2, 1, 0}, cache.view(), out.tensor());
  };
  EXPECT_THROW(backend->rope_kv_write(qkv.tensor(), in, {}, cache.view()), std::invalid_argument);
  contexts[0] = 33;  // more blocks than the table has
  EXPECT_THROW(attend(), std::invalid_argument);
  contexts[0] = 0;
  EXPECT_THROW(attend(), std::invalid_argument);
  contexts[0] = 20;
  table[1] = 2;
  EXPECT_THROW(attend(), std::invalid_argument);
  table[1] = 1;
  starts[1] = 2;
  EXPECT_THROW(attend(), std::invalid_argument);
  KvView odd = cache.view();
  odd.block_size = 12;
  EXPECT_THROW(backend->attention(qkv.tensor(), in, {2, 1, 0}, odd, out.tensor()),
               std::invalid_argument);
}

}  // namespace
}  // namespace ni::test
