// The wgmma prefill kernel: the bits of the mma.sync kernel, whatever the shape, and double
// precision. Slots and block table entries that no token has are garbage.
#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>

#include "core/check.h"
#include "cuda/attention_plan.h"
#include "device_array.h"

namespace ni::cuda {  // attention.cuh, which only nvcc can read, has them

bool attention_prefill_sm90(const AttnParams& p, int32_t num_items, const Card& card,
                            cudaStream_t stream);
void attention_prefill_mma(const AttnParams& p, int32_t num_items, const Card& card,
                           cudaStream_t stream);

}  // namespace ni::cuda

namespace ni::test {
namespace {

struct Shape {
  int32_t heads, kv_heads, dim;
  DType dtype = DType::bf16;
  int32_t block_size = 16, window = 0;
  float softcap = 0;

  int32_t q_stride() const { return (heads + 2 * kv_heads) * dim; }
  int32_t out_stride() const { return heads * dim + 8; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(dim)); }
};

// Rounded to a 16-bit type.
std::vector<float> rounded(const std::vector<float>& v, DType dtype) {
  return decode_floats(encode_floats(v, dtype), dtype);
}

// What a whole sequence would be: q of every position, K and V of every token.
struct Sequence {
  int32_t tokens;
  std::vector<float> q;     // [tokens, heads, dim]
  std::vector<float> k, v;  // [tokens, kv_heads, dim]
};

Sequence random_sequence(const Shape& s, int32_t tokens, uint32_t seed) {
  const auto count = [&](int32_t heads) { return static_cast<size_t>(tokens * heads * s.dim); };
  return {tokens, rounded(normal_floats(count(s.heads), seed, 2), s.dtype),
          rounded(normal_floats(count(s.kv_heads), seed + 1), s.dtype),
          rounded(normal_floats(count(s.kv_heads), seed + 2), s.dtype)};
}

// The last `rows` positions of a sequence are in the step, those before them only in the cache.
struct Chunk {
  const Sequence* seq;
  int32_t rows;
};

class Step {
 public:
  Step(const Shape& shape, const std::vector<Chunk>& chunks) : shape_(shape) {
    for (const Chunk& c : chunks) {
      starts_.push_back(starts_.back() + c.rows);
      contexts_.push_back(c.seq->tokens);
      stride_ = std::max(stride_, c.seq->tokens / shape.block_size + 3);
    }
    upload_queries(chunks);
    upload_cache(chunks);
    upload_step();
  }

  using Kernel = void (*)(const cuda::AttnParams&, int32_t, const cuda::Card&, cudaStream_t);

  // [T, heads, dim]; fails if anything but that was written.
  std::vector<float> run(Kernel kernel) {
    DeviceMatrix out(rows(), shape_.out_stride(), shape_.dtype);
    cuda::AttnParams p;
    p.q = q_->data();
    p.q_stride = shape_.q_stride();
    p.out = out.data();
    p.out_stride = shape_.out_stride();
    p.dtype = shape_.dtype;
    p.kv = view_;
    p.args = {shape_.heads, shape_.scale(), shape_.window, shape_.softcap};
    p.step = step_->data();
    kernel(p, static_cast<int32_t>(items_.size()), this_card(), nullptr);
    const std::vector<float> all = out.read();
    EXPECT_TRUE(out.intact() && q_->intact() && k_->intact() && v_->intact());
    std::vector<float> result;
    const auto width = static_cast<size_t>(shape_.heads * shape_.dim);
    for (size_t row = 0; row < static_cast<size_t>(rows()); ++row) {
      const auto from = all.begin() + static_cast<int64_t>(row) * shape_.out_stride();
      result.insert(result.end(), from, from + static_cast<int64_t>(width));
      for (int32_t gap = 0; gap < 8; ++gap) EXPECT_TRUE(std::isnan(from[width + gap]));
    }
    return result;
  }

  // The rows of chunk i.
  std::vector<float> rows_of(const std::vector<float>& out, size_t i) const {
    const int64_t width = shape_.heads * shape_.dim;
    return {out.begin() + starts_[i] * width, out.begin() + starts_[i + 1] * width};
  }

 private:
  int64_t rows() const { return starts_.back(); }

