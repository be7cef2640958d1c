// Every operator but attention and the sampler, on every device of this machine, against loops in
// double precision. Where activations are 16-bit numbers, inputs are rounded first and results may
// be off by 2 of their units beside the error of fp32 arithmetic.
#include <algorithm>
#include <cstdlib>

#include "reference.h"

namespace ni::test {
namespace {

class OpTest : public testing::TestWithParam<std::string> {
 protected:
  // As the device's activations are.
  std::vector<float> randoms(size_t n, uint32_t seed, float scale = 1) const {
    return rounded(random_floats(n, seed, scale), type_);
  }
  bool on_cuda() const { return test::on_cuda(GetParam()); }

  Backend* backend_ = &shared_device(GetParam());
  const DType type_ = activation_type(GetParam());
};
INSTANTIATE_TEST_SUITE_P(Device, OpTest, testing::ValuesIn(device_names()), test_name);

// What only the CPU's kernels have.
class KernelTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Isa, KernelTest, testing::ValuesIn(isas()), test_name);

constexpr DType kFloatTypes[] = {DType::f32, DType::bf16, DType::f16};

struct Shape {
  int64_t m, n, k;
};

// -- linear --------------------------------------------------------------------------------------

void check_linear(const std::string& device, Shape s, DType dtype, bool bias, bool accumulate) {
  Backend& backend = shared_device(device);
  const DType type = activation_type(device);
  const auto values = random_floats(static_cast<size_t>(s.n * s.k), 1);
  const std::vector<float> w = rounded(values, dtype);
  auto x = rounded(random_floats(static_cast<size_t>(s.m * s.k), 2), type);
  TestWeight weight(backend, s.n, s.k, dtype, DType::f32, values);
  auto b = rounded(random_floats(static_cast<size_t>(s.n), 3), type);
  const auto old = rounded(random_floats(static_cast<size_t>(s.m * s.n), 4), type);
  if (bias) weight.weight.bias = b.data();
  Guarded in(s.m, s.k, x), out = accumulate ? Guarded(s.m, s.n, old) : Guarded(s.m, s.n);
  backend.linear(in.tensor(), weight.weight, {accumulate}, out.tensor());
  EXPECT_TRUE(in.intact());
  EXPECT_TRUE(out.intact());
  if (device == "avx512_bf16" && dtype == DType::bf16)
    for (float& v : x) v = rounded(v, DType::bf16);  // its documented arithmetic
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t c = 0; c < s.n; ++c) {
      Expected want = dot(x.data() + r * s.k, w.data() + c * s.k, s.k);
      const auto add = [&](float v) {
        want.value += static_cast<double>(v);
        want.magnitude += std::abs(static_cast<double>(v));
      };
      if (bias) add(b[static_cast<size_t>(c)]);
      if (accumulate) {  // the product is rounded before it is added
        if (type != DType::f32) want.magnitude += 2 * ulp(want.value, type) / (20 * kEps);
        add(old[static_cast<size_t>(r * s.n + c)]);
      }
      expect_close(out.at(r, c), want, testing::PrintToString(std::vector{r, c, s.m, s.n, s.k}),
                   type);
      if (testing::Test::HasFailure()) return;
    }
  }
}

TEST_P(OpTest, LinearMatchesDouble) {
  for (const DType dtype : weight_types(GetParam()))
    for (const Shape s : {Shape{1, 1, 1},
                          {1, 96, 64},
                          {2, 33, 7},
                          {3, 31, 129},
                          {5, 64, 40},
                          {7, 100, 33},
                          {12, 32, 256},
                          {13, 65, 31},
                          {37, 48, 96}})
      for (const bool bias : {false, true}) check_linear(GetParam(), s, dtype, bias, bias);
}

TEST_P(OpTest, LinearManyRowsAndLongSums) {
  for (const DType dtype : weight_types(GetParam())) {
    check_linear(GetParam(), {1030, 40, 10}, dtype, true,
                 true);  // more than one chunk of rows
    check_linear(GetParam(), {4, 34, 5001}, dtype, false, false);
  }
}

TEST_P(OpTest, LinearRandomShapes) {
  std::mt19937 rng(7);
  const std::vector<DType> types = weight_types(GetParam());
  const auto pick = [&](int64_t max) {
    return std::uniform_int_distribution<int64_t>(1, max)(rng);
  };
  for (size_t i = 0; i < 30; ++i)
    check_linear(GetParam(), {pick(40), pick(150), pick(200)}, types[i % types.size()],
                 pick(2) == 1, pick(2) == 1);
}

