// Paged attention on CUDA against double precision, and promise 1: a row has the same bits in every
// batch, chunking, work list and kernel.
#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <ostream>
#include <string>
#include <tuple>

#include "../../../cuda/attention_plan.h"
#include "core/attn_items.h"
#include "device_array.h"

namespace ni::cuda {

// attention_prefill() and attention_decode() without Hopper's kernels (cuda/attention*.cuh, which
// only nvcc reads).
void attention_prefill_mma(const AttnParams& p, int32_t num_items, const Card& card,
                           cudaStream_t stream);
void attention_decode_sm80(const AttnParams& p, int32_t max_query_len, int64_t max_seqs,
                           void* workspace, const Card& card, cudaStream_t stream);

}  // namespace ni::cuda

namespace ni::test {
namespace {

struct Shape {
  int32_t heads, kv_heads, head_dim;
  DType dtype = DType::bf16;
  bool fp8 = false;
  int32_t block_size = 16;
  int32_t window = 0;
  float softcap = 0;

  DType cache_dtype() const { return fp8 ? DType::fp8_e4m3 : dtype; }
  int32_t cols() const { return heads * head_dim; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(head_dim)); }
  float k_scale() const { return fp8 ? 0.7f : 1.0f; }
  float v_scale() const { return fp8 ? 1.3f : 1.0f; }
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << s.heads << "/" << s.kv_heads << " heads of " << s.head_dim << " "
             << dtype_name(s.dtype) << " cache " << dtype_name(s.cache_dtype()) << " block "
             << s.block_size << " window " << s.window << " softcap " << s.softcap;
}

float rounded(float v, DType dtype) {
  return dtype == DType::bf16 ? to_float(to_bf16(v)) : to_float(to_f16(v));
}

float decode_e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return static_cast<float>(byte < 128 ? magnitude : -magnitude);
}

// Rows [context - query_len, context) of a sequence.
struct Piece {
  int32_t seq, context, query_len;
};

enum class Path { chunks, whole, mixed, prefill, mma };

bool is_decode(Path path) {
  return path == Path::chunks || path == Path::whole || path == Path::mixed;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Where two results differ, for a message.
std::string differences(const std::vector<float>& a, const std::vector<float>& b, int32_t cols) {
  std::string text;
  size_t count = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    if (std::bit_cast<uint32_t>(a[i]) == std::bit_cast<uint32_t>(b[i])) continue;
    const auto column = static_cast<int32_t>(i) % cols;
    if (++count <= 5)
      text += concat(" row ", static_cast<int32_t>(i) / cols, " column ", column, ": ", a[i], ", ",
                     b[i], ";");
  }
  return concat(count, " of ", a.size(), " differ:", text);
}

