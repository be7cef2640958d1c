// The CUDA backend around its kernels: memory, copies, marks, captured steps, loading of weights,
// the small operators bit for bit where their arithmetic is exact, refusals.
#include <algorithm>
#include <thread>

#include "cuda/cuda_backend.h"
#include "device_array.h"

namespace ni::test {
namespace {

BackendOptions options(DType dtype = DType::bf16) {
  BackendOptions o;
  o.activation_dtype = dtype;
  return o;
}

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

// A weight of the backend, read back as it lies in memory.
std::vector<float> stored(cuda::CudaBackend& backend, const Buffer& buffer, DType dtype) {
  std::vector<char> raw(buffer.bytes());
  backend.download(buffer.data(), raw.data(), raw.size());
  backend.synchronize();
  return decode_floats(raw, dtype);
}

TEST(CudaBackend, SaysWhatItIs) {
  cuda::CudaBackend backend(options(DType::f16));
  EXPECT_EQ(backend.info().device, "cuda");
  EXPECT_NE(backend.info().name, "");
  EXPECT_EQ(backend.info().activation_dtype, DType::f16);
  EXPECT_EQ(backend.info().k_tile, 1);
  EXPECT_GT(backend.info().memory_total, size_t{1} << 30);
  EXPECT_LE(backend.memory_available(), backend.info().memory_total);
  EXPECT_TRUE(backend.healthy());
}

TEST(CudaBackend, MemoryIsZeroAndGivenBack) {
  cuda::CudaBackend backend(options());
  const size_t before = backend.memory_available(), bytes = size_t{256} << 20;
  {
    const Buffer buffer = backend.alloc(bytes);
    EXPECT_LE(backend.memory_available(), before - bytes);
    std::vector<char> host(bytes, 1);
    backend.download(buffer.data(), host.data(), bytes);
    backend.synchronize();
    EXPECT_EQ(std::count(host.begin(), host.end(), 0), static_cast<ptrdiff_t>(bytes));
  }
  EXPECT_GE(backend.memory_available() + (4 << 20), before);
}

TEST(CudaBackend, OutOfMemoryNamesTheNumbersAndHarmsNothing) {
  cuda::CudaBackend backend(options());
  const size_t much = 4 * backend.info().memory_total;
  const std::string error = error_of([&] { backend.alloc(much); });
  EXPECT_NE(error.find(std::to_string(much)), std::string::npos) << error;
  EXPECT_NE(error.find("available"), std::string::npos) << error;
  EXPECT_TRUE(backend.healthy());
  EXPECT_NE(backend.alloc(1024).data(), nullptr);
}

TEST(CudaBackend, CopiesKeepTheirOrderAndMarksWait) {
  cuda::CudaBackend backend(options());
  constexpr size_t kBytes = 64 << 20;
  const Buffer host = backend.alloc_host(kBytes), back = backend.alloc_host(kBytes);
  const Buffer device = backend.alloc(kBytes);
  for (int round = 0; round < 20; ++round) {  // more than there are marks
    std::fill_n(host.data(), kBytes, static_cast<char>(round + 1));
    std::fill_n(back.data(), kBytes, 0);
    if (round % 2 == 0) {
      backend.upload(host.data(), device.data(), kBytes);
    } else {
      backend.upload_ahead(host.data(), device.data(), kBytes);
    }
    backend.download(device.data(), back.data(), kBytes);
    backend.wait(backend.mark());
    ASSERT_EQ(back.data()[0], round + 1);
    ASSERT_EQ(back.data()[kBytes - 1], round + 1);
  }
}

TEST(CudaBackend, LoadsRowsOfAnyTypeFromManyThreads) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    cuda::CudaBackend backend(options(dtype));
    LinearWeight w;
    w.spec = {1500, 1003, dtype, false};
    const Buffer buffer = backend.alloc(backend.weight_bytes(w.spec));
    w.data = buffer.data();
    const int64_t stride = cuda::Linear::weight_stride(1003);
    ASSERT_EQ(buffer.bytes(), static_cast<size_t>(1500 * stride * 2));
    const auto values = normal_floats(1500 * 1003, 1);
    // Five parts of 300 rows in three types, misaligned, their rows apart.
    const DType sources[] = {DType::f32, DType::bf16, DType::f16, dtype, DType::f32};
    std::vector<std::thread> threads;
    for (int part = 0; part < 5; ++part) {
      threads.emplace_back([&, part] {
        const DType source = sources[part];
        const auto size = static_cast<int64_t>(dtype_size(source));
        std::vector<float> rows(300 * 1010, 0.0f);
        for (int64_t r = 0; r < 300; ++r)
          std::copy_n(&values[static_cast<size_t>((300 * part + r) * 1003)], 1003,
                      &rows[static_cast<size_t>(r * 1010)]);
        std::vector<char> bytes = encode_floats(rows, source);
        bytes.insert(bytes.begin(), '\1');
        Tensor src(bytes.data() + 1, source, {300, 1003});
        src.row_stride = 1010;
        ASSERT_EQ(size * 300 * 1010, static_cast<int64_t>(bytes.size()) - 1);
        backend.load_rows(w, 300 * part, src);
      });
    }
    for (std::thread& t : threads) t.join();
    const auto got = stored(backend, buffer, dtype);
    for (int64_t r = 0; r < 1500; ++r) {
      const DType source = sources[r / 300];
      for (int64_t c = 0; c < stride; ++c) {
        float want = 0;
        if (c < 1003) {
          const float v = values[static_cast<size_t>(r * 1003 + c)];
          want = decode_floats(
              encode_floats(decode_floats(encode_floats({v}, source), source), dtype), dtype)[0];
        }
        ASSERT_EQ(got[static_cast<size_t>(r * stride + c)], want) << r << " " << c;
      }
    }
  }
}