  void upload_queries(const std::vector<Chunk>& chunks) {
    const int64_t width = shape_.heads * shape_.dim;
    std::vector<float> q(static_cast<size_t>(rows() * shape_.q_stride()), NAN);
    auto to = q.begin();
    for (const Chunk& c : chunks)
      for (int64_t row = c.seq->tokens - c.rows; row < c.seq->tokens; ++row) {
        std::copy_n(c.seq->q.begin() + row * width, width, to);
        to += shape_.q_stride();
      }
    q_ = std::make_unique<DeviceMatrix>(rows(), shape_.q_stride(), shape_.dtype);
    q_->fill(q);
  }

  // Blocks in a shuffled order, with room between them as in a cache of several layers.
  void upload_cache(const std::vector<Chunk>& chunks) {
    const auto seqs = static_cast<int32_t>(chunks.size());
    view_ = {nullptr,           nullptr,         shape_.dtype, seqs * stride_,
             shape_.block_size, shape_.kv_heads, shape_.dim};
    view_.k_tile = 1;
    view_.block_stride = 2 * view_.block_elements() + 8;
    table_.resize(static_cast<size_t>(view_.num_blocks));
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), std::mt19937(5));
    const int64_t elements = view_.num_blocks * view_.block_stride;
    std::vector<float> k(static_cast<size_t>(elements), NAN), v = k;
    for (int32_t i = 0; i < seqs; ++i) fill_blocks(*chunks[static_cast<size_t>(i)].seq, i, k, v);
    k_ = std::make_unique<DeviceMatrix>(view_.num_blocks, view_.block_stride, shape_.dtype);
    v_ = std::make_unique<DeviceMatrix>(view_.num_blocks, view_.block_stride, shape_.dtype);
    k_->fill(k);
    v_->fill(v);
    view_.k = k_->data();
    view_.v = v_->data();
  }

  void fill_blocks(const Sequence& seq, int32_t i, std::vector<float>& k, std::vector<float>& v) {
    int32_t* blocks = table_.data() + i * stride_;
    const int32_t used = (seq.tokens + shape_.block_size - 1) / shape_.block_size;
    for (int32_t t = 0; t < seq.tokens; ++t)
      for (int32_t h = 0; h < shape_.kv_heads; ++h) {
        const int64_t from = (int64_t{t} * shape_.kv_heads + h) * shape_.dim;
        const int64_t to =
            view_.v_offset(blocks[t / shape_.block_size], h, t % shape_.block_size, 0);
        std::copy_n(seq.k.begin() + from, shape_.dim, k.begin() + to);
        std::copy_n(seq.v.begin() + from, shape_.dim, v.begin() + to);
      }
    std::fill(blocks + used, blocks + stride_, 0x7ffffff0);
  }

  void upload_step() {
    const auto seqs = static_cast<int32_t>(contexts_.size());
    for (int32_t s = 0; s < seqs; ++s) {
      const int32_t count = starts_[static_cast<size_t>(s) + 1] - starts_[static_cast<size_t>(s)];
      for (int32_t tile = (count - 1) / cuda::kPrefillRows; tile >= 0; --tile)
        items_.push_back({s, tile});
    }
    d_starts_ = std::make_unique<DeviceArray<int32_t>>(starts_);
    d_contexts_ = std::make_unique<DeviceArray<int32_t>>(contexts_);
    d_table_ = std::make_unique<DeviceArray<int32_t>>(table_);
    d_items_ = std::make_unique<DeviceArray<AttnItem>>(items_);
    StepInputs in;
    in.num_tokens = starts_.back();
    in.num_seqs = seqs;
    in.block_table_stride = stride_;
    in.num_prefill_items = static_cast<int32_t>(items_.size());
    in.cu_seqlens_q = d_starts_->data();
    in.context_lens = d_contexts_->data();
    in.block_tables = d_table_->data();
    in.prefill_items = d_items_->data();
    step_ = std::make_unique<DeviceArray<StepInputs>>(std::vector<StepInputs>{in});
  }

  Shape shape_;
  std::vector<int32_t> starts_{0}, contexts_, table_;
  std::vector<AttnItem> items_;
  int32_t stride_ = 0;
  KvView view_;
  std::unique_ptr<DeviceMatrix> q_, k_, v_;
  std::unique_ptr<DeviceArray<int32_t>> d_starts_, d_contexts_, d_table_;
  std::unique_ptr<DeviceArray<AttnItem>> d_items_;
  std::unique_ptr<DeviceArray<StepInputs>> step_;
};