// Sequences in a paged cache: blocks are shuffled, with room between them, and NaN where no token
// is.
class Scene {
 public:
  Scene(const Shape& shape, const std::vector<int32_t>& lengths, uint32_t seed)
      : shape_(shape), rng_(seed) {
    view_.dtype = shape.cache_dtype();
    view_.block_size = shape.block_size;
    view_.num_kv_heads = shape.kv_heads;
    view_.head_dim = shape.head_dim;
    view_.k_tile = 1;
    view_.k_scale = shape.k_scale();
    view_.v_scale = shape.v_scale();
    view_.block_stride = 2 * view_.block_elements();
    for (const int32_t n : lengths) {
      max_blocks_ = std::max(max_blocks_, blocks(n));
      view_.num_blocks += blocks(n);
    }
    std::vector<int32_t> free(static_cast<size_t>(view_.num_blocks));
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), rng_);
    const size_t bytes = static_cast<size_t>(view_.num_blocks * view_.block_stride) * element();
    std::vector<char> k(bytes, '\xff'), v(bytes, '\xff');
    for (const int32_t n : lengths) {
      Sequence s;
      s.table.assign(free.end() - blocks(n), free.end());
      free.resize(free.size() - s.table.size());
      s.q = normal_floats(static_cast<size_t>(n * shape.cols()), draw());
      for (float& x : s.q) x = rounded(x, shape.dtype);
      s.k = fill(k, s.table, n, shape.k_scale());
      s.v = fill(v, s.table, n, shape.v_scale());
      seqs_.push_back(std::move(s));
    }
    k_ = std::make_unique<DeviceBytes>(bytes);
    v_ = std::make_unique<DeviceBytes>(bytes);
    k_->upload(k.data(), bytes);
    v_->upload(v.data(), bytes);
    view_.k = k_->data();
    view_.v = v_->data();
  }

  int repeats = 2;  // of a decode
  // Of a token's q.
  float& q(int32_t seq, int32_t token, int32_t column) {
    return seqs_[static_cast<size_t>(seq)].q[static_cast<size_t>(token * shape_.cols() + column)];
  }

  // The rows of all pieces, one after the other: [rows, heads * head_dim].
  std::vector<float> run(const std::vector<Piece>& pieces, Path path) {
    StepInputs in;
    std::vector<float> q;
    std::vector<int32_t> starts{0}, contexts, tables;
    const int32_t cols = shape_.cols(), q_stride = cols + 64, stride = max_blocks_ + 1;
    for (const Piece& p : pieces) {
      const Sequence& s = seqs_[static_cast<size_t>(p.seq)];
      for (int32_t t = p.context - p.query_len; t < p.context; ++t) {
        q.insert(q.end(), s.q.begin() + t * cols, s.q.begin() + (t + 1) * cols);
        q.insert(q.end(), 64, NAN);
      }
      starts.push_back(starts.back() + p.query_len);
      contexts.push_back(p.context);
      for (int32_t b = 0; b < stride; ++b)
        tables.push_back(b < blocks(p.context) ? s.table[static_cast<size_t>(b)] : 0x7fffffff);
      in.max_query_len = std::max(in.max_query_len, p.query_len);
    }
    const std::vector<AttnItem> items = list_items(pieces, path);
    const auto num_seqs = static_cast<int64_t>(pieces.size());
    const DeviceArray<int32_t> d_starts(starts), d_contexts(contexts), d_tables(tables);
    const DeviceArray<AttnItem> d_items(items);
    const auto num_items = static_cast<int32_t>(items.size());
    in.num_tokens = starts.back();
    in.num_seqs = static_cast<int32_t>(num_seqs);
    in.block_table_stride = stride;
    in.cu_seqlens_q = d_starts.data();
    in.context_lens = d_contexts.data();
    in.block_tables = d_tables.data();
    (is_decode(path) ? in.num_decode_items : in.num_prefill_items) = num_items;
    (is_decode(path) ? in.decode_items : in.prefill_items) = d_items.data();
    in.max_decode_query_len = in.max_query_len;
    in.num_whole_items = static_cast<int32_t>(std::count_if(
        items.begin(), items.end(), [](const AttnItem& item) { return item.index < 0; }));
    std::vector<DecodeCut> cuts;
    const AttnTiling tiling = cuda::attention_tiling(this_card());
    if (is_decode(path) && in.num_whole_items == 0 && tiling.decode_ranges > 0 && draw() % 4 != 0) {
      in.num_decode_ranges = tiling.decode_ranges;
      cut_decode_items(items, contexts.data(), tiling, cuts);
    }
    const DeviceArray<DecodeCut> d_cuts(cuts);
    in.decode_cuts = d_cuts.data();
    const DeviceArray<StepInputs> d_in(std::vector<StepInputs>{in});
    DeviceMatrix d_q(in.num_tokens, q_stride, shape_.dtype);
    d_q.fill(q);
    DeviceMatrix out(in.num_tokens, cols + 8, shape_.dtype);

    cuda::AttnParams p;
    p.q = d_q.data();
    p.q_stride = q_stride;
    p.out = out.data();
    p.out_stride = cols + 8;
    p.dtype = shape_.dtype;
    p.kv = view_;
    p.args = {shape_.heads, shape_.scale(), shape_.window, shape_.softcap};
    p.step = d_in.data();
    if (!is_decode(path)) {
      if (path == Path::mma) {
        cuda::attention_prefill_mma(p, num_items, this_card(), nullptr);
      } else {
        cuda::attention_prefill(p, num_items, this_card(), nullptr);
      }
      return take_rows(out, cols);
    }
    // As many items as fit with these queries, and no more.
    const int32_t max_items =
        (num_items * in.max_query_len + cuda::kDecodeRows - 1) / cuda::kDecodeRows;
    const auto bytes = [&](int32_t of_items) {
      return cuda::decode_workspace_bytes(of_items, num_seqs, shape_.heads, shape_.head_dim);
    };
    const size_t counter_bytes = bytes(0), partial_bytes = bytes(max_items) - counter_bytes;
    DeviceBytes workspace(counter_bytes + partial_bytes);
    const auto counters = static_cast<size_t>(num_seqs * shape_.heads);
    check_device(cudaMemset(workspace.data(), 0, counters * sizeof(uint64_t)));
    // Several times, then with the kernel of older cards: each finds the counters as the last one
    // left them, and nothing that it may read.
    std::vector<float> first;
    for (int i = 0; i <= repeats; ++i) {
      out.poison();
      check_device(
          cudaMemset(static_cast<char*>(workspace.data()) + counter_bytes, 0xff, partial_bytes));
      const auto run = i < repeats ? cuda::attention_decode : cuda::attention_decode_sm80;
      run(p, in.max_query_len, num_seqs, workspace.data(), this_card(), nullptr);
      const std::vector<float> rows = take_rows(out, cols);
      if (i == 0) first = rows;
      EXPECT_TRUE(same_bits(first, rows)) << (i < repeats ? "again" : "the kernel of older cards")
                                          << ": " << differences(first, rows, cols);
      std::vector<uint64_t> left(counters, 1);
      workspace.download(left.data(), counters * sizeof(uint64_t));
      EXPECT_EQ(std::count(left.begin(), left.end(), 0), static_cast<int64_t>(counters));
    }
    EXPECT_TRUE(workspace.intact());
    return first;
  }

  // Every sequence's last token, and one row of padding: rotated by attention and by the kernel of
  // its own, into the cache as it was.
  void expect_fused_rope_is_separate(const RopeArgs& rope) {
    const auto n = static_cast<int32_t>(seqs_.size()) + 1;
    const int32_t cols = (shape_.heads + 2 * shape_.kv_heads) * shape_.head_dim, stride = cols + 8;
    std::vector<int32_t> starts(static_cast<size_t>(n) + 1), contexts, positions, tables;
    std::iota(starts.begin(), starts.end(), 0);
    std::vector<int64_t> slots;
    for (int32_t s = 0; s < n; ++s) {
      const bool is_padding = s + 1 == n;
      const Sequence& seq = seqs_[static_cast<size_t>(is_padding ? 0 : s)];
      const auto context = static_cast<int32_t>(seq.q.size() / static_cast<size_t>(shape_.cols()));
      contexts.push_back(is_padding ? 0 : context);
      positions.push_back(is_padding ? 0 : context - 1);
      const int32_t block = (context - 1) / shape_.block_size;
      slots.push_back(is_padding
                          ? -1
                          : int64_t{seq.table[static_cast<size_t>(block)]} * shape_.block_size +
                                (context - 1) % shape_.block_size);
      for (int32_t b = 0; b < max_blocks_; ++b)
        tables.push_back(b <= block && !is_padding ? seq.table[static_cast<size_t>(b)] : 0);
    }
    StepInputs in;
    AttnLists lists;
    AttnTiling tiling = cuda::attention_tiling(this_card());
    tiling.max_items = 4096;
    build_attn_items(starts.data(), contexts.data(), n, tiling, lists, in);
    const DeviceArray<int32_t> d_starts(starts), d_contexts(contexts), d_positions(positions),
        d_tables(tables);
    const DeviceArray<int64_t> d_slots(slots);
    const DeviceArray<AttnItem> d_items(lists.decode);
    const DeviceArray<DecodeCut> d_cuts(lists.cuts);
    in.num_tokens = in.num_seqs = n;
    in.block_table_stride = max_blocks_;
    in.cu_seqlens_q = d_starts.data();
    in.context_lens = d_contexts.data();
    in.block_tables = d_tables.data();
    in.positions = d_positions.data();
    in.slot_mapping = d_slots.data();
    in.decode_items = d_items.data();
    in.decode_cuts = d_cuts.data();
    const DeviceArray<StepInputs> d_in(std::vector<StepInputs>{in});
    const std::vector<float> qkv = normal_floats(static_cast<size_t>(n * stride), draw());
    const size_t bytes = k_->bytes();
    std::vector<char> before[2] = {std::vector<char>(bytes), std::vector<char>(bytes)};
    k_->download(before[0].data(), bytes);
    v_->download(before[1].data(), bytes);
    DeviceBytes workspace(cuda::decode_workspace_bytes(4096, n, shape_.heads, shape_.head_dim));
    workspace.zero();

    std::vector<float> rows[2];
    std::vector<char> caches[2][2];
    for (const bool fused : {false, true}) {
      k_->upload(before[0].data(), bytes);
      v_->upload(before[1].data(), bytes);
      DeviceMatrix x(n, stride, shape_.dtype), out(n, shape_.cols() + 8, shape_.dtype);
      x.fill(qkv);
      cuda::AttnParams p;
      p.q = x.data();
      p.q_stride = stride;
      p.out = out.data();
      p.out_stride = shape_.cols() + 8;
      p.dtype = shape_.dtype;
      p.kv = view_;
      p.args = {shape_.heads, shape_.scale(), shape_.window, shape_.softcap};
      p.step = d_in.data();
      if (fused) {
        ASSERT_TRUE(cuda::fuses_rope(p.args, rope, view_, 1, this_card()));
        p.with_rope = p.settled = true;
        p.rope = rope;
      } else {
        cuda::rope_kv_write(x.data(), stride, n, shape_.heads, d_positions.data(), d_slots.data(),
                            rope, view_, shape_.dtype, false, nullptr);
      }
      cuda::attention_decode(p, 1, n, workspace.data(), this_card(), nullptr);
      rows[fused] = take_rows(out, shape_.cols());
      rows[fused].resize(rows[fused].size() - static_cast<size_t>(shape_.cols()));  // padding
      for (const auto& [memory, to] :
           {std::pair{&k_, &caches[fused][0]}, {&v_, &caches[fused][1]}}) {
        to->resize(bytes);
        (*memory)->download(to->data(), bytes);
        EXPECT_TRUE((*memory)->intact());
      }
    }
    EXPECT_TRUE(same_bits(rows[0], rows[1])) << differences(rows[0], rows[1], shape_.cols());
    EXPECT_TRUE(caches[0][0] == caches[1][0]) << "K in the cache";
    EXPECT_TRUE(caches[0][1] == caches[1][1]) << "V in the cache";
    EXPECT_FALSE(caches[0][0] == before[0]);
    k_->upload(before[0].data(), bytes);
    v_->upload(before[1].data(), bytes);
  }

  // Rows first, first + step, … of a run's result against double precision: the largest error of a
  // head's row is at most twice that of a naive 16-bit softmax, plus 2 ulp.
  void expect_close(const std::vector<float>& got, const std::vector<Piece>& pieces,
                    int32_t step = 1) const {
    int32_t row = 0;
    for (const Piece& p : pieces)
      for (int32_t i = 0; i < p.query_len; ++i, ++row) {
        if (i % step != 0 && i + 1 != p.query_len) continue;
        for (int32_t h = 0; h < shape_.heads; ++h) {
          const int32_t position = p.context - p.query_len + i;
          const float* from = got.data() + row * shape_.cols() + h * shape_.head_dim;
          expect_row_close(from, p.seq, position, h);
          if (testing::Test::HasFailure()) return;
        }
      }
  }

 private:
  struct Sequence {
    std::vector<int32_t> table;
    std::vector<float> q;     // [tokens][heads * head_dim]
    std::vector<float> k, v;  // [tokens][kv heads][head_dim], as meant: scales included
  };

  uint32_t draw() { return static_cast<uint32_t>(rng_()); }
  size_t element() const { return dtype_size(view_.dtype); }
  int32_t blocks(int32_t tokens) const {
    return (tokens + shape_.block_size - 1) / shape_.block_size;
  }

  // Random rows for n tokens into a cache's image; returns what they mean.
  std::vector<float> fill(std::vector<char>& image, const std::vector<int32_t>& table, int32_t n,
                          float scale) {
    const int32_t d = shape_.head_dim;
    const auto count = static_cast<size_t>(n * shape_.kv_heads * d);
    std::vector<float> values(count);
    std::vector<char> raw(count * element());
    if (shape_.fp8) {  // magnitudes up to 3.75, subnormals included
      for (size_t i = 0; i < count; ++i) {
        const uint32_t exponent = draw() % 9, rest = draw();
        const auto byte = static_cast<uint8_t>((rest & 0x87u) | exponent << 3);
        raw[i] = static_cast<char>(byte);
        values[i] = decode_e4m3(byte) * scale;
      }
    } else {
      values = normal_floats(count, draw());
      for (float& x : values) x = rounded(x, shape_.dtype);
      raw = encode_floats(values, shape_.dtype);
    }
    const size_t row = static_cast<size_t>(d) * element();
    for (int32_t t = 0; t < n; ++t)
      for (int32_t h = 0; h < shape_.kv_heads; ++h) {
        const int32_t block = table[static_cast<size_t>(t / shape_.block_size)];
        const int64_t at = view_.v_offset(block, h, t % shape_.block_size, 0);
        std::memcpy(&image[static_cast<size_t>(at) * element()],
                    &raw[static_cast<size_t>(t * shape_.kv_heads + h) * row], row);
      }
    return values;
  }

  std::vector<AttnItem> list_items(const std::vector<Piece>& pieces, Path path) const {
    std::vector<AttnItem> items;
    for (int32_t s = 0; s < static_cast<int32_t>(pieces.size()); ++s) {
      const Piece& p = pieces[static_cast<size_t>(s)];
      if (path == Path::whole || (path == Path::mixed && s % 2 == 0)) {
        items.push_back({s, -1});
      } else if (is_decode(path)) {
        for (int32_t c = 0; c * cuda::kKvChunk < p.context; ++c) items.push_back({s, c});
      } else {
        for (int32_t t = 0; t * cuda::kPrefillRows < p.query_len; ++t) items.push_back({s, t});
      }
    }
    if (!is_decode(path))
      std::stable_sort(items.begin(), items.end(), [&](const AttnItem& a, const AttnItem& b) {
        return last_position(pieces, a) > last_position(pieces, b);
      });
    return items;
  }
  static int32_t last_position(const std::vector<Piece>& pieces, const AttnItem& item) {
    const Piece& p = pieces[static_cast<size_t>(item.seq)];
    return p.context - p.query_len + std::min(p.query_len, (item.index + 1) * cuda::kPrefillRows) -
           1;
  }

  // The columns of `out` that were to be written; the others still hold NaN.
  static std::vector<float> take_rows(const DeviceMatrix& out, int32_t cols) {
    const std::vector<float> all = out.read();
    EXPECT_TRUE(out.intact());
    std::vector<float> rows;
    for (size_t at = 0; at < all.size(); at += static_cast<size_t>(cols) + 8) {
      const auto from = all.begin() + static_cast<int64_t>(at);
      rows.insert(rows.end(), from, from + cols);
      EXPECT_TRUE(std::all_of(from + cols, from + cols + 8, [](float x) { return std::isnan(x); }));
    }
    return rows;
  }

  // Softmax attention of one row in type F; P is rounded to 16 bits if `is_naive`.
  template <typename F>
  std::vector<F> attend(int32_t seq, int32_t position, int32_t head, bool is_naive) const {
    const Sequence& s = seqs_[static_cast<size_t>(seq)];
    const int32_t d = shape_.head_dim, kv_head = head / (shape_.heads / shape_.kv_heads);
    const int32_t begin = shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
    const auto kv_row = [&](int32_t t) { return (t * shape_.kv_heads + kv_head) * d; };
    const float* q = s.q.data() + position * shape_.cols() + head * d;
    std::vector<F> p;
    for (int32_t t = begin; t <= position; ++t) {
      F score = 0;
      for (int32_t i = 0; i < d; ++i)
        score += static_cast<F>(q[i]) * static_cast<F>(s.k[static_cast<size_t>(kv_row(t) + i)]);
      score *= static_cast<F>(shape_.scale());
      const F cap = static_cast<F>(shape_.softcap);
      p.push_back(cap > 0 ? cap * std::tanh(score / cap) : score);
    }
    const F top = *std::max_element(p.begin(), p.end());
    F sum = 0;
    for (F& x : p) sum += x = std::exp(x - top);
    std::vector<F> out(static_cast<size_t>(d));
    for (int32_t t = begin; t <= position; ++t) {
      F weight = p[static_cast<size_t>(t - begin)] / sum;
      if (is_naive) weight = static_cast<F>(rounded(static_cast<float>(weight), shape_.dtype));
      for (int32_t i = 0; i < d; ++i)
        out[static_cast<size_t>(i)] +=
            weight * static_cast<F>(s.v[static_cast<size_t>(kv_row(t) + i)]);
    }
    return out;
  }

  void expect_row_close(const float* got, int32_t seq, int32_t position, int32_t head) const {
    const std::vector<double> want = attend<double>(seq, position, head, false);
    const std::vector<float> naive = attend<float>(seq, position, head, true);
    double top = 0, error = 0, naive_error = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_TRUE(std::isfinite(got[i]))
          << shape_ << " position " << position << " head " << head << " column " << i;
      const float in_16_bits = rounded(naive[i], shape_.dtype);
      top = std::max(top, std::abs(want[i]));
      error = std::max(error, std::abs(static_cast<double>(got[i]) - want[i]));
      naive_error = std::max(naive_error, std::abs(static_cast<double>(in_16_bits) - want[i]));
    }
    const int mantissa_bits = shape_.dtype == DType::bf16 ? 7 : 10;
    const double ulp = std::ldexp(1.0, std::ilogb(top) - mantissa_bits);
    EXPECT_LE(error, 2 * naive_error + 2 * ulp)
        << shape_ << " sequence " << seq << " position " << position << " head " << head;
  }

  Shape shape_;
  std::mt19937 rng_;
  KvView view_;
  int32_t max_blocks_ = 0;
  std::vector<Sequence> seqs_;
  std::unique_ptr<DeviceBytes> k_, v_;
};