TEST(CudaBackend, LargeRowsGoInPieces) {
  cuda::CudaBackend backend(options());
  LinearWeight w;
  w.spec = {2, 5'000'000, DType::bf16, false};  // a row is larger than a buffer of the loader
  const Buffer buffer = backend.alloc(backend.weight_bytes(w.spec));
  w.data = buffer.data();
  std::vector<float> values(10'000'000);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 251);
  backend.load_rows(w, 0, Tensor(values.data(), DType::f32, {2, 5'000'000}));
  const auto got = stored(backend, buffer, DType::bf16);
  const size_t stride = got.size() / 2;
  for (size_t i = 0; i < values.size(); i += 997)
    ASSERT_EQ(got[i / 5'000'000 * stride + i % 5'000'000], values[i]) << i;
}

// A step that reads its rows from device memory: replayed, it sees what is there now, and gives the
// same bits as when it runs as it is.
TEST(CudaBackend, ReplayEqualsEager) {
  cuda::CudaBackend backend(options()), eager([] {
    BackendOptions o = options();
    o.enable_graphs = false;
    return o;
  }());
  EXPECT_TRUE(backend.info().has_graphs);
  EXPECT_FALSE(eager.info().has_graphs);
  constexpr int64_t kRows = 4, kCols = 256;
  const auto weight_values = normal_floats(kCols, 3);
  const Buffer memory = backend.alloc(3 * kRows * kCols * 2), weight = backend.alloc(kCols * 4);
  backend.upload(weight_values.data(), weight.data(), kCols * 4);
  Tensor x(memory.data(), DType::bf16, {kRows, kCols});
  Tensor out(memory.data() + kRows * kCols * 2, DType::bf16, {kRows, kCols});
  Tensor want(memory.data() + 2 * kRows * kCols * 2, DType::bf16, {kRows, kCols});
  const NormWeight w{reinterpret_cast<float*>(weight.data()), nullptr};
  int calls = 0;
  for (const int32_t round : {0, 1, 2, 3, 4}) {
    const auto seed = static_cast<uint32_t>(10 + round);
    const auto bytes = encode_floats(normal_floats(kRows * kCols, seed), DType::bf16);
    backend.upload(bytes.data(), x.data, bytes.size());
    const int32_t slot = round / 3;
    backend.run_step({kRows, false, slot}, [&] {
      ++calls;
      backend.norm(x, w, {}, out);
    });
    backend.synchronize();
    eager.run_step({kRows, false}, [&] { eager.norm(x, w, {}, want); });
    eager.synchronize();
    std::vector<char> a(bytes.size()), b(bytes.size());
    backend.download(out.data, a.data(), a.size());
    backend.download(want.data, b.data(), b.size());
    backend.synchronize();
    ASSERT_EQ(a, b) << round;
    ASSERT_NE(a, std::vector<char>(a.size(), 0));
  }
  // The first slot: once as it is, once to capture; the second: to capture. Replays call nothing.
  EXPECT_EQ(calls, 3);
}