void run_wgmma(const cuda::AttnParams& p, int32_t num_items, const cuda::Card& card,
               cudaStream_t stream) {
  ASSERT_TRUE(cuda::attention_prefill_sm90(p, num_items, card, stream));
}

// The attention of one row and head in Real, from 16-bit inputs; the result is not rounded.
template <typename Real>
std::vector<Real> naive_row(const Shape& s, const Sequence& seq, int32_t position, int32_t head) {
  const int32_t begin = s.window > 0 ? std::max(0, position - s.window + 1) : 0;
  const int32_t kv_head = head / (s.heads / s.kv_heads);
  const auto at = [&](int32_t row, int32_t heads, int32_t h) {
    return (static_cast<size_t>(row) * static_cast<size_t>(heads) + static_cast<size_t>(h)) *
           static_cast<size_t>(s.dim);
  };
  const auto dim = static_cast<size_t>(s.dim);
  std::vector<Real> scores, out(dim, 0);
  for (int32_t t = begin; t <= position; ++t) {
    Real score = 0;
    for (size_t d = 0; d < dim; ++d)
      score += static_cast<Real>(seq.q[at(position, s.heads, head) + d]) *
               static_cast<Real>(seq.k[at(t, s.kv_heads, kv_head) + d]);
    score *= static_cast<Real>(s.scale());
    const auto cap = static_cast<Real>(s.softcap);
    scores.push_back(cap > 0 ? cap * std::tanh(score / cap) : score);
  }
  const Real top = *std::max_element(scores.begin(), scores.end());
  Real sum = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Real p = std::exp(scores[i] - top);
    sum += p;
    for (size_t d = 0; d < dim; ++d)
      out[d] += p * static_cast<Real>(
                        seq.v[at(begin + static_cast<int32_t>(i), s.kv_heads, kv_head) + d]);
  }
  for (Real& x : out) x /= sum;
  return out;
}

double ulp(double v, DType dtype) {
  const int bits = dtype == DType::bf16 ? 8 : 11;  // of the significand
  return std::ldexp(1.0, std::max(std::ilogb(std::max(std::abs(v), 1e-30)), -14) + 1 - bits);
}

void expect_same_bits(const std::vector<float>& a, const std::vector<float>& b,
                      const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_FALSE(std::isnan(a[i])) << what << ": element " << i;
    ASSERT_EQ(std::bit_cast<uint32_t>(a[i]), std::bit_cast<uint32_t>(b[i]))
        << what << ": element " << i << ": " << a[i] << " and " << b[i];
  }
}

std::string describe(const Shape& s) {
  return concat(s.heads, "/", s.kv_heads, " heads of ", s.dim, ", ", dtype_name(s.dtype),
                ", blocks of ", s.block_size, ", window ", s.window, ", softcap ", s.softcap);
}

class AttentionSm90Test : public testing::Test {
 protected:
  void SetUp() override {
    if (this_card().arch != 90) GTEST_SKIP() << "not a Hopper card";
  }
};

// Both head sizes, types, softcap or none, a window or none, every way blocks can divide tiles.
std::vector<Shape> shapes() {
  return {{4, 1, 64, DType::bf16, 16, 0, 0},   {2, 2, 64, DType::bf16, 32, 100, 0},
          {4, 2, 64, DType::f16, 48, 0, 20},   {3, 1, 64, DType::f16, 64, 1, 0},
          {4, 1, 128, DType::bf16, 16, 0, 0},  {4, 2, 128, DType::bf16, 48, 130, 5},
          {2, 2, 128, DType::bf16, 80, 64, 0}, {2, 1, 128, DType::f16, 128, 0, 30},
          {5, 1, 128, DType::f16, 32, 300, 0}, {1, 1, 128, DType::f16, 1024, 257, 0}};
}