// Head sizes, types and cache types, with groups, blocks, windows and caps that change along.
std::vector<Shape> shapes(int repeats = 2) {
  std::vector<Shape> all;
  const int32_t heads[][2] = {{4, 4}, {8, 2}, {9, 3}, {6, 2}, {15, 3}, {20, 1}};
  const int32_t block_sizes[] = {16, 32, 48, 64, 256};
  const int32_t windows[] = {0, 0, 100, 0, 256, 1, 300};
  const float caps[] = {0, 0, 0, 20, 0};
  size_t n = 0;
  for (const int32_t head_dim : {64, 96, 128, 256})
    for (const DType dtype : {DType::bf16, DType::f16})
      for (const bool fp8 : {false, true})
        for (int repeat = 0; repeat < repeats; ++repeat, ++n)
          all.push_back({heads[n % 6][0], heads[n % 6][1], head_dim, dtype, fp8, block_sizes[n % 5],
                         windows[n % 7], caps[n % 5]});
  return all;
}

const std::vector<int32_t> kLengths = {1, 15, 64, 65, 255, 256, 257, 511, 512, 513, 700};

TEST(CudaAttention, DecodeMatchesDouble) {
  for (const Shape& shape : shapes()) {
    SCOPED_TRACE(testing::Message() << shape);
    Scene scene(shape, kLengths, 1);
    std::vector<Piece> pieces;
    for (int32_t s = 0; s < static_cast<int32_t>(kLengths.size()); ++s) {
      const int32_t n = kLengths[static_cast<size_t>(s)];
      pieces.push_back({s, n, std::min(n, 1 + s % cuda::kDecodeRows)});
    }
    scene.expect_close(scene.run(pieces, Path::mixed), pieces);
    if (HasFailure()) return;
  }
}