// Promise 1: a row alone, among others, by other threads: the same bits.
TEST_P(OpTest, LinearRowsAreIndependent) {
  const int64_t m = 1100, n = 70, k = 135;
  const auto values = random_floats(static_cast<size_t>(n * k), 1);
  Guarded x(m, k, random_floats(static_cast<size_t>(m * k), 2));
  Backend& three = shared_device(GetParam(), 3);
  for (const DType dtype : weight_types(GetParam())) {
    TestWeight w(*backend_, n, k, dtype, DType::bf16, values);
    Guarded all(m, n), one(m, n), some(m, n), threads(m, n);
    backend_->linear(x.tensor(), w.weight, {}, all.tensor());
    three.linear(x.tensor(), w.weight, {}, threads.tensor());
    for (int64_t r = 0; r < m; ++r)
      backend_->linear(x.tensor().rows(r, 1), w.weight, {}, one.tensor().rows(r, 1));
    int64_t size = 1;
    for (int64_t r = 0; r < m; r += size, size = size % 37 + 1)
      backend_->linear(x.tensor().rows(r, std::min(size, m - r)), w.weight, {},
                       some.tensor().rows(r, std::min(size, m - r)));
    for (int64_t r = 0; r < m; ++r) {
      ASSERT_TRUE(all.same_row(r, one, r)) << r;
      ASSERT_TRUE(all.same_row(r, some, r)) << r;
      ASSERT_TRUE(all.same_row(r, threads, r)) << r;
    }
  }
}

TEST_P(OpTest, LoadRowsConvertsAndEmbedReadsBack) {
  const int64_t n = 77, k = 39;
  const auto values = random_floats(static_cast<size_t>(n * k), 5),
             table = random_floats(static_cast<size_t>(9 * k), 6);
  const int32_t ids[] = {0, 76, 31, 32, 5}, positions[] = {8, 0, 3, 1, 1};
  StepInputs in;
  in.num_tokens = 5;
  in.token_ids = ids;
  in.positions = positions;
  for (const DType source : kFloatTypes) {
    for (const DType dtype : weight_types(GetParam())) {
      TestWeight w(*backend_, n, k, dtype, source, values);
      TestWeight p(*backend_, 9, k, dtype, source, table);
      Guarded plain(5, k), scaled(5, k);
      backend_->embed(in, w.weight, {}, plain.tensor());
      backend_->embed(in, w.weight, {3.0f, &p.weight}, scaled.tensor());
      EXPECT_TRUE(plain.intact() && scaled.intact());
      for (int t = 0; t < 5; ++t) {
        for (int64_t c = 0; c < k; ++c) {
          const auto stored = [&](const std::vector<float>& v, int64_t row) {
            return rounded(rounded(v[static_cast<size_t>(row * k + c)], source), dtype);
          };
          ASSERT_EQ(plain.at(t, c), stored(values, ids[t]));
          const float row = stored(values, ids[t]) * 3.0f, added = stored(table, positions[t]);
          if (!on_cuda()) {
            ASSERT_EQ(scaled.at(t, c), row + added);
          } else {
            const double want = static_cast<double>(row) + static_cast<double>(added);
            ASSERT_LE(std::abs(static_cast<double>(scaled.at(t, c)) - want), ulp(want, type_));
          }
        }
      }
    }
  }
}

// Special values survive: infinities, subnormals, values that round up a binade.
TEST_P(KernelTest, ConversionsMatchTheScalarOnes) {
  std::vector<float> v = {0.0f,    -0.0f,    1.0f,      65504.0f,    65520.0f,    -65519.0f,
                          1e-7f,   5.9e-8f,  3e-8f,     2.9e-8f,     6.1e-5f,     1e-40f,
                          3.4e38f, INFINITY, -INFINITY, 1.00390625f, 1.01171875f, 0.333333f};
  const auto more = random_floats(200, 8, 100);
  v.insert(v.end(), more.begin(), more.end());
  const auto n = static_cast<int64_t>(v.size());
  const KernelTable& kernels = select_kernels(GetParam());
  for (const DType dtype : kFloatTypes) {
    std::vector<char> bytes(v.size() * 4);
    std::vector<float> back(v.size(), NAN);
    kernels.store_floats(v.data(), n, dtype, bytes.data());
    kernels.load_floats(bytes.data(), dtype, n, back.data());
    for (size_t i = 0; i < v.size(); ++i) {
      float expected = rounded(v[i], dtype);
      if (dtype == DType::f16)  // stores saturate: an infinity in the cache would spread
        expected = std::clamp(expected, -65504.0f, 65504.0f);
      EXPECT_EQ(back[i], expected) << v[i];
    }
  }
}