// What lm_head's product sums up for the sampler is used for the logits that it made, and for no
// others that come to lie there.
TEST(CudaBackend, TheSamplerTakesSumsOfItsOwnLogitsOnly) {
  constexpr int64_t kRows = 3, kCols = 64, kVocab = 5000;
  cuda::CudaBackend backend(options());
  const auto filled = [&](const std::vector<char>& bytes) {
    Buffer buffer = backend.alloc(bytes.size());
    backend.upload(bytes.data(), buffer.data(), bytes.size());
    return buffer;
  };
  const auto random = [&](int64_t count, uint32_t seed) {
    return filled(encode_floats(normal_floats(static_cast<size_t>(count), seed), DType::bf16));
  };
  const Buffer weight = random(kVocab * kCols, 1), rows = random(kRows * kCols, 2),
               other_rows = random(kRows * kCols, 3), out = backend.alloc(kRows * kVocab * 4),
               token_ids = backend.alloc(kRows * 4);
  LinearWeight w;
  w.spec = {kVocab, kCols, DType::bf16, false};
  w.data = weight.data();
  SamplingRow greedy;
  greedy.temperature = 0;
  const std::vector<SamplingRow> sampled(kRows, greedy);
  const auto* bytes = reinterpret_cast<const char*>(sampled.data());
  const Buffer sampling = filled({bytes, bytes + sampled.size() * sizeof(SamplingRow)});
  StepInputs in;
  in.num_logits = kRows;
  in.sampling = reinterpret_cast<const SamplingRow*>(sampling.data());
  const auto* step = reinterpret_cast<const char*>(&in);
  const Buffer device = filled({step, step + sizeof(in)});
  in.device = reinterpret_cast<const StepInputs*>(device.data());

  const Tensor logits(out.data(), DType::f32, {kRows, kVocab});
  const auto multiply = [&](const Buffer& x, const StepInputs* for_step) {
    LinearArgs a;
    a.sampled = for_step;
    backend.linear(Tensor(x.data(), DType::bf16, {kRows, kCols}), w, a, logits);
  };
  const auto tokens = [&] {
    SampleOutputs to;
    to.token_ids = reinterpret_cast<int32_t*>(token_ids.data());
    backend.sample(logits, in, 0, to);
    std::vector<int32_t> ids(kRows);
    backend.download(token_ids.data(), ids.data(), kRows * 4);
    backend.synchronize();
    return ids;
  };
  std::vector<float> host(kRows * kVocab);
  const auto likeliest = [&] {
    backend.download(out.data(), host.data(), host.size() * 4);
    backend.synchronize();
    std::vector<int32_t> ids;
    for (auto row = host.begin(); row != host.end(); row += kVocab)
      ids.push_back(static_cast<int32_t>(std::max_element(row, row + kVocab) - row));
    return ids;
  };
  multiply(rows, &in);
  const std::vector<int32_t> first = likeliest();
  EXPECT_EQ(tokens(), first);
  multiply(rows, &in);
  multiply(other_rows, nullptr);
  const std::vector<int32_t> second = likeliest();
  EXPECT_NE(second, first);
  EXPECT_EQ(tokens(), second);
  EXPECT_EQ(tokens(), second);
  // Another's logits after those of a product whose sums have been used, and, on Hopper, before.
  multiply(rows, &in);
  for (const bool is_used : {true, false}) {
    if (!is_used) {
      multiply(rows, &in);
    } else {
      EXPECT_EQ(tokens(), first);
    }
    likeliest();
    for (int64_t r = 0; r < kRows; ++r) host[static_cast<size_t>(r * kVocab + 7)] = 1000;
    backend.upload(host.data(), out.data(), host.size() * 4);
    const bool has_sums = !is_used && this_card().arch == 90;
    EXPECT_EQ(tokens(), has_sums ? first : std::vector<int32_t>(kRows, 7));
  }
  // Of plain rows nobody else reads the logits: on Hopper they are not even written.
  in.plain_sampling = true;
  std::fill(host.begin(), host.end(), 5.0f);
  backend.upload(host.data(), out.data(), host.size() * 4);
  multiply(rows, &in);
  if (this_card().arch == 90) {
    EXPECT_EQ(likeliest(), std::vector<int32_t>(kRows, 0)) << "written";
  }
  EXPECT_EQ(tokens(), first);
  multiply(rows, &in);
  multiply(other_rows, nullptr);
  EXPECT_EQ(tokens(), second) << "sums of another product";
  multiply(rows, &in);
  in.plain_sampling = false;
  if (this_card().arch == 90) {
    EXPECT_THROW(tokens(), std::logic_error);
  }
}