TEST(CudaAttention, PrefillMatchesDouble) {
  for (const Shape& shape : shapes()) {
    SCOPED_TRACE(testing::Message() << shape);
    Scene scene(shape, {5, 130, 300, 560}, 2);
    const std::vector<Piece> pieces = {{0, 5, 5}, {1, 130, 130}, {2, 300, 40}, {3, 560, 290}};
    for (const Path path : {Path::prefill, Path::mma})
      scene.expect_close(scene.run(pieces, path), pieces, 37);
    if (HasFailure()) return;
  }
}

TEST(CudaAttention, RandomShapesMatchDouble) {
  std::mt19937 rng(3);
  const auto pick = [&](std::initializer_list<int32_t> of) {
    return of.begin()[rng() % of.size()];
  };
  for (int round = 0; round < 24; ++round) {
    const int32_t kv_heads = pick({1, 2, 3}), group = pick({1, 2, 4, 5, 8, 16});
    const Shape shape{kv_heads * group,
                      kv_heads,
                      pick({64, 96, 128, 256}),
                      rng() % 2 == 0 ? DType::bf16 : DType::f16,
                      rng() % 2 == 0,
                      pick({16, 32, 48, 64, 80, 128}),
                      pick({0, 0, 2, 63, 64, 65, 255, 257}),
                      static_cast<float>(pick({0, 0, 5, 50}))};
    SCOPED_TRACE(testing::Message() << shape);
    std::vector<int32_t> lengths;
    std::vector<Piece> decode, prefill;
    for (int32_t s = 0; s < 4; ++s) {
      const auto n = static_cast<int32_t>(1 + rng() % 600);
      lengths.push_back(n);
      // The longest query decides where sums lie, so it is 1 to 4 in turns.
      decode.push_back(
          {s, n, std::min<int32_t>(n, 1 + static_cast<int32_t>(rng() % 4) % (1 + round % 4))});
      prefill.push_back({s, n, static_cast<int32_t>(1 + rng() % static_cast<uint32_t>(n))});
    }
    Scene scene(shape, lengths, static_cast<uint32_t>(100 + round));
    scene.expect_close(scene.run(decode, Path::chunks), decode);
    scene.expect_close(scene.run(prefill, Path::prefill), prefill, 61);
    if (HasFailure()) return;
  }
}

