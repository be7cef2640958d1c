// Matrix products: our kernel and cuBLASLt's plans against double, and against each other bit for
// bit; the cache of plans.
#include "cuda/linear.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "../draw_reference.h"
#include "device_array.h"

namespace ni::test {
namespace {

using cuda::Linear;

// A weight with its bias, on the device and as what the device has.
struct Weight {
  Weight(int64_t n, int64_t k, DType dtype, bool bias, uint32_t seed, float scale = 1)
      : stride(Linear::weight_stride(k)),
        memory(n, stride, dtype),
        bias_memory(static_cast<size_t>(bias ? n : 1)) {
    w.spec = {n, k, dtype, bias};
    const auto raw = normal_floats(static_cast<size_t>(n * k), seed, scale);
    std::vector<float> padded(static_cast<size_t>(n * stride), 0.0f);
    for (int64_t r = 0; r < n; ++r)
      std::copy_n(&raw[static_cast<size_t>(r * k)], k, &padded[static_cast<size_t>(r * stride)]);
    memory.fill(padded);
    values = memory.read();
    w.data = memory.data();
    if (bias) {
      biases = normal_floats(static_cast<size_t>(n), seed + 1);
      bias_memory.upload(biases.data(), biases.size() * 4);
      w.bias = bias_memory.data();
    }
  }
  int64_t stride;
  DeviceMatrix memory;
  DeviceArray<float> bias_memory;
  std::vector<float> values, biases;
  LinearWeight w;
};

// Rows of x on the device; what lies between them is finite and not zero.
struct Rows {
  Rows(int64_t m, int64_t k, DType dtype, uint32_t seed)
      : stride((k + 7) / 8 * 8 + 16), memory(m, stride, dtype) {
    memory.fill(normal_floats(static_cast<size_t>(m * stride), seed));
    values = memory.read();
    tensor = Tensor(memory.data(), dtype, {m, k});
    tensor.row_stride = stride;
  }
  int64_t stride;
  DeviceMatrix memory;
  std::vector<float> values;
  Tensor tensor;
};

struct Out {
  Out(int64_t m, int64_t n, DType dtype) : stride((n + 7) / 8 * 8 + 8), memory(m, stride, dtype) {
    tensor = Tensor(memory.data(), dtype, {m, n});
    tensor.row_stride = stride;
  }
  int64_t stride;
  DeviceMatrix memory;
  Tensor tensor;
};

float to_type(float v, DType dtype) {
  return decode_floats(encode_floats({v}, dtype), dtype)[0];
}

double ulp(double v, DType dtype) {
  const int bits = dtype == DType::bf16 ? 7 : dtype == DType::f16 ? 10 : 23;
  return std::ldexp(1.0, std::ilogb(std::max(std::abs(v), 1e-4)) - bits);
}

// The relative rule: at most twice the error of a plain fp32 loop, and two units of the output.
void expect_right(const Rows& x, const Weight& w, const std::vector<float>& got, int64_t out_stride,
                  DType out_dtype, const std::vector<float>* before = nullptr) {
  const auto [n, k, dtype, bias] = w.w.spec;
  double worst = 0, worst_naive = 0;
  for (int64_t r = 0; r < x.tensor.rows(); ++r) {
    for (int64_t c = 0; c < n; ++c) {
      double want = 0, magnitude = 0;
      float naive = 0;
      for (int64_t i = 0; i < k; ++i) {
        const float a = x.values[static_cast<size_t>(r * x.stride + i)];
        const float b = w.values[static_cast<size_t>(c * w.stride + i)];
        want += static_cast<double>(a) * static_cast<double>(b);
        magnitude += std::abs(static_cast<double>(a) * static_cast<double>(b));
        naive += a * b;
      }
      const float extra = bias ? to_type(w.biases[static_cast<size_t>(c)], dtype) : 0.0f;
      want += static_cast<double>(extra);
      naive = to_type(naive + extra, out_dtype);
      double slack = 2 * ulp(want, out_dtype);
      if (before != nullptr) {  // both the product and the sum are rounded
        const float there = (*before)[static_cast<size_t>(r * out_stride + c)];
        want += static_cast<double>(there);
        naive = to_type(naive + there, out_dtype);
        slack += 2 * ulp(want, out_dtype);
      }
      const float value = got[static_cast<size_t>(r * out_stride + c)];
      ASSERT_FALSE(std::isnan(value)) << r << ", " << c;
      const double off = std::abs(static_cast<double>(value) - want);
      if (out_dtype == DType::f32) {
        ASSERT_LE(off, 20 * 1.1920929e-7 * magnitude + 1e-6) << r << ", " << c;
      } else {
        ASSERT_LE(off, 2 * std::abs(static_cast<double>(naive) - want) + slack +
                           20 * 1.1920929e-7 * magnitude)
            << r << ", " << c << " of " << n << " x " << k;
      }
      worst = std::max(worst, off);
      worst_naive = std::max(worst_naive, std::abs(static_cast<double>(naive) - want));
    }
  }
  if (out_dtype != DType::f32) {
    EXPECT_LE(worst, 2 * worst_naive + 1e-3);
  }
}

// The bytes of one row of a result.
std::vector<char> row_bytes(const Out& out, int64_t row) {
  std::vector<char> all(out.memory.bytes());
  out.memory.download(all.data(), all.size());
  const auto size = static_cast<int64_t>(dtype_size(out.tensor.dtype));
  const auto begin = all.begin() + row * out.stride * size;
  return {begin, begin + out.tensor.cols() * size};
}

class LinearTest : public testing::TestWithParam<DType> {
 protected:
  cuda::SkinnyArgs skinny_args(const Rows& x, const Weight& w, const Out& out) {
    cuda::SkinnyArgs a;
    a.x = x.tensor.data;
    a.x_stride = x.stride;
    a.rows = x.tensor.rows();
    a.w = w.w.data;
    a.w_stride = w.stride;
    a.in_features = w.w.spec.in_features;
    a.out_features = w.w.spec.out_features;
    a.bias = w.w.bias;
    a.dtype = GetParam();
    a.out = out.tensor.data;
    a.out_dtype = out.tensor.dtype;
    a.out_stride = out.stride;
    return a;
  }
  void skinny(const Rows& x, const Weight& w, const Out& out) {
    cuda::linear_skinny(skinny_args(x, w, out), card_, nullptr);
  }
  void check_fused(const std::vector<std::array<int64_t, 3>>& shapes);
  std::unique_ptr<Linear> linear(bool invariant, const std::string& cache = "") {
    Linear::Options o;
    o.dtype = GetParam();
    o.batch_invariant = invariant;
    o.plan_cache = cache;
    return std::make_unique<Linear>(card_, o, stream_);
  }
  ~LinearTest() override { cudaStreamDestroy(stream_); }
  const cuda::Card card_ = this_card();
  // Plans are timed as graphs, which the default stream cannot capture. What the tests launch there
  // is ordered with this one.
  cudaStream_t stream_ = [] {
    cudaStream_t stream = nullptr;
    check_device(cudaStreamCreate(&stream));
    return stream;
  }();