// -- norms, activations, rows --------------------------------------------------------------------

TEST_P(OpTest, NormMatchesDouble) {
  for (const int64_t n : {1, 2, 15, 64, 100, 1024, 3333}) {
    for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
      if (kind == NormKind::layer && n < 2) continue;
      const int64_t rows = 37;
      const auto x = randoms(static_cast<size_t>(rows * n), 1, 3),
                 add = randoms(static_cast<size_t>(rows * n), 2);
      auto w = random_floats(static_cast<size_t>(n), 3),
           b = random_floats(static_cast<size_t>(n), 4);
      const bool bias = kind == NormKind::layer;
      const NormWeight weight{w.data(), bias ? b.data() : nullptr};
      const NormArgs args{kind, 1e-5f};
      Guarded in(rows, n, x), residual(rows, n, x), more(rows, n, add), out(rows, n),
          sum_out(rows, n), alone(1, n);
      backend_->norm(in.tensor(), weight, args, out.tensor());
      backend_->add_norm(more.tensor(), residual.tensor(), weight, args, sum_out.tensor());
      EXPECT_TRUE(in.intact() && residual.intact() && out.intact() && sum_out.intact());
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> row(static_cast<size_t>(n)), sum(row);
        for (int64_t i = 0; i < n; ++i) {
          const size_t at = static_cast<size_t>(r * n + i);
          row[static_cast<size_t>(i)] = static_cast<double>(x[at]);
          const float total = rounded(x[at] + add[at], type_);
          sum[static_cast<size_t>(i)] = static_cast<double>(total);
          ASSERT_EQ(residual.at(r, i), total);
        }
        const auto want = normalise(row, w, bias ? &b : nullptr, kind, 1e-5),
                   want_sum = normalise(sum, w, bias ? &b : nullptr, kind, 1e-5);
        for (int64_t i = 0; i < n; ++i) {
          const size_t at = static_cast<size_t>(i);
          // A mean of magnitude 10 may be taken off first.
          const double slack = 10 * std::abs(static_cast<double>(w[at])) + std::abs(want[at]) + 1;
          expect_close(out.at(r, i), {want[at], slack}, "norm", type_);
          expect_close(sum_out.at(r, i), {want_sum[at], slack + std::abs(want_sum[at])}, "add_norm",
                       type_);
        }
        backend_->norm(in.tensor().rows(r, 1), weight, args, alone.tensor());
        ASSERT_TRUE(alone.same_row(0, out, r));
      }
    }
  }
}

TEST_P(OpTest, NormInPlace) {
  Guarded x(3, 50, random_floats(150, 1)), copy = x, out(3, 50);
  auto w = random_floats(50, 2);
  backend_->norm(x.tensor(), {w.data(), nullptr}, {}, out.tensor());
  backend_->norm(copy.tensor(), {w.data(), nullptr}, {}, copy.tensor());
  for (int64_t r = 0; r < 3; ++r) EXPECT_TRUE(copy.same_row(r, out, r));
}

TEST_P(OpTest, ActivationMatchesDouble) {
  for (const Activation act :
       {Activation::silu, Activation::gelu_tanh, Activation::gelu, Activation::relu}) {
    for (const bool gated : {false, true}) {
      const int64_t n = 131, rows = 9, in_cols = gated ? 2 * n : n;
      auto x = randoms(static_cast<size_t>(rows * in_cols), 1, 4);
      x[0] = 200, x[1] = -200, x[2] = 0, x[3] = -90, x[4] = 88.5f, x[5] = -88.5f, x[6] = 1e-20f;
      x = rounded(x, type_);
      Guarded in(rows, in_cols, x), out(rows, n), alone(1, n);
      backend_->activation(in.tensor(), act, gated, out.tensor());
      EXPECT_TRUE(in.intact() && out.intact());
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
          const auto v = static_cast<double>(in.at(r, i)),
                     up = gated ? static_cast<double>(in.at(r, n + i)) : 1.0;
          // gelu_tanh's argument grows with x^3: its error is a relative one of the exponential.
          const double y = activate(v, act) * up;
          const double slack = std::abs(y) * (1 + std::min(std::abs(v * v * v), 90.0) / 4);
          // 1 + tanh is as exact as tanh is, far in the tail as well.
          const double tail = on_cuda() ? 2 * kEps * std::abs(v * up) : 0;
          EXPECT_LE(std::abs(static_cast<double>(out.at(r, i)) - y),
                    20 * kEps * slack + 2 * ulp(y, type_) + tail + 1e-14)
              << v << " " << up;
        }
        backend_->activation(in.tensor().rows(r, 1), act, gated, alone.tensor());
        ASSERT_TRUE(alone.same_row(0, out, r));
      }
    }
  }
}