// Every row of a prompt, as one piece, is the truth; all other ways to compute it give its bits.
class CudaAttentionBits : public testing::Test {
 protected:
  void expect(Scene& scene, const std::vector<Piece>& pieces, Path path, const std::string& what) {
    const std::vector<float> got = scene.run(pieces, path);
    size_t row = 0;
    for (const Piece& p : pieces)
      for (int32_t t = p.context - p.query_len; t < p.context; ++t, ++row) {
        const float* want = &whole_[static_cast<size_t>(p.seq)][static_cast<size_t>(t) * cols_];
        if (std::memcmp(&got[row * cols_], want, cols_ * sizeof(float)) != 0) {
          ADD_FAILURE() << what << ": sequence " << p.seq << " position " << t << " context "
                        << p.context << " rows " << p.query_len;
          return;
        }
      }
  }
  void take_truth(Scene& scene, const Shape& shape, const std::vector<int32_t>& lengths) {
    cols_ = static_cast<size_t>(shape.cols());
    whole_.clear();
    for (int32_t s = 0; s < static_cast<int32_t>(lengths.size()); ++s) {
      const int32_t n = lengths[static_cast<size_t>(s)];
      whole_.push_back(scene.run({{s, n, n}}, Path::mma));
    }
  }
  size_t cols_ = 0;
  std::vector<std::vector<float>> whole_;
};