TEST(CudaBackend, AFailureWhileCapturingLeavesTheBackendUsable) {
  cuda::CudaBackend backend(options());
  const Buffer buffer = backend.alloc(4096);
  const Tensor x(buffer.data(), DType::bf16, {2, 64});
  const Tensor out(buffer.data() + 1024, DType::bf16, {2, 64});
  auto* rows = reinterpret_cast<int32_t*>(buffer.data() + 2048);
  const int32_t order[] = {1, 0};
  backend.upload(order, rows, sizeof(order));
  int calls = 0;
  const auto failing = [&] {
    backend.gather_rows(x, rows, 2, out);
    if (++calls == 2) throw std::runtime_error("as the test wants it");
  };
  EXPECT_EQ(error_of([&] { backend.run_step({8, false}, failing); }), "as the test wants it");
  EXPECT_TRUE(backend.healthy());
  const auto bytes = encode_floats(normal_floats(128, 1), DType::bf16);
  backend.upload(bytes.data(), x.data, bytes.size());
  for (int round = 0; round < 2; ++round)
    backend.run_step({8, false}, [&] { backend.gather_rows(x, rows, 2, out); });
  std::vector<char> got(bytes.size());
  backend.download(out.data, got.data(), got.size());
  backend.synchronize();
  EXPECT_TRUE(std::equal(got.begin(), got.begin() + 128, bytes.begin() + 128));
  EXPECT_TRUE(std::equal(got.begin() + 128, got.end(), bytes.begin()));
}

TEST(CudaBackend, RefusesWhatItCannotRunAndSaysWhatItCan) {
  EXPECT_NE(error_of([] { cuda::CudaBackend backend(options(DType::f32)); }).find("bfloat16"),
            std::string::npos);
  EXPECT_NE(error_of([] {
              BackendOptions o = options();
              o.device_index = 99;
              cuda::CudaBackend backend(o);
            }).find("99"),
            std::string::npos);
  const cuda::CudaBackend backend(options());
  KvView kv;
  kv.dtype = DType::bf16;
  kv.block_size = 16;
  kv.num_kv_heads = 2;
  kv.head_dim = 128;
  kv.k_tile = 1;
  backend.check_model(DType::bf16, 256, {128, 64}, kv);
  const auto refused = [&](auto change) {
    KvView view = kv;
    change(view);
    return error_of([&] { backend.check_model(DType::bf16, 8, {128}, view); });
  };
  EXPECT_NE(refused([](KvView& v) { v.head_dim = 80; }).find("64, 96, 128, 256"),
            std::string::npos);
  EXPECT_NE(refused([](KvView& v) { v.block_size = 8; }).find("multiple of 16"), std::string::npos);
  EXPECT_NE(refused([](KvView& v) { v.dtype = DType::f32; }).find("fp8_e4m3"), std::string::npos);
  EXPECT_EQ(refused([](KvView& v) { v.dtype = DType::fp8_e4m3; }), "");
  EXPECT_NE(error_of([&] { backend.check_model(DType::f16, 8, {128}, kv); }).find("float16"),
            std::string::npos);
  const auto heads = error_of([&] { backend.check_model(DType::bf16, 258, {128}, kv); });
  EXPECT_NE(heads.find("258"), std::string::npos);
  EXPECT_NE(heads.find("at most 256"), std::string::npos);
  const auto rotary = error_of([&] { backend.check_model(DType::bf16, 8, {128, 50}, kv); });
  EXPECT_NE(rotary.find("50"), std::string::npos);
  EXPECT_NE(rotary.find("multiple of 4"), std::string::npos);
}

}  // namespace
}  // namespace ni::test