TEST_P(OpTest, NanStaysNan) {
  for (const Activation act :
       {Activation::silu, Activation::gelu_tanh, Activation::gelu, Activation::relu}) {
    if (act == Activation::relu && GetParam() == "reference") continue;
    Guarded x(1, 20, std::vector<float>(20, NAN)), out(1, 20, std::vector<float>(20, 0.0f));
    backend_->activation(x.tensor(), act, false, out.tensor());
    for (int i = 0; i < 20; ++i) EXPECT_TRUE(std::isnan(out.at(0, i)));
  }
}

TEST_P(KernelTest, ExpIsAccurate) {
  const KernelTable& kernels = select_kernels(GetParam());
  std::vector<float> x, p;
  for (float v = -86.5f; v <= 0; v += 0.0137f) x.push_back(v);
  x.push_back(0);
  p.resize(x.size());
  const double sum = kernels.exp_sum(x.data(), static_cast<int64_t>(x.size()), 0, 1, p.data());
  double want = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double e = std::exp(static_cast<double>(x[i]));
    want += e;
    EXPECT_LE(std::abs(static_cast<double>(p[i]) - e), 1.5 * kEps * e) << x[i];
  }
  EXPECT_NEAR(sum, want, want * 2 * kEps);
  EXPECT_EQ(p.back(), 1.0f);
  const float special[] = {-INFINITY, NAN, -1000};
  kernels.exp_sum(special, 3, 0, 1, p.data());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(p[static_cast<size_t>(i)], 0.0f);
}

TEST_P(OpTest, GatherRows) {
  Guarded x(6, 13, randoms(78, 1)), out(4, 13);
  const int32_t rows[] = {5, 0, 0, 3};
  backend_->gather_rows(x.tensor(), rows, 4, out.tensor());
  EXPECT_TRUE(out.intact());
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(out.same_row(i, x, rows[i]));
  const int32_t bad[] = {6};
  EXPECT_THROW(backend_->gather_rows(x.tensor(), bad, 1, out.tensor().rows(1)),
               std::invalid_argument);
}

// -- RoPE and the cache --------------------------------------------------------------------------

struct RopeCase {
  int32_t heads, kv_heads, head_dim, rotary_dim, block_size;
  bool norm;
};