TEST_F(CudaAttentionBits, AreThoseOfThePromptInOnePiece) {
  const std::vector<int32_t> lengths = {560, 257, 64};
  for (const Shape& shape : shapes(1)) {
    SCOPED_TRACE(testing::Message() << shape);
    Scene scene(shape, lengths, 4);
    take_truth(scene, shape, lengths);
    expect(scene, {{0, 560, 560}, {1, 257, 257}, {2, 64, 64}}, Path::prefill, "prefill, a batch");
    const std::vector<Piece> cut = {{0, 100, 100}, {0, 101, 1}, {0, 356, 255}, {0, 560, 204},
                                    {1, 256, 256}, {1, 257, 1}, {2, 7, 7},     {2, 64, 57}};
    expect(scene, cut, Path::prefill, "prefill, cut prompts");
    expect(scene, cut, Path::mma, "mma, cut prompts");
    std::vector<Piece> tokens, drafts;
    for (int32_t s = 0; s < 3; ++s)
      for (int32_t n = 1; n <= lengths[static_cast<size_t>(s)]; ++n) {
        tokens.push_back({s, n, 1});
        drafts.push_back({s, n, std::min(n, 1 + n % cuda::kDecodeRows)});
      }
    expect(scene, tokens, Path::chunks, "decode, chunks");
    expect(scene, tokens, Path::whole, "decode, whole sequences");
    expect(scene, drafts, Path::mixed, "decode, several rows");
    expect(scene, drafts, Path::chunks, "decode, several rows, no whole sequence");
    for (const int32_t n : {1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 560}) {
      expect(scene, {{0, n, 1}}, Path::chunks, "decode alone");
      expect(scene, {{0, n, 1}}, Path::whole, "decode alone, whole");
    }
    if (HasFailure()) return;
  }
}

// A long context: many chunks, some of them before the window.
TEST_F(CudaAttentionBits, HoldForLongContexts) {
  for (const int32_t window : {0, 1000}) {
    const Shape shape{8, 2, 128, DType::bf16, false, 16, window, 0};
    const std::vector<int32_t> lengths = {5000};
    Scene scene(shape, lengths, 5);
    take_truth(scene, shape, lengths);
    std::vector<Piece> tokens;
    for (int32_t n = 4; n <= 5000; n += 83) tokens.push_back({0, n, n % 3 + 1});
    expect(scene, tokens, Path::chunks, "chunks");
    expect(scene, tokens, Path::mixed, "mixed");
    expect(scene, {{0, 5000, 5000}}, Path::prefill, "prefill");
    scene.expect_close(scene.run({{0, 5000, 4}}, Path::chunks), {{0, 5000, 4}});
  }
}

// Beside an fp8 cache q is f16: what is beyond its range saturates, NaN does not vanish.
TEST(CudaAttention, Fp8QueriesSaturate) {
  const Shape shape{4, 2, 64, DType::bf16, true, 16, 0, 0};
  Scene scene(shape, {70}, 12);
  for (const Path path : {Path::chunks, Path::prefill}) {
    const std::vector<Piece> pieces = {{0, 70, path == Path::chunks ? 2 : 9}};
    const auto with = [&](float large) {
      scene.q(0, 69, 5) = large;
      scene.q(0, 68, 64 + 7) = -large;
      return scene.run(pieces, path);
    };
    const std::vector<float> at_limit = with(65536.0f);  // bf16 has no 65504
    EXPECT_TRUE(std::all_of(at_limit.begin(), at_limit.end(), [](float v) { return v == v; }));
    EXPECT_TRUE(same_bits(at_limit, with(1e6f)));
    EXPECT_TRUE(same_bits(at_limit, with(INFINITY)));
    const std::vector<float> nan = with(NAN);
    const auto last = nan.end() - shape.cols();  // of its four heads the first has the NaN
    EXPECT_TRUE(std::all_of(last, last + 64, [](float v) { return v != v; }));
    EXPECT_TRUE(std::all_of(last + 64, nan.end(), [](float v) { return v == v; }));
  }
}