TEST_F(AttentionSm90Test, HasTheBitsOfTheMmaKernel) {
  constexpr int32_t kTokens[] = {1, 5, 17, 63, 64, 65, 127, 129, 255, 256, 257, 320, 511, 513, 700};
  for (const Shape& shape : shapes()) {
    std::mt19937 rng(static_cast<uint32_t>(shape.dim + shape.block_size));
    std::vector<Sequence> seqs;
    std::vector<Chunk> chunks;
    for (const int32_t tokens : kTokens)
      seqs.push_back(random_sequence(shape, tokens, static_cast<uint32_t>(tokens)));
    for (const Sequence& seq : seqs) {
      chunks.push_back({&seq, seq.tokens});
      chunks.push_back({&seq, std::uniform_int_distribution<int32_t>(1, seq.tokens)(rng)});
    }
    std::shuffle(chunks.begin(), chunks.end(), rng);
    Step step(shape, chunks);
    expect_same_bits(step.run(run_wgmma), step.run(cuda::attention_prefill_mma), describe(shape));
  }
}

TEST_F(AttentionSm90Test, RowsDoNotDependOnTheirChunkOrNeighbours) {
  for (const Shape& shape : shapes()) {
    const Sequence seq = random_sequence(shape, 600, 3), other = random_sequence(shape, 90, 4);
    Step whole(shape, {{&seq, 600}});
    const std::vector<float> expected = whole.run(run_wgmma);
    const int64_t width = shape.heads * shape.dim;
    for (const int32_t rows : {1, 44, 64, 100, 128, 129, 343}) {
      Step part(shape, {{&other, 90}, {&seq, rows}, {&other, 7}});
      expect_same_bits(part.rows_of(part.run(run_wgmma), 1),
                       {expected.end() - rows * width, expected.end()},
                       concat(describe(shape), ", last ", rows, " rows"));
    }
  }
}

TEST_F(AttentionSm90Test, MatchesDouble) {
  for (const Shape& shape : shapes()) {
    const Sequence seq = random_sequence(shape, 333, 7);
    Step step(shape, {{&seq, 333}});
    const std::vector<float> out = step.run(run_wgmma);
    std::vector<double> expected;
    double naive_error = 0;
    for (int32_t row = 0; row < 333; ++row)
      for (int32_t head = 0; head < shape.heads; ++head) {
        const auto exact = naive_row<double>(shape, seq, row, head);
        const auto naive = rounded(naive_row<float>(shape, seq, row, head), shape.dtype);
        for (size_t d = 0; d < exact.size(); ++d)
          naive_error = std::max(naive_error, std::abs(naive[d] - exact[d]));
        expected.insert(expected.end(), exact.begin(), exact.end());
      }
    ASSERT_EQ(out.size(), expected.size());
    for (size_t i = 0; i < out.size(); ++i)
      ASSERT_LE(std::abs(out[i] - expected[i]), 2 * naive_error + 2 * ulp(expected[i], shape.dtype))
          << describe(shape) << ": element " << i << ": " << out[i] << ", not " << expected[i];
  }
}

TEST_F(AttentionSm90Test, RefusesWhatItCannotDo) {
  cuda::AttnParams p;
  p.dtype = p.kv.dtype = DType::bf16;
  p.kv.head_dim = 128;
  EXPECT_TRUE(cuda::attention_prefill_sm90(p, 0, this_card(), nullptr));
  cuda::Card ampere = this_card();
  ampere.arch = 80;
  EXPECT_FALSE(cuda::attention_prefill_sm90(p, 0, ampere, nullptr));
  for (const int32_t dim : {96, 256}) {
    p.kv.head_dim = dim;
    EXPECT_FALSE(cuda::attention_prefill_sm90(p, 0, this_card(), nullptr)) << dim;
  }
  p.kv.head_dim = 128;
  p.kv.dtype = DType::fp8_e4m3;
  EXPECT_FALSE(cuda::attention_prefill_sm90(p, 0, this_card(), nullptr));
  p.kv.dtype = DType::bf16;
  for (int64_t cuda::AttnParams::* stride :
       {&cuda::AttnParams::q_stride, &cuda::AttnParams::out_stride}) {
    p.*stride = 128 + 4;  // rows of q and out are copied 16 bytes at a time
    EXPECT_FALSE(cuda::attention_prefill_sm90(p, 0, this_card(), nullptr));
    p.*stride = 128 + 8;
    EXPECT_TRUE(cuda::attention_prefill_sm90(p, 0, this_card(), nullptr));
  }
}

}  // namespace
}  // namespace ni::test