void check_rope(const std::string& device, const RopeCase& c, DType dtype) {
  Backend& backend = shared_device(device);
  const DType type = activation_type(device);
  const int32_t num_blocks = 9, tokens = 7, half = c.rotary_dim / 2, d = c.head_dim;
  const int32_t cols = (c.heads + 2 * c.kv_heads) * d;
  const auto x = rounded(random_floats(static_cast<size_t>(tokens * cols), 1), type);
  const auto cos = random_floats(static_cast<size_t>(20 * half), 2),
             sin = random_floats(static_cast<size_t>(20 * half), 3);
  auto qw = random_floats(static_cast<size_t>(d), 4), kw = random_floats(static_cast<size_t>(d), 5);
  const int32_t positions[] = {3, 4, 5, 19, 0, 1, 2};
  const int64_t last = num_blocks * c.block_size - 1;
  const int64_t slots[] = {last, 0, 2, -1, 3, -1, last / 2};
  StepInputs in;
  in.num_tokens = tokens;
  in.positions = positions;
  in.slot_mapping = slots;
  KvView kv{nullptr, nullptr, dtype, num_blocks, c.block_size, c.kv_heads, d};
  kv.k_tile = backend.info().k_tile;
  if (dtype == DType::fp8_e4m3) kv.k_scale = 0.5f, kv.v_scale = 2.0f;
  const size_t elements = static_cast<size_t>(num_blocks * kv.block_elements());
  const auto before = encode(random_floats(elements, 6), dtype);
  const BackendBytes k_memory(backend, before), v_memory(backend, before);
  kv.k = k_memory.data();
  kv.v = v_memory.data();
  RopeArgs args;
  if (c.rotary_dim > 0)
    args.cos = cos.data(), args.sin = sin.data(), args.rotary_dim = c.rotary_dim;
  if (c.norm) args.q_norm.weight = qw.data(), args.k_norm.weight = kw.data();
  Guarded qkv(tokens, cols, x);
  backend.rope_kv_write(qkv.tensor(), in, args, kv);
  EXPECT_TRUE(qkv.intact());
  const std::vector<char> k = k_memory.read(), v = v_memory.read();

  std::vector<char> want_k = before, want_v = before;  // slots without a token keep their bytes
  const auto bytes = static_cast<int64_t>(dtype_size(dtype));
  for (int32_t t = 0; t < tokens; ++t) {
    for (int32_t h = 0; h < c.heads + c.kv_heads; ++h) {
      std::vector<double> row(static_cast<size_t>(d));
      for (int32_t i = 0; i < d; ++i)
        row[static_cast<size_t>(i)] =
            static_cast<double>(x[static_cast<size_t>(t * cols + h * d + i)]);
      if (c.norm) row = normalise(row, h < c.heads ? qw : kw, nullptr, NormKind::rms, 1e-6);
      std::vector<Expected> want(static_cast<size_t>(d));
      for (int32_t i = 0; i < d; ++i) {
        const double a = row[static_cast<size_t>(i)];
        want[static_cast<size_t>(i)] = {a, std::abs(a)};
        if (i >= c.rotary_dim) continue;
        const double b = row[static_cast<size_t>(i < half ? i + half : i - half)];
        const size_t at = static_cast<size_t>(positions[t] * half + i % half);
        const double co = static_cast<double>(cos[at]), si = static_cast<double>(sin[at]);
        want[static_cast<size_t>(i)] = {a * co + (i < half ? -b * si : b * si),
                                        std::abs(a * co) + std::abs(b * si)};
      }
      const int64_t slot = slots[t];
      for (int32_t i = 0; i < d; ++i) {
        if (h < c.heads) {
          expect_close(qkv.at(t, h * d + i), want[static_cast<size_t>(i)], "q", type);
        } else if (slot >= 0) {
          const auto in_block = static_cast<int32_t>(slot % c.block_size);
          const int64_t to_k = kv.k_offset(slot / c.block_size, h - c.heads, in_block, i) * bytes;
          Expected e = want[static_cast<size_t>(i)];
          e.value /= static_cast<double>(kv.k_scale);
          e.magnitude /= static_cast<double>(kv.k_scale);
          EXPECT_LE(std::abs(static_cast<double>(decode(k.data() + to_k, dtype)) - e.value),
                    ulp(e.value, dtype) / 1.99 + 20 * kEps * e.magnitude);
          std::memcpy(want_k.data() + to_k, k.data() + to_k, static_cast<size_t>(bytes));
          const auto value = encode(
              {x[static_cast<size_t>(t * cols + (h + c.kv_heads) * d + i)] / kv.v_scale}, dtype);
          std::memcpy(
              want_v.data() + kv.v_offset(slot / c.block_size, h - c.heads, in_block, i) * bytes,
              value.data(), static_cast<size_t>(bytes));
        }
      }
    }
  }
  EXPECT_EQ(k, want_k);
  EXPECT_EQ(v, want_v);
}

TEST_P(OpTest, RopeAndCacheWrite) {
  const std::vector<RopeCase> any{{4, 2, 64, 64, 16, true},
                                  {3, 1, 10, 6, 4, false},
                                  {2, 2, 32, 0, 32, false},
                                  {8, 2, 18, 18, 1, true},
                                  {1, 1, 128, 64, 48, true}};
  const std::vector<RopeCase> cuda{{4, 2, 64, 64, 16, true},   {3, 1, 96, 72, 16, false},
                                   {2, 2, 128, 0, 32, false},  {8, 2, 256, 256, 64, true},
                                   {5, 1, 128, 128, 16, true}, {3, 3, 64, 0, 16, false},
                                   {1, 1, 128, 64, 48, true}};
  for (const DType dtype : cache_types(GetParam()))
    for (const RopeCase& c : on_cuda() ? cuda : any) check_rope(GetParam(), c, dtype);
}