// A part for every chunk: more of them than Hopper's kernel has copies on their way, and, with
// heads of 64, than it makes factors at once.
class CudaAttentionManyParts : public testing::TestWithParam<int32_t> {};

TEST_P(CudaAttentionManyParts, AreMerged) {
  const int32_t d = GetParam();
  for (const auto& [group, kv_heads, fp8, window] :
       {std::tuple{4, 1, false, 0}, {1, 3, false, 7000}, {5, 1, true, 0}, {16, 1, true, 0}}) {
    const Shape shape{group * kv_heads, kv_heads, d, DType::bf16, fp8, 16, window, 0};
    SCOPED_TRACE(testing::Message() << shape);
    const std::vector<int32_t> lengths = {d == 256 ? 25700 : d == 64 ? 17000 : 12000, 2400};
    Scene scene(shape, lengths, 11);
    for (const std::vector<Piece>& pieces :
         {std::vector<Piece>{{0, lengths[0], 1}}, {{1, 2400, 1}, {0, 11000, 2}}}) {
      const std::vector<float> got = scene.run(pieces, Path::chunks);
      scene.expect_close(got, pieces);
      EXPECT_TRUE(same_bits(got, scene.run(pieces, Path::whole)));
    }
    if (HasFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(HeadDims, CudaAttentionManyParts, testing::Values(64, 96, 128, 256),
                         testing::PrintToStringParamName());

// The fewer sequences, the more blocks have a part of a result and share its merge. Many chunks and
// few, one row tile and several, and blocks whose last part is not their only one.
class CudaAttentionSharedMerges : public testing::TestWithParam<int32_t> {};

TEST_P(CudaAttentionSharedMerges, HaveTheBitsOfWholeSequences) {
  for (const auto& [group, kv_heads, d, fp8, rows] : {std::tuple{4, 2, 128, false, 1},
                                                      {1, 3, 96, false, 4},
                                                      {16, 1, 64, true, 3},
                                                      {5, 2, 256, false, 2},
                                                      {12, 1, 96, true, 1},
                                                      {3, 1, 128, true, 4}}) {
    const Shape shape{group * kv_heads, kv_heads, d, DType::bf16, fp8, 16, 0, 0};
    SCOPED_TRACE(testing::Message() << shape);
    Scene scene(shape, {9000}, 13);
    std::vector<Piece> pieces;
    for (int32_t i = 0; i < GetParam(); ++i)
      pieces.push_back(
          {0, i % 3 == 2 ? 4000 - 37 * (i % 64) : 9000 - 41 * (i % 64), 1 + (rows - 1 + i) % rows});
    const std::vector<float> want = scene.run(pieces, Path::whole);
    scene.repeats = 4;  // whoever counts last
    EXPECT_TRUE(same_bits(want, scene.run(pieces, Path::chunks)));
    if (HasFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(Sequences, CudaAttentionSharedMerges, testing::Values(1, 3, 12, 60),
                         testing::PrintToStringParamName());

// Whichever block is the last of a result, and whatever was in shared memory before.
TEST(CudaAttention, DecodeHasTheSameBitsEveryTime) {
  for (const Shape& shape : shapes(1)) {
    SCOPED_TRACE(testing::Message() << shape);
    Scene scene(shape, {2100, 300, 64}, 9);
    scene.repeats = 25;
    std::vector<Piece> pieces;  // many times as many units as blocks
    for (int32_t n = 4; n <= 2100; n += n < 600 ? 3 : 50) pieces.push_back({0, n, 1 + n % 4});
    for (int32_t n = 4; n <= 300; n += 5) pieces.push_back({1, n, 1});
    for (int32_t n = 4; n <= 64; n += 5) pieces.push_back({2, n, 2});
    for (const Path path : {Path::chunks, Path::mixed}) scene.run(pieces, path);
    if (HasFailure()) return;
  }
}

// The inverse: what is seen matters, what is not does not.
// Decodes of one token, whose q, k and v are still to be normalised, rotated and written: the bits
// of rope_kv_write() and attention, in the result and in the cache.
void expect_rotates(const Shape& shape, const std::vector<int32_t>& lengths, int32_t rotary,
                    bool norms, uint32_t seed) {
  SCOPED_TRACE(testing::Message() << shape);
  Scene scene(shape, lengths, seed);
  const int32_t d = shape.head_dim;
  const auto random = [&](int64_t n) {
    return DeviceArray<float>(normal_floats(static_cast<size_t>(n), ++seed));
  };
  const DeviceArray<float> cos = random(1000 * std::max(rotary / 2, 1)),
                           sin = random(1000 * std::max(rotary / 2, 1)), q_norm = random(d),
                           k_norm = random(d);
  RopeArgs rope;
  rope.rotary_dim = rotary;
  if (rotary > 0) rope.cos = cos.data(), rope.sin = sin.data();
  if (norms) rope.q_norm.weight = q_norm.data(), rope.k_norm.weight = k_norm.data();
  scene.expect_fused_rope_is_separate(rope);
}

TEST(CudaAttention, RotatesAndWritesLikeTheKernelOfItsOwn) {
  std::mt19937 rng(8);
  const auto pick = [&](std::initializer_list<int32_t> of) {
    return of.begin()[rng() % of.size()];
  };
  if (this_card().arch != 90) GTEST_SKIP() << "Hopper's kernel has this";
  for (int round = 0; round < 32; ++round) {
    const int32_t kv_heads = pick({1, 2, 3}), group = pick({1, 2, 4, 7, 12});
    const Shape shape{kv_heads * group,
                      kv_heads,
                      pick({64, 96, 128, 256}),
                      rng() % 2 == 0 ? DType::bf16 : DType::f16,
                      rng() % 2 == 0,
                      pick({16, 48, 64}),
                      pick({0, 0, 2, 100, 300}),
                      0};
    const int32_t d = shape.head_dim, rotary = pick({0, d / 2, d, d});
    std::vector<int32_t> lengths = {1, 17, 64, 65, 257};
    for (int i = 0; i < 4; ++i) lengths.push_back(1 + static_cast<int32_t>(rng() % 900));
    expect_rotates(shape, lengths, rotary, rng() % 2 == 0, static_cast<uint32_t>(500 + 10 * round));
    if (HasFailure()) return;
  }
}

// As many units that every block of a card goes several times through its slots for them; parts of
// results among them.
TEST(CudaAttention, HasManyUnitsRotatedAhead) {
  if (this_card().arch != 90) GTEST_SKIP() << "Hopper's kernel has this";
  std::mt19937 rng(9);
  uint32_t seed = 900;
  for (const Shape& shape : {Shape{16, 8, 128, DType::bf16, false, 16, 0, 0},
                             Shape{32, 8, 64, DType::f16, false, 16, 0, 0},
                             Shape{40, 8, 128, DType::bf16, true, 16, 0, 0},
                             Shape{16, 8, 64, DType::bf16, false, 16, 100, 0}}) {
    std::vector<int32_t> lengths = {900, 990};
    for (int i = 0; i < 210; ++i) lengths.push_back(1 + static_cast<int32_t>(rng() % 300));
    expect_rotates(shape, lengths, shape.head_dim, true, seed);
    if (HasFailure()) return;
    seed += 10;
  }
}

TEST(CudaAttention, SeesItsWindowAndNothingElse) {
  const Shape wide{4, 1, 64, DType::bf16, false, 16, 0, 0},
      narrow{4, 1, 64, DType::bf16, false, 16, 50, 0};
  Scene all(wide, {300}, 6), some(narrow, {300}, 6);
  const auto rows = [](Scene& s, int32_t n, Path path) { return s.run({{0, n, 1}}, path); };
  for (const Path path : {Path::chunks, Path::whole, Path::prefill, Path::mma}) {
    EXPECT_TRUE(same_bits(rows(all, 50, path), rows(some, 50, path)));
    EXPECT_FALSE(same_bits(rows(all, 51, path), rows(some, 51, path)));
    EXPECT_FALSE(same_bits(rows(all, 300, path), rows(some, 300, path)));
  }
}

TEST(CudaAttention, WrongArgumentsAreNamed) {
  const auto fails = [](cuda::AttnParams p, const std::string& culprit, int32_t query_len = 1) {
    try {
      cuda::attention_decode(p, query_len, 1, nullptr, this_card(), nullptr);
      ADD_FAILURE() << culprit;
    } catch (const std::invalid_argument& e) {
      EXPECT_NE(std::string(e.what()).find(culprit), std::string::npos) << e.what();
    }
    if (query_len > 1) return;
    EXPECT_THROW(cuda::attention_prefill_mma(p, 1, this_card(), nullptr), std::invalid_argument);
  };
  cuda::AttnParams good;
  good.q_stride = good.out_stride = 256;
  good.kv.dtype = DType::bf16;
  good.kv.num_kv_heads = 2;
  good.kv.head_dim = 64;
  good.kv.k_tile = 1;
  good.args = {4, 0.125f, 0, 0};
  const auto with = [&](auto change) {
    cuda::AttnParams p = good;
    change(p);
    return p;
  };
  fails(with([](auto& p) { p.kv.head_dim = 80; }), "head_dim 80");
  fails(with([](auto& p) { p.kv.block_size = 24; }), "block_size 24");
  fails(with([](auto& p) { p.kv.k_tile = 16; }), "k_tile 16");
  fails(with([](auto& p) { p.args.num_heads = 5; }), "num_heads 5");
  fails(with([](auto& p) { p.args.scale = 0; }), "scale 0");
  fails(with([](auto& p) { p.kv.k_scale = -1; }), "k_scale -1");
  fails(with([](auto& p) { p.args.softcap = -3; }), "softcap -3");
  fails(with([](auto& p) { p.args.window = -7; }), "window -7");
  fails(with([](auto& p) { p.dtype = DType::f32; }), "float32");
  fails(with([](auto& p) { p.kv.dtype = DType::f16; }), "float16");
  fails(with([](auto& p) { p.q_stride = 258; }), "aligned");
  fails(good, "5 query rows", 5);
}

}  // namespace
}  // namespace ni::test