  // The units of logits that are there, when nothing else is asked for.
  void expect_same_units(Linear& l, const Rows& x, const Weight& w, const Out& out) {
    const int64_t m = x.tensor.rows(), n = w.w.spec.out_features;
    const DeviceArray<SamplingRow> sampling(std::vector<SamplingRow>(static_cast<size_t>(m)));
    StepInputs inputs;
    inputs.num_logits = static_cast<int32_t>(m);
    inputs.sampling = sampling.data();
    const DeviceArray<StepInputs> step(std::vector<StepInputs>{inputs});
    const auto count = static_cast<size_t>(m * cuda::logit_units(n));
    DeviceArray<cuda::LogitUnit> units(count), want(count);
    units.poison();
    want.poison();
    if (!l.run(x.tensor, w.w, {}, out.tensor, nullptr, false, {units.data(), step.data(), 0, true}))
      return;
    cuda::sum_up_logits(static_cast<const float*>(out.tensor.data), out.stride, m, n,
                        {want.data(), step.data(), 0}, nullptr);
    const auto got = units.read(), right = want.read();
    EXPECT_EQ(0, std::memcmp(got.data(), right.data(), count * sizeof(got[0]))) << m << " x " << n;
    EXPECT_TRUE(units.intact());
  }
  // What the sampler wants of every 16 logits, as if it had read them itself, and as in double; by
  // all kernels that make it, beside the logits and alone.
  void expect_units(int64_t m, int64_t n, int64_t k, uint32_t seed) {
    constexpr int32_t kFirst = 3;
    const Weight w(n, k, GetParam(), m % 4 == 0, ++seed, 0.2f);
    Rows x(m, k, GetParam(), ++seed);
    if (m > 2) {  // a row of NaN
      std::fill_n(x.values.begin() + x.stride, k, NAN);
      if (m > 8) x.values[static_cast<size_t>(3 * x.stride + 1)] = INFINITY;
      x.memory.fill(x.values);
    }
    Out out(m, n, DType::f32);
    std::vector<SamplingRow> sampled(static_cast<size_t>(kFirst + m));
    for (size_t r = 0; r < sampled.size(); ++r) {
      sampled[r].temperature = std::array{0.0f, 0.6f, 1.0f, 7.0f, 0.01f}[r % 5];
      sampled[r].seed = 77 * r;
      sampled[r].position = static_cast<int32_t>(r % 11);
    }
    const DeviceArray<SamplingRow> sampling(sampled);
    StepInputs inputs;
    inputs.num_logits = static_cast<int32_t>(sampled.size());
    inputs.sampling = sampling.data();
    const DeviceArray<StepInputs> step(std::vector<StepInputs>{inputs});
    const auto per_row = static_cast<size_t>(cuda::logit_units(n));
    DeviceArray<cuda::LogitUnit> units(static_cast<size_t>(m) * per_row),
        want(static_cast<size_t>(m) * per_row);
    const auto l = linear(true);
    DeviceArray<float> norm_weight(normal_floats(static_cast<size_t>(k), ++seed));
    const NormWeight norm{norm_weight.data(), nullptr};
    for (const bool normalises : {false, true}) {
      LinearArgs a;
      if (normalises) a.norm = &norm;
      if (normalises && !l->fuses(w.w, a, m)) continue;
      units.poison();
      want.poison();
      const cuda::LogitUnits wanted{units.data(), step.data(), kFirst};
      const bool made = l->run(x.tensor, w.w, a, out.tensor, nullptr, false, wanted);
      ASSERT_EQ(made, card_.arch == 90);
      if (!made) continue;
      cuda::sum_up_logits(static_cast<const float*>(out.tensor.data), out.stride, m, n,
                          {want.data(), step.data(), kFirst}, nullptr);
      EXPECT_TRUE(units.intact() && out.memory.intact());
      const auto got = units.read(), right = want.read();
      const auto expect_right = [&](const std::vector<cuda::LogitUnit>& all) {
        for (size_t i = 0; i < all.size(); ++i)
          ASSERT_EQ(0, std::memcmp(&all[i], &right[i], sizeof(all[i])))
              << m << " x " << n << ": row " << i / per_row << " unit " << i % per_row << ", "
              << all[i].max << " " << all[i].mass() << " " << all[i].choice() << ", not "
              << right[i].max << " " << right[i].mass() << " " << right[i].choice();
      };
      expect_right(got);
      const std::vector<float> logits = out.memory.read();
      // Alone, by every kernel that makes them.
      out.memory.fill(std::vector<float>(logits.size(), 5.0f));
      const auto expect_alone = [&](const auto& run) {
        units.poison();
        run();
        EXPECT_TRUE(units.intact());
        expect_right(units.read());
        for (const float v : out.memory.read()) ASSERT_EQ(v, 5.0f) << "written";
      };
      cuda::LogitUnits alone = wanted;
      alone.only = true;
      expect_alone(
          [&] { EXPECT_TRUE(l->run(x.tensor, w.w, a, out.tensor, nullptr, false, alone)); });
      cuda::SkinnyArgs args = skinny_args(x, w, out);
      args.units = alone;
      if (!normalises && cuda::makes_units_large(args, card_))
        expect_alone([&] { cuda::linear_large_sm90(args, nullptr, card_, nullptr); });
      for (const size_t r : {size_t{0}, static_cast<size_t>(m) / 2, static_cast<size_t>(m) - 1})
        for (size_t u = 0; 16 * u < static_cast<size_t>(n); ++u) {
          const float* z = &logits[r * static_cast<size_t>(out.stride) + 16 * u];
          const size_t count = std::min<size_t>(16, static_cast<size_t>(n) - 16 * u);
          double max = -INFINITY;
          size_t first = 0;  // of the largest
          for (size_t i = count; i-- > 0;)
            if (z[i] == z[i] && static_cast<double>(z[i]) >= max)
              max = static_cast<double>(z[i]), first = i;
          const SamplingRow& row = sampled[kFirst + r];
          const auto t = static_cast<double>(row.temperature);
          const cuda::LogitUnit& unit = got[r * per_row + u];
          const auto choice = static_cast<size_t>(unit.choice());
          ASSERT_EQ(static_cast<double>(unit.max), max) << r << " " << u;
          if (t <= 0 || max == INFINITY) {
            ASSERT_TRUE(choice == first || max == -INFINITY) << r << " " << u;
            continue;
          }
          std::vector<double> p(count);
          double mass = 0;
          for (size_t i = 0; i < count; ++i) {
            if (z[i] > -INFINITY) p[i] = std::exp((static_cast<double>(z[i]) - max) / t);
            mass += p[i];
          }
          ASSERT_NEAR(static_cast<double>(unit.mass()), mass, 1e-4 * mass + 1e-6) << r << " " << u;
          if (mass > 0) {
            ASSERT_TRUE(choice < count && wins_its_unit(p, row, choice, 1e-4)) << r << " " << u;
          }
        }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Types, LinearTest, testing::Values(DType::bf16, DType::f16),
                         [](const auto& i) { return std::string(dtype_name(i.param)); });

TEST_P(LinearTest, SkinnyMatchesDouble) {
  uint32_t seed = 0;
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{{1, 8, 16},
                                                                   {1, 1, 1},
                                                                   {2, 33, 7},
                                                                   {5, 70, 257},
                                                                   {8, 128, 512},
                                                                   {9, 40, 1000},
                                                                   {17, 65, 300},
                                                                   {33, 24, 130},
                                                                   {64, 200, 128},
                                                                   {100, 48, 64},
                                                                   {1, 1024, 3072}}) {
    for (const bool bias : {false, true}) {
      for (const DType out_dtype : {GetParam(), DType::f32}) {
        const Weight w(n, k, GetParam(), bias, ++seed);
        const Rows x(m, k, GetParam(), ++seed);
        const Out out(m, n, out_dtype);
        skinny(x, w, out);
        expect_right(x, w, out.memory.read(), out.stride, out_dtype);
        EXPECT_TRUE(out.memory.intact() && x.memory.intact());
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(LinearTest, AccumulatesIntoTheOutput) {
  for (const int64_t m : {1, 12, 100}) {
    const Weight w(72, 96, GetParam(), m == 12, 1);
    const Rows x(m, 96, GetParam(), 2);
    Out out(m, 72, GetParam());
    out.memory.fill(normal_floats(out.memory.bytes() / 2, 3));
    const auto before = out.memory.read();
    linear(true)->run(x.tensor, w.w, {.accumulate = true}, out.tensor, nullptr);
    expect_right(x, w, out.memory.read(), out.stride, GetParam(), &before);
  }
}

// More than a ring of stages, more tiles than multiprocessors, gates and norms that end within one.
TEST_P(LinearTest, ManyShapesHaveTheBitsOfTheOlderKernel) {
  cuda::Card older = card_;
  older.arch = 80;  // cp.async, on the same card
  uint32_t seed = 50;
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{
           {1, 6144, 4096},  {3, 4096, 14336}, {8, 28672, 512},   {16, 30001, 192},
           {12, 1024, 3072}, {30, 5000, 576},  {64, 2048, 1088},  {64, 1024, 3072},
           {33, 4096, 256},  {64, 28672, 512}, {20, 96, 64},      {150, 520, 320},
           {65, 1003, 192},  {128, 1024, 640}, {120, 28672, 128}, {130, 6144, 192},
           {190, 4096, 128}, {256, 6144, 320}, {65, 4096, 128},   {129, 4096, 192},
           {192, 4096, 128}, {240, 4096, 64},  {50, 1000, 192},   {200, 8192, 64}}) {
    const Weight w(n, k, GetParam(), m % 2 == 0, ++seed, 0.05f);
    const Rows x(m, k, GetParam(), ++seed);
    const Out out(m, n, GetParam()), want(m, n, GetParam());
    for (const bool accumulate : {false, true}) {
      cuda::SkinnyArgs a = skinny_args(x, w, out), b = skinny_args(x, w, want);
      a.accumulate = b.accumulate = accumulate;
      cuda::linear_skinny(a, card_, nullptr);
      cuda::linear_skinny(b, older, nullptr);
      for (int64_t r = 0; r < m; ++r)
        ASSERT_EQ(row_bytes(out, r), row_bytes(want, r))
            << m << " x " << n << " x " << k << ": " << r;
      EXPECT_TRUE(out.memory.intact() && x.memory.intact());
    }
  }
}

// The norm before, the gate and the addition after a product: the bits of operators of their own.
void LinearTest::check_fused(const std::vector<std::array<int64_t, 3>>& shapes) {
  if (card_.arch != 90) GTEST_SKIP() << "nothing is fused on this card";
  uint32_t seed = 80;
  for (const auto& [m, n, k] : shapes) {
    const Rows x(m, k, GetParam(), ++seed);
    const Weight w(n, k, GetParam(), m % 2 == 0, ++seed, 0.05f);
    DeviceArray<float> norm_weight(normal_floats(static_cast<size_t>(k), ++seed));
    const NormWeight norm{norm_weight.data(), nullptr};
    const NormArgs norm_args{NormKind::rms, 1e-5f};
    const auto l = linear(true);
    Rows normed(m, k, GetParam(), ++seed);
    cuda::norm(x.tensor.data, x.stride, nullptr, 0, m, k, norm, norm_args, GetParam(),
               normed.tensor.data, normed.stride, false, nullptr);
    const Out product(m, n, GetParam());
    skinny(normed, w, product);

    LinearArgs with_norm;
    with_norm.norm = &norm;
    with_norm.norm_args = norm_args;
    ASSERT_EQ(l->fuses(w.w, with_norm, m), m <= 16);
    for (const DType to : {GetParam(), DType::f32}) {
      if (m > 16) break;
      const Out out(m, n, to), want(m, n, to);
      skinny(normed, w, want);
      l->run(x.tensor, w.w, with_norm, out.tensor, nullptr);
      for (int64_t r = 0; r < m; ++r)
        ASSERT_EQ(row_bytes(out, r), row_bytes(want, r)) << n << " " << r;
    }

    for (const Activation act : {Activation::silu, Activation::gelu_tanh}) {
      const Out own(m, n / 2, GetParam());
      cuda::activation(product.tensor.data, product.stride, m, n / 2, act, true, GetParam(),
                       own.tensor.data, own.stride, nullptr);
      for (const bool normalises : {false, true}) {
        if (normalises && m > 16) continue;
        LinearArgs gated = normalises ? with_norm : LinearArgs{};
        gated.gated = true;
        gated.act = act;
        ASSERT_EQ(l->fuses(w.w, gated, m), m <= 64);
        const Out together(m, n / 2, GetParam());
        if (m <= 64) {
          l->run((normalises ? x : normed).tensor, w.w, gated, together.tensor, nullptr);
        } else {  // nobody has timed it
          cuda::SkinnyArgs a = skinny_args(normed, w, together);
          a.gated = true;
          a.act = act;
          cuda::linear_skinny(a, card_, nullptr);
        }
        for (int64_t r = 0; r < m; ++r)
          ASSERT_EQ(row_bytes(together, r), row_bytes(own, r)) << n << " " << r;
        EXPECT_TRUE(together.memory.intact());
      }
    }

    // residual = round(residual + round(x W^T)): what the norm kernel leaves there.
    const auto before = normal_floats(static_cast<size_t>(m * product.stride), ++seed);
    Out residual(m, n, GetParam()), sum(m, n, GetParam());
    const Out unused(m, n, GetParam());
    residual.memory.fill(before);
    sum.memory.fill(before);
    DeviceArray<float> ones(std::vector<float>(static_cast<size_t>(n), 1.0f));
    cuda::norm(product.tensor.data, product.stride, residual.tensor.data, residual.stride, m, n,
               {ones.data(), nullptr}, norm_args, GetParam(), unused.tensor.data, unused.stride,
               true, nullptr);
    l->run(normed.tensor, w.w, {.accumulate = true}, sum.tensor, nullptr);
    for (int64_t r = 0; r < m; ++r)
      ASSERT_EQ(row_bytes(sum, r), row_bytes(residual, r)) << n << " " << r;
  }
}

TEST_P(LinearTest, FusedEqualsOperatorsOfTheirOwn) {
  check_fused({{1, 64, 64},
               {2, 1056, 960},
               {16, 96, 2048},
               {23, 1056, 960},
               {64, 96, 512},
               {129, 1056, 64}});
}
TEST_P(LinearTest, FusedInFullSize) {
  check_fused({{1, 6144, 4096},
               {5, 28672, 2048},
               {8, 512, 4096},
               {11, 6144, 1024},
               {1, 4096, 14336},
               {32, 28672, 4096},
               {50, 6144, 1024},
               {1, 16384, 2048},
               {100, 6144, 512},
               {160, 6144, 256},
               {250, 8192, 128}});
}
TEST_P(LinearTest, FusedOfManyRows) {
  check_fused({{128, 14784, 64}, {192, 14784, 64}, {256, 14784, 64}});
}

TEST_P(LinearTest, FusesWhatFits) {
  if (card_.arch != 90) GTEST_SKIP() << "nothing is fused on this card";
  const Weight wide(64, 8192, GetParam(), false, 1);
  LinearArgs a;
  const NormWeight norm{wide.bias_memory.data(), nullptr};
  a.norm = &norm;
  EXPECT_TRUE(linear(true)->fuses(wide.w, a, 2));
  EXPECT_FALSE(linear(true)->fuses(wide.w, a, 12));  // of shared memory
  LinearWeight head;                                 // of many weights, little x only
  head.spec = {151936, 1024, GetParam(), false};
  EXPECT_TRUE(linear(true)->fuses(head, a, 4));
  EXPECT_FALSE(linear(true)->fuses(head, a, 8));
  head.spec = {128256, 4096, GetParam(), false};
  EXPECT_FALSE(linear(true)->fuses(head, a, 1));
  a.norm_args.kind = NormKind::layer;
  EXPECT_FALSE(linear(true)->fuses(wide.w, a, 1));
  LinearArgs gated;
  gated.gated = true;
  EXPECT_TRUE(linear(true)->fuses(wide.w, gated, 64));
  EXPECT_FALSE(linear(true)->fuses(wide.w, gated, 65));
}

// A file of plans that says who takes along what stands around products of more than 64 rows.
class PlanFile {
 public:
  ~PlanFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }
  void set(bool skinny_gates, bool large) {
    std::ifstream in(path_);
    std::string text;
    for (std::string line; std::getline(in, line);) {
      std::istringstream words(line);
      std::string word;
      for (int i = 0; words >> word; ++i)
        text += (i == 9    ? std::to_string(skinny_gates)
                 : i == 10 ? std::to_string(large)
                           : word) +
                " ";
      text += "\n";
    }
    ASSERT_FALSE(text.empty());
    std::ofstream(path_) << text;
  }

 private:
  std::filesystem::path path_ = std::filesystem::temp_directory_path() /
                                ("nano-inference-plans-" + std::to_string(std::random_device{}()));
};

// Either way the bits are the same.
TEST_P(LinearTest, GatesOfPreparedPlansHaveTheSameBits) {
  if (card_.arch != 90) GTEST_SKIP() << "nothing is fused on this card";
  PlanFile file;
  const Weight w(512, 64, GetParam(), false, 1), head(100, 64, GetParam(), false, 2);
  linear(true, file.path())->prepare({&w.w, &head.w}, 300);
  LinearArgs gated;
  gated.gated = true;
  for (const auto& [skinny_gates, large] : std::vector<std::array<bool, 2>>{
           {false, false}, {true, false}, {false, true}, {true, true}}) {
    file.set(skinny_gates, large);
    const auto l = linear(true, file.path());
    l->prepare({&w.w, &head.w}, 300);
    EXPECT_EQ(l->num_timed(), 0);
    EXPECT_TRUE(l->fuses(w.w, gated, 64));
    for (const Activation act : {Activation::silu, Activation::gelu_tanh}) {
      gated.act = act;
      for (const int64_t m : {65, 130, 256, 300}) {
        const bool is_large = large && m >= 128 && act == Activation::silu;
        const bool fuses = is_large || (skinny_gates && m <= 256);
        ASSERT_EQ(l->fuses(w.w, gated, m), fuses) << m;
        const Rows x(m, 64, GetParam(), 3);
        const Out product(m, 512, GetParam()), own(m, 256, GetParam()),
            together(m, 256, GetParam());
        if (!fuses) {
          EXPECT_THROW(l->run(x.tensor, w.w, gated, together.tensor, nullptr),
                       std::invalid_argument);
          continue;
        }
        l->run(x.tensor, w.w, {}, product.tensor, nullptr);
        cuda::activation(product.tensor.data, product.stride, m, 256, act, true, GetParam(),
                         own.tensor.data, own.stride, nullptr);
        l->run(x.tensor, w.w, gated, together.tensor, nullptr);
        for (int64_t r = 0; r < m; ++r)
          ASSERT_EQ(row_bytes(together, r), row_bytes(own, r)) << m << " " << r;
      }
    }
  }
}

// Sums beyond float16, and of zeros and NaN.
void with_extremes(Rows& x) {
  const auto set = [&](int64_t row, float scale) {
    for (int64_t i = 0; i < x.stride; ++i)
      x.values[static_cast<size_t>(row * x.stride + i)] *= scale;
  };
  set(3, 2e4f);
  set(70, 300.0f);
  set(127, 0.0f);
  x.values[static_cast<size_t>(40 * x.stride)] = std::nanf("");
  x.memory.fill(x.values);
}

// linear_large with a gate, of few multiprocessors too, so that both groups of warps have several
// tiles: ring and turns go round.
TEST_P(LinearTest, LargeGatesHaveTheBitsOfOperatorsOfTheirOwn) {
  if (card_.arch != 90) GTEST_SKIP() << "nothing is fused on this card";
  cuda::Card few = card_;
  few.num_sms = 2;
  uint32_t seed = 90;
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{
           {128, 128, 448}, {130, 214, 64}, {300, 1544, 64}, {257, 768, 320}}) {
    const Weight w(n, k, GetParam(), m == 300, ++seed, 0.2f);
    Rows x(m, k, GetParam(), ++seed);
    with_extremes(x);
    const Out product(m, n, GetParam()), own(m, n / 2, GetParam());
    skinny(x, w, product);
    cuda::activation(product.tensor.data, product.stride, m, n / 2, Activation::silu, true,
                     GetParam(), own.tensor.data, own.stride, nullptr);
    for (const cuda::Card& card : {card_, few}) {
      const Out together(m, n / 2, GetParam());
      cuda::SkinnyArgs a = skinny_args(x, w, together);
      a.gated = true;
      a.settled = card.num_sms == few.num_sms;
      ASSERT_TRUE(cuda::fuses_large(a, nullptr, card));
      cuda::linear_large_sm90(a, nullptr, card, nullptr);
      for (int64_t r = 0; r < m; ++r)
        ASSERT_EQ(row_bytes(together, r), row_bytes(own, r)) << m << " x " << n << ": " << r;
      EXPECT_TRUE(together.memory.intact() && x.memory.intact());
    }
    cuda::SkinnyArgs a = skinny_args(x, w, own);
    a.gated = true;
    a.act = Activation::gelu_tanh;
    EXPECT_FALSE(cuda::fuses_large(a, nullptr, card_));
    EXPECT_THROW(cuda::linear_large_sm90(a, nullptr, card_, nullptr), std::logic_error);
  }
}

// linear_large with what rope_kv_write() does: its bits in q and in the cache.
TEST_P(LinearTest, LargeRotatesAsRopeKvWrite) {
  if (card_.arch != 90) GTEST_SKIP() << "nothing is fused on this card";
  cuda::Card few = card_;
  few.num_sms = 2;
  constexpr int32_t kHeads = 3, kKvHeads = 2, kBlock = 16, kPositions = 50;
  uint32_t seed = 95;
  for (const auto& [m, d, normalises, turns] :
       std::vector<std::tuple<int64_t, int32_t, bool, bool>>{{131, 128, true, true},
                                                             {128, 64, true, true},
                                                             {300, 64, false, true},
                                                             {290, 128, false, false},
                                                             {261, 64, false, false}}) {
    const int64_t n = (kHeads + 2 * kKvHeads) * d, k = 128;
    const Weight w(n, k, GetParam(), m == 131, ++seed, 0.2f);
    Rows x(m, k, GetParam(), ++seed);
    with_extremes(x);
    std::vector<int32_t> positions;
    std::vector<int64_t> slots;
    const auto blocks = static_cast<int32_t>(m / kBlock + 2);
    for (int64_t r = 0; r < m; ++r) {
      positions.push_back(static_cast<int32_t>(r * 7 % kPositions));
      slots.push_back(r % 10 == 9 ? -1 : (r * 11 + 5) % (int64_t{blocks} * kBlock));
    }
    const DeviceArray<int32_t> position_memory(positions);
    const DeviceArray<int64_t> slot_memory(slots);
    const auto angles = static_cast<size_t>(kPositions * d / 2);
    const DeviceArray<float> cos(normal_floats(angles, ++seed)), sin(normal_floats(angles, ++seed));
    const DeviceArray<float> q_norm(normal_floats(static_cast<size_t>(d), ++seed)),
        k_norm(normal_floats(static_cast<size_t>(d), ++seed));
    StepInputs in;
    in.num_tokens = static_cast<int32_t>(m);
    in.positions = position_memory.data();
    in.slot_mapping = slot_memory.data();
    RopeKvWrite write;
    write.in = &in;
    if (turns) write.rope = {cos.data(), sin.data(), d, {}, {}, 1e-6f};
    if (normalises)
      write.rope.q_norm.weight = q_norm.data(), write.rope.k_norm.weight = k_norm.data();
    const auto cache = [&](DeviceMatrix& keys, DeviceMatrix& values) {
      KvView kv;
      kv.k = keys.data();
      kv.v = values.data();
      kv.dtype = GetParam();
      kv.num_blocks = blocks;
      kv.block_size = kBlock;
      kv.num_kv_heads = kKvHeads;
      kv.head_dim = d;
      kv.k_tile = 1;
      return kv;
    };
    PlanFile file;
    std::unique_ptr<Linear> prepared;
    if (m == 128) {  // the fewest, so that few plans are measured
      const Weight head(100, k, GetParam(), false, 2);
      linear(true, file.path())->prepare({&w.w, &head.w}, m);
      file.set(false, true);
      prepared = linear(true, file.path());
      prepared->prepare({&w.w, &head.w}, m);
      EXPECT_EQ(prepared->num_timed(), 0);
    }
    const int64_t cache_rows = int64_t{blocks} * kBlock * kKvHeads;
    DeviceMatrix own_k(cache_rows, d, GetParam()), own_v(cache_rows, d, GetParam());
    const Out own(m, n, GetParam());
    skinny(x, w, own);
    cuda::rope_kv_write(own.tensor.data, own.stride, m, kHeads, in.positions, in.slot_mapping,
                        write.rope, cache(own_k, own_v), GetParam(), false, nullptr);
    const auto bytes = [](const DeviceMatrix& memory) {
      std::vector<char> all(memory.bytes());
      memory.download(all.data(), all.size());
      return all;
    };
    for (const cuda::Card& card : {card_, few}) {
      DeviceMatrix keys(cache_rows, d, GetParam()), values(cache_rows, d, GetParam());
      write.kv = cache(keys, values);
      const Out together(m, n, GetParam());
      cuda::SkinnyArgs a = skinny_args(x, w, together);
      a.settled = card.num_sms == few.num_sms;
      ASSERT_TRUE(cuda::fuses_large(a, &write, card));
      if (prepared != nullptr && card.num_sms == card_.num_sms) {  // by way of its plan
        LinearArgs args;
        args.rope = &write;
        ASSERT_TRUE(prepared->fuses(w.w, args, m));
        EXPECT_FALSE(prepared->fuses(w.w, args, 127));
        prepared->run(x.tensor, w.w, args, together.tensor, nullptr);
      } else {
        cuda::linear_large_sm90(a, &write, card, nullptr);
      }
      const auto q_bytes = static_cast<int64_t>(2 * kHeads * d);
      for (int64_t r = 0; r < m; ++r) {
        if (slots[static_cast<size_t>(r)] < 0) continue;  // what becomes of padding is nobody's
        auto want = row_bytes(own, r), got = row_bytes(together, r);
        want.resize(static_cast<size_t>(q_bytes));
        got.resize(static_cast<size_t>(q_bytes));
        ASSERT_EQ(got, want) << m << " rows, heads of " << d << ": " << r;
      }
      EXPECT_EQ(bytes(keys), bytes(own_k)) << d;
      EXPECT_EQ(bytes(values), bytes(own_v)) << d;
      EXPECT_TRUE(together.memory.intact() && keys.intact() && values.intact());
    }
    write.kv.dtype = DType::fp8_e4m3;
    EXPECT_FALSE(cuda::fuses_large(skinny_args(x, w, own), &write, card_));
    write.kv.dtype = GetParam();
    RopeKvWrite other = write;  // one norm of two, or norms without a rotation
    other.rope.q_norm.weight = normalises ? nullptr : q_norm.data();
    EXPECT_FALSE(cuda::fuses_large(skinny_args(x, w, own), &other, card_));
    other.rope.q_norm.weight = q_norm.data();
    other.rope.k_norm.weight = k_norm.data();
    other.rope.cos = nullptr;
    EXPECT_FALSE(cuda::fuses_large(skinny_args(x, w, own), &other, card_));
    write.kv.block_stride = int64_t{1} << 38;  // places of two blocks do not fit 32 bits
    EXPECT_FALSE(cuda::fuses_large(skinny_args(x, w, own), &write, card_));
  }
}

// lm_head's, whole rows of vectors and not.
TEST_P(LinearTest, LogitsHaveTheBitsOfTheOlderKernel) {
  cuda::Card older = card_;
  older.arch = 80;  // cp.async, on the same card
  uint32_t seed = 70;
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{{20, 3000, 64},
                                                                   {64, 33790, 64},
                                                                   {100, 17000, 64},
                                                                   {150, 16998, 64},
                                                                   {240, 17000, 64},
                                                                   {2, 40000, 1024},
                                                                   {16, 20000, 576},
                                                                   {30, 40000, 1088},
                                                                   {64, 20000, 576}}) {
    const Weight w(n, k, GetParam(), m == 100, ++seed, 0.05f);
    const Rows x(m, k, GetParam(), ++seed);
    const Out out(m, n, DType::f32), want(m, n, DType::f32);
    cuda::linear_skinny(skinny_args(x, w, out), card_, nullptr);
    cuda::linear_skinny(skinny_args(x, w, want), older, nullptr);
    for (int64_t r = 0; r < m; ++r)
      ASSERT_EQ(row_bytes(out, r), row_bytes(want, r)) << m << " x " << n << ": " << r;
    EXPECT_TRUE(out.memory.intact());
  }
}

TEST_P(LinearTest, LogitsComeWithTheirUnits) {
  uint32_t seed = 170;
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{{1, 151936, 64},
                                                                   {1, 128256, 64},
                                                                   {2, 4099, 1024},
                                                                   {5, 16998, 128},
                                                                   {8, 33, 64},
                                                                   {9, 5000, 128},
                                                                   {16, 33790, 64},
                                                                   {17, 3000, 64},
                                                                   {33, 20001, 64},
                                                                   {64, 33790, 64},
                                                                   {100, 17000, 64},
                                                                   {130, 3009, 576},
                                                                   {150, 16998, 64},
                                                                   {240, 17000, 64},
                                                                   {256, 30016, 64},
                                                                   {390, 3003, 128}}) {
    expect_units(m, n, k, seed);
    seed += 10;
  }
}

// As many that each of a card's multiprocessors has several tiles, of each width.
TEST_P(LinearTest, SoDoManyLogits) {
  uint32_t seed = 470;
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{
           {130, 33790, 640}, {255, 40010, 576}, {257, 50000, 128}, {390, 17003, 64}}) {
    expect_units(m, n, k, seed);
    seed += 10;
  }
}

TEST_P(LinearTest, RandomShapesInBothModes) {
  std::mt19937 rng(5);
  const auto pick = [&](int64_t most) {
    return std::uniform_int_distribution<int64_t>(1, most)(rng);
  };
  for (const bool invariant : {true, false}) {
    const auto l = linear(invariant);
    for (int i = 0; i < 30; ++i) {
      const int64_t m = pick(i % 3 == 0 ? 300 : 70), n = pick(200), k = pick(400);
      const DType out_dtype = i % 4 == 0 ? DType::f32 : GetParam();
      const Weight w(n, k, GetParam(), i % 2 == 0, static_cast<uint32_t>(2 * i));
      const Rows x(m, k, GetParam(), static_cast<uint32_t>(100 + i));
      const Out out(m, n, out_dtype);
      l->run(x.tensor, w.w, {}, out.tensor, nullptr);
      expect_right(x, w, out.memory.read(), out.stride, out_dtype);
      EXPECT_TRUE(out.memory.intact());
      if (HasFailure()) return;
    }
  }
}

// The plans that are timed for a model's weights, in both modes.
TEST_P(LinearTest, PreparedPlansMatchDouble) {
  const Weight a(320, 512, GetParam(), true, 1), b(512, 320, GetParam(), false, 3),
      head(1000, 512, GetParam(), false, 5);
  for (const bool invariant : {true, false}) {
    const auto l = linear(invariant);
    l->prepare({&a.w, &b.w, &head.w}, 300);
    EXPECT_GT(l->num_timed(), 0);
    for (const int64_t m : {1, 3, 16, 40, 64, 65, 130, 300}) {
      for (const Weight* w : {&a, &b, &head}) {
        const DType out_dtype = w == &head ? DType::f32 : GetParam();
        const Rows x(m, w->w.spec.in_features, GetParam(), static_cast<uint32_t>(m));
        const Out out(m, w->w.spec.out_features, out_dtype);
        l->run(x.tensor, w->w, {}, out.tensor, nullptr);
        expect_right(x, *w, out.memory.read(), out.stride, out_dtype);
        if (w == &head && invariant) expect_same_units(*l, x, *w, out);
        if (HasFailure()) return;
      }
    }
  }
}

// Promise 1: a row has the same bits alone and among any number of others, whichever plan runs.
TEST_P(LinearTest, RowsHaveTheSameBitsAtEveryNumberOfRows) {
  const int64_t m = 300;
  for (const auto& [n, k, bias] : std::vector<std::tuple<int64_t, int64_t, bool>>{
           {256, 4096, false}, {1024, 3072, true}, {4096, 256, false}, {96, 14336, false}}) {
    const Weight w(n, k, GetParam(), bias, 1, 0.02f), head(512, k, GetParam(), false, 9);
    const auto l = linear(true);
    l->prepare({&w.w, &head.w}, m);
    const Rows x(m, k, GetParam(), 2);
    const Out all(m, n, GetParam());
    l->run(x.tensor, w.w, {}, all.tensor, nullptr);
    const Out own(m, n, GetParam());
    skinny(x, w, own);
    std::vector<char> together(all.memory.bytes()), canonical(own.memory.bytes());
    all.memory.download(together.data(), together.size());
    own.memory.download(canonical.data(), canonical.size());
    for (int64_t r = 0; r < m; ++r)
      ASSERT_EQ(row_bytes(all, r), row_bytes(own, r)) << n << " " << r;
    for (const int64_t rows : {1, 2, 5, 8, 13, 16, 31, 33, 64, 100, 128, 129, 200, 257}) {
      const Out part(rows, n, GetParam());
      const int64_t first = m - rows;
      l->run(x.tensor.rows(first, rows), w.w, {}, part.tensor, nullptr);
      EXPECT_TRUE(part.memory.intact());
      for (const int64_t r : {int64_t{0}, rows / 2, rows - 1})
        ASSERT_EQ(row_bytes(part, r), row_bytes(all, first + r)) << n << " " << rows << " " << r;
      // With room behind them more may be computed.
      const Out roomy(m, n, GetParam());
      l->run(x.tensor.rows(rows), w.w, {.spare_rows = m - rows}, roomy.tensor.rows(rows), nullptr);
      for (const int64_t r : {int64_t{0}, rows / 2, rows - 1})
        ASSERT_EQ(row_bytes(roomy, r), row_bytes(all, r)) << n << " " << rows << " " << r;
      EXPECT_TRUE(roomy.memory.intact());
    }
  }
}

TEST_P(LinearTest, PlansAreCachedAndABrokenFileIsIgnored) {
  const auto folder = std::filesystem::temp_directory_path() /
                      ("nano-inference-" + std::to_string(std::random_device{}()));
  const std::string file = (folder / "deep" / "plans.txt").string();
  const Weight w(64, 128, GetParam(), true, 1), head(100, 128, GetParam(), false, 2);
  const auto first = linear(true, file);
  first->prepare({&w.w, &head.w}, 100);
  EXPECT_GT(first->num_timed(), 0);
  const auto second = linear(true, file);
  second->prepare({&w.w, &head.w}, 100);
  EXPECT_EQ(second->num_timed(), 0);
  EXPECT_EQ(second->describe(), first->describe());
  const auto fastest = linear(false, file);  // another mode has plans of its own
  fastest->prepare({&w.w, &head.w}, 100);
  EXPECT_GT(fastest->num_timed(), 0);
  {
    std::ofstream broken(file);
    broken << "nonsense\n" << std::string(5000, 'x') << "\n\0\xff";
  }
  const auto third = linear(true, file);
  third->prepare({&w.w, &head.w}, 100);
  EXPECT_GT(third->num_timed(), 0);
  const Rows x(70, 128, GetParam(), 3);
  const Out out(70, 64, GetParam());
  third->run(x.tensor, w.w, {}, out.tensor, nullptr);
  expect_right(x, w, out.memory.read(), out.stride, GetParam());
  const auto nowhere = linear(true, "/proc/no/such/place");
  nowhere->prepare({&w.w, &head.w}, 100);
  std::filesystem::remove_all(folder);
}

// The logits of lm_head, 32 bits each, and outputs whose rows are aligned like nothing in an
// engine.
TEST_P(LinearTest, RowsHaveTheSameBitsInFloat32AndUnaligned) {
  const int64_t m = 130, n = 1003, k = 512;
  const Weight body(64, k, GetParam(), false, 1), head(n, k, GetParam(), false, 2, 0.05f);
  const auto l = linear(true);
  l->prepare({&body.w, &head.w}, m);
  const Rows x(m, k, GetParam(), 3);
  const Out own(m, n, DType::f32);
  skinny(x, head, own);
  const std::vector<float> canonical = own.memory.read();
  for (const int64_t stride : {own.stride, n}) {
    for (const int64_t offset : {0, 1}) {
      for (const int64_t rows : {1, 7, 64, 65, 130}) {
        DeviceMatrix memory(1, rows * stride + offset, DType::f32);
        Tensor out(static_cast<char*>(memory.data()) + 4 * offset, DType::f32, {rows, n});
        out.row_stride = stride;
        l->run(x.tensor.rows(rows), head.w, {}, out, nullptr);
        const std::vector<float> got = memory.read();
        for (int64_t r = 0; r < rows; ++r)
          ASSERT_EQ(0, std::memcmp(&got[static_cast<size_t>(r * stride + offset)],
                                   &canonical[static_cast<size_t>(r * own.stride)],
                                   static_cast<size_t>(n) * 4))
              << stride << " " << offset << " " << rows << " " << r;
        EXPECT_TRUE(memory.intact());
      }
    }
  }
}

// A step is captured: run() may do nothing that a graph cannot hold.
TEST_P(LinearTest, RunsInACapturedGraph) {
  cudaStream_t stream = nullptr;
  check_device(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const Weight w(256, 512, GetParam(), true, 1), head(512, 512, GetParam(), false, 3);
  for (const int64_t m : {5, 200}) {
    const auto l = linear(false);
    l->prepare({&w.w, &head.w}, m);
    const Rows x(m, 512, GetParam(), 4);
    Out out(m, 256, GetParam());
    l->run(x.tensor, w.w, {}, out.tensor, stream);  // loads the kernel
    check_device(cudaStreamSynchronize(stream));
    out.memory.poison();
    check_device(cudaDeviceSynchronize());
    check_device(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    l->run(x.tensor, w.w, {}, out.tensor, stream);
    cudaGraph_t graph = nullptr;
    check_device(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t exec = nullptr;
    check_device(cudaGraphInstantiate(&exec, graph, 0));
    check_device(cudaGraphLaunch(exec, stream));
    check_device(cudaStreamSynchronize(stream));
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    expect_right(x, w, out.memory.read(), out.stride, GetParam());
    EXPECT_TRUE(out.memory.intact());
  }
  check_device(cudaStreamDestroy(stream));
}

TEST_P(LinearTest, CountsDifferences) {
  const auto values = normal_floats(3 * 40, 7);
  DeviceMatrix a(3, 40, GetParam()), b(3, 40, GetParam());
  a.fill(values);
  auto changed = values;
  changed[5] += 1;        // counted
  changed[40 + 33] += 1;  // counted
  changed[80 + 39] += 1;  // beyond the columns
  b.fill(changed);
  Tensor first(a.data(), GetParam(), {3, 37}), second(b.data(), GetParam(), {3, 37});
  first.row_stride = second.row_stride = 40;
  DeviceArray<int> count(std::vector<int>{10});
  cuda::count_differences(first, second, count.data(), nullptr);
  EXPECT_EQ(count.read()[0], 12);
}

}  // namespace
}  // namespace ni::test