TEST_P(OpTest, CopyBlocks) {
  for (const DType dtype : cache_types(GetParam())) {
    for (const int gap : {1, 3}) {  // in a cache of several layers: above 1
      KvView kv{nullptr, nullptr, dtype, 6, 4, 2, 6, 0};
      if (on_cuda()) kv.block_size = 16, kv.head_dim = 64;
      kv.k_tile = backend_->info().k_tile;
      const auto block = static_cast<size_t>(kv.block_elements()) * dtype_size(dtype);
      const auto stride = static_cast<size_t>(gap) * block;
      if (gap > 1) kv.block_stride = gap * kv.block_elements();
      const auto elements = static_cast<size_t>(6 * gap * kv.block_elements());
      auto want_k = encode(random_floats(elements, 1), dtype),
           want_v = encode(random_floats(elements, 2), dtype);
      const BackendBytes k(*backend_, want_k), v(*backend_, want_v);
      kv.k = k.data();
      kv.v = v.data();
      const BlockCopy copies[] = {{1, 4}, {5, 0}};
      for (const auto& [src, dst] : copies) {
        for (auto* want : {&want_k, &want_v})
          std::memcpy(want->data() + static_cast<size_t>(dst) * stride,
                      want->data() + static_cast<size_t>(src) * stride, block);
      }
      StepInputs in;
      in.num_copies = 2;
      in.copies = copies;
      backend_->copy_blocks(in, kv);
      EXPECT_EQ(k.read(), want_k);
      EXPECT_EQ(v.read(), want_v);
      const BlockCopy bad[] = {{1, 6}};
      in.num_copies = 1;
      in.copies = bad;
      EXPECT_THROW(backend_->copy_blocks(in, kv), std::invalid_argument);
    }
  }
}

// -- Wrong calls throw ---------------------------------------------------------------------------

TEST_P(OpTest, WrongShapesThrow) {
  TestWeight w(*backend_, 8, 6, weight_types(GetParam())[0], DType::f32, random_floats(48, 1));
  Guarded x(2, 6, random_floats(12, 1)), out(2, 8), narrow(2, 5);
  EXPECT_THROW(backend_->linear(narrow.tensor(), w.weight, {}, out.tensor()),
               std::invalid_argument);
  EXPECT_THROW(backend_->linear(x.tensor(), w.weight, {}, narrow.tensor()), std::invalid_argument);
  EXPECT_THROW(backend_->linear(x.tensor(), w.weight, {}, out.tensor().rows(1)),
               std::invalid_argument);
  Tensor half = x.tensor();
  half.dtype = DType::bf16;
  EXPECT_THROW(backend_->linear(half, w.weight, {}, out.tensor()), std::invalid_argument);
  EXPECT_THROW(backend_->load_rows(w.weight, 7, x.tensor()), std::invalid_argument);
  EXPECT_THROW(backend_->norm(x.tensor(), {nullptr, nullptr}, {}, x.tensor()),
               std::invalid_argument);
  EXPECT_THROW(backend_->activation(x.tensor(), Activation::silu, true, out.tensor()),
               std::invalid_argument);
  const int32_t ids[] = {1, 8};
  StepInputs in;
  in.num_tokens = 2;
  in.token_ids = ids;
  EXPECT_THROW(backend_->embed(in, w.weight, {}, x.tensor()), std::invalid_argument);
  backend_->linear(x.tensor().rows(0), w.weight, {},
                   out.tensor().rows(0));  // nothing to do is fine
}

// A card's kernels know 16-bit weights of one type, plain K rows and some head sizes.
TEST_P(OpTest, WhatADeviceCannotRunIsRefused) {
  KvView kv{nullptr, nullptr, cache_types(GetParam())[0], 4, 16, 2, 64};
  kv.k_tile = backend_->info().k_tile;
  const DType weights = weight_types(GetParam())[0];
  backend_->check_model(weights, 4, {64}, kv);
  const auto refused = [&](DType dtype, KvView view, const std::string& supported) {
    try {
      backend_->check_model(dtype, 4, {64}, view);
      FAIL() << "nothing thrown; wanted a word of " << supported;
    } catch (const std::invalid_argument& e) {
      EXPECT_NE(std::string(e.what()).find(supported), std::string::npos) << e.what();
    }
  };
  KvView other = kv;
  if (!on_cuda()) {
    other.dtype = DType::fp8_e4m3;
    return refused(weights, other, "bfloat16");
  }
  refused(DType::f32, kv, "bfloat16");
  other.dtype = DType::f32;
  refused(weights, other, "fp8_e4m3");
  other = kv;
  other.head_dim = 80;
  refused(weights, other, "128");
  other = kv;
  other.block_size = 8;
  refused(weights, other, "16");
}

TEST(Isa, UnknownNamesListTheUsableOnes) {
  try {
    select_kernels("sse9");
    FAIL();
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("'sse9'"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("portable, reference"), std::string::npos);
  }
  EXPECT_EQ(isas().back(), "reference");
}

TEST(Isa, TheEnvironmentChoosesWhenTheCallerDoesNot) {
  setenv("NANO_INFERENCE_CPU_ISA", "reference", 1);
  EXPECT_STREQ(select_kernels("").isa, "reference");
  EXPECT_STREQ(select_kernels("portable").isa, "portable");
  setenv("NANO_INFERENCE_CPU_ISA", "mmx", 1);
  EXPECT_THROW(select_kernels(""), std::invalid_argument);
  unsetenv("NANO_INFERENCE_CPU_ISA");
  EXPECT_EQ(select_kernels("").isa, isas().front());
}

// -- 8-bit floats --------------------------------------------------------------------------------

TEST(Fp8, EveryValueIsWhatTheFormatSays) {
  for (int bits = 0; bits < 256; ++bits) {
    const float got = to_float(fp8{static_cast<uint8_t>(bits)});
    const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
    if ((bits & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(got));
      EXPECT_EQ(to_fp8(got).bits, 0x7f);
      continue;
    }
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    EXPECT_EQ(static_cast<double>(got), bits < 128 ? magnitude : -magnitude);
    EXPECT_EQ(std::signbit(got), bits >= 128);
    EXPECT_EQ(to_fp8(got).bits, bits);
  }
}

TEST(Fp8, RoundsToTheNearestAndToEven) {
  const auto nearest = [](float v) {  // by looking at all numbers of v's sign
    uint8_t best = std::signbit(v) ? 0x80 : 0;
    double off = INFINITY;
    for (int bits = best; bits < best + 0x7f; ++bits) {
      const double there = static_cast<double>(to_float(fp8{static_cast<uint8_t>(bits)}));
      const double now = std::abs(there - static_cast<double>(v));
      if (now < off || (now == off && bits % 2 == 0)) off = now, best = static_cast<uint8_t>(bits);
    }
    return best;
  };
  std::vector<float> values{0.0f, 447.9f, 448.0f, 1e-9f, 1e-40f, 0x1p-10f, 0x1.000002p-10f};
  for (int bits = 0; bits < 0x7e; ++bits) {  // the middles and their neighbours
    const float low = to_float(fp8{static_cast<uint8_t>(bits)});
    const float middle = (low + to_float(fp8{static_cast<uint8_t>(bits + 1)})) / 2;
    values.insert(values.end(),
                  {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e3f)});
  }
  const auto more = random_floats(3000, 1, 30);
  values.insert(values.end(), more.begin(), more.end());
  for (const float v : values) {
    for (const float x : {v, -v, v / 4096}) {
      EXPECT_EQ(int{to_fp8(x).bits}, int{nearest(x)}) << x;
    }
  }
  for (const float large : {449.0f, 464.1f, 1e30f, INFINITY}) {
    EXPECT_EQ(to_fp8(large).bits, 0x7e) << "saturates";
    EXPECT_EQ(to_fp8(-large).bits, 0xfe) << "saturates";
  }
}

TEST(Memory, AllocIsZeroAlignedAndBounded) {
  const auto backend = make_cpu("portable");
  EXPECT_GT(backend->memory_available(), 0u);
  EXPECT_GE(backend->info().memory_total, backend->memory_available());
  const Buffer b = backend->alloc(1 << 20);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b.data()) % 64, 0u);
  for (size_t i = 0; i < b.bytes(); ++i) ASSERT_EQ(b.data()[i], 0);
  try {
    backend->alloc(size_t{1} << 60);
    FAIL();
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find("1152921504606846976"), std::string::npos);
  }
}

}  // namespace
}  // namespace ni::test
