#include "model/weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <thread>

#include "engine_helpers.h"

namespace ni {
namespace {

std::string load_error(Weights& weights, Backend& backend, const std::string& slot,
                       const Tensor& data) {
  try {
    weights.load(backend, slot, data);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

// A weights object with memory.
struct Loaded {
  explicit Loaded(const ModelConfig& model, DType dtype = DType::f32)
      : backend(cpu_backend()), weights(model, dtype) {
    weights.allocate(*backend);
  }
  std::unique_ptr<Backend> backend;
  Weights weights;
};

std::vector<float> random_matrix(uint64_t key, int64_t rows, int64_t cols) {
  std::vector<float> values(static_cast<size_t>(rows * cols));
  for (size_t i = 0; i < values.size(); ++i) values[i] = random_value(key, i);
  return values;
}

TEST(Weights, NamesEverySlotWithItsShape) {
  const ModelConfig model = tiny_model();
  std::map<std::string, std::vector<int64_t>> slots;
  for (const auto& [name, shape] : Weights(model, DType::f32).slots()) {
    EXPECT_TRUE(slots.emplace(name, shape).second) << name;
  }
  using Shape = std::vector<int64_t>;
  EXPECT_EQ(slots.at("embed.weight"), (Shape{131, 40}));
  EXPECT_EQ(slots.at("layers.1.q.weight"), (Shape{48, 40}));
  EXPECT_EQ(slots.at("layers.1.q.bias"), (Shape{48}));
  EXPECT_EQ(slots.at("layers.0.k.weight"), (Shape{24, 40}));
  EXPECT_EQ(slots.at("layers.0.v.bias"), (Shape{24}));
  EXPECT_EQ(slots.at("layers.0.q_norm.weight"), (Shape{12}));
  EXPECT_EQ(slots.at("layers.0.o.weight"), (Shape{40, 48}));
  EXPECT_EQ(slots.at("layers.0.gate.weight"), (Shape{72, 40}));
  EXPECT_EQ(slots.at("layers.0.down.weight"), (Shape{40, 72}));
  EXPECT_EQ(slots.at("lm_head.weight"), (Shape{131, 40}));
  EXPECT_EQ(slots.size(), 2u + 1u + 2u * (2u + 6u + 2u + 1u + 3u));
  EXPECT_EQ(slots.count("layers.0.attn_norm.bias"), 0u);

  ModelConfig gpt = model;
  gpt.norm = NormKind::layer;
  gpt.gated_mlp = gpt.qk_norm = false;
  gpt.tie_embeddings = gpt.learned_positions = gpt.o_bias = gpt.mlp_bias = true;
  slots.clear();
  for (const auto& [name, shape] : Weights(gpt, DType::f32).slots()) slots.emplace(name, shape);
  EXPECT_EQ(slots.at("pos_embed.weight"), (Shape{512, 40}));
  EXPECT_EQ(slots.at("final_norm.bias"), (Shape{40}));
  EXPECT_EQ(slots.at("layers.1.up.bias"), (Shape{72}));
  EXPECT_EQ(slots.at("layers.1.o.bias"), (Shape{40}));
  EXPECT_EQ(slots.count("layers.0.gate.weight") + slots.count("lm_head.weight") +
                slots.count("layers.0.q_norm.weight"),
            0u);
}

TEST(Weights, WrongSlotsAndShapesAreNamed) {
  Loaded loaded(tiny_model());
  std::vector<float> data(131 * 131);
  const auto error = [&](const std::string& slot, std::initializer_list<int64_t> shape) {
    return load_error(loaded.weights, *loaded.backend, slot,
                      Tensor(data.data(), DType::f32, shape));
  };
  EXPECT_EQ(error("layers.2.q.weight", {48, 40}), "unknown weight slot 'layers.2.q.weight'");
  EXPECT_EQ(error("layers.0.q.weight", {40, 48}),
            "weight slot 'layers.0.q.weight' has shape [48, 40], got [40, 48]");
  EXPECT_EQ(error("final_norm.weight", {40, 1}),
            "weight slot 'final_norm.weight' has shape [40], got [40, 1]");
  EXPECT_EQ(error("embed.weight", {131}),
            "weight slot 'embed.weight' has shape [131, 40], got [131]");
  EXPECT_EQ(error("layers.0.q.weight", {48, 40}), "");
}

TEST(Weights, MissingSlotsAreListed) {
  ModelConfig model = tiny_model();
  model.tie_embeddings = true;
  Loaded loaded(model);
  std::vector<float> data(131 * 131);
  const auto missing = [&] {
    try {
      loaded.weights.check_complete();
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const auto slots = loaded.weights.slots();
  EXPECT_EQ(missing().substr(0, 64),
            concat(slots.size(), " weight slots were not loaded: embed.weight, ",
                   "layers.0.attn_norm.weight")
                .substr(0, 64));
  EXPECT_NE(missing().find(", …"), std::string::npos);  // ten of them
  for (const auto& [name, shape] : slots) {
    if (name == "layers.1.k.bias" || name == "final_norm.weight") continue;
    loaded.weights.load(*loaded.backend, name,
                        shape.size() == 2 ? Tensor(data.data(), DType::f32, {shape[0], shape[1]})
                                          : Tensor(data.data(), DType::f32, {shape[0]}));
  }
  EXPECT_EQ(missing(), "2 weight slots were not loaded: layers.1.k.bias, final_norm.weight");
  EXPECT_EQ(load_error(loaded.weights, *loaded.backend, "lm_head.weight",
                       Tensor(data.data(), DType::f32, {131, 40})),
            "unknown weight slot 'lm_head.weight'");
  EXPECT_EQ(loaded.weights.lm_head.data, loaded.weights.embed.data);  // stored once
}

// A part of a fused matrix, loaded at its place, is the matrix product of that part alone.
class FusedParts : public ::testing::TestWithParam<DType> {};

TEST_P(FusedParts, LandAtTheirRows) {
  const DType dtype = GetParam();
  const ModelConfig model = tiny_model();
  Loaded loaded(model, dtype);
  struct Part {
    std::string name;
    const LinearWeight* fused;
    int64_t first, rows;
    std::vector<float> w, bias;
  };
  const LayerWeights& layer = loaded.weights.layers[1];
  std::vector<Part> parts = {{"layers.1.k", &layer.qkv, 48, 24, {}, {}},  // in any order
                             {"layers.1.q", &layer.qkv, 0, 48, {}, {}},
                             {"layers.1.v", &layer.qkv, 72, 24, {}, {}},
                             {"layers.1.up", &layer.gate_up, 72, 72, {}, {}},
                             {"layers.1.gate", &layer.gate_up, 0, 72, {}, {}}};
  const auto rounded = [&](float v) {
    return dtype == DType::bf16  ? to_float(to_bf16(v))
           : dtype == DType::f16 ? to_float(to_f16(v))
                                 : v;
  };
  uint64_t key = 0;
  for (Part& part : parts) {
    part.w = random_matrix(++key, part.rows, 40);
    loaded.weights.load(*loaded.backend, part.name + ".weight",
                        Tensor(part.w.data(), DType::f32, {part.rows, 40}));
    part.bias.assign(static_cast<size_t>(part.rows), 0.0f);
    if (part.fused != &layer.qkv) continue;
    part.bias = random_matrix(++key, part.rows, 1);
    loaded.weights.load(*loaded.backend, part.name + ".bias",
                        Tensor(part.bias.data(), DType::f32, {part.rows}));
  }
  constexpr int64_t kRows = 3;
  std::vector<float> x = random_matrix(99, kRows, 40);
  for (float& v : x)
    v = to_float(to_bf16(v));  // exact whatever the products' inputs are rounded to
  for (const Part& part : parts) {
    SCOPED_TRACE(part.name);
    const int64_t width = part.fused->spec.out_features;
    ASSERT_EQ(width, part.fused == &layer.qkv ? 96 : 144);
    std::vector<float> out(static_cast<size_t>(kRows * width));
    loaded.backend->linear(Tensor(x.data(), DType::f32, {kRows, 40}), *part.fused, {},
                           Tensor(out.data(), DType::f32, {kRows, width}));
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t j = 0; j < part.rows; ++j) {
        double sum = part.bias[static_cast<size_t>(j)], size = std::abs(sum);
        for (int64_t i = 0; i < 40; ++i) {
          const double term = static_cast<double>(x[static_cast<size_t>(r * 40 + i)]) *
                              rounded(part.w[static_cast<size_t>(j * 40 + i)]);
          sum += term;
          size += std::abs(term);
        }
        // f16 weights may be multiplied in a wider or narrower type; never worse than bf16 inputs.
        EXPECT_NEAR(out[static_cast<size_t>(r * width + part.first + j)], sum, 2e-6 * size);
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, FusedParts, ::testing::Values(DType::f32, DType::bf16, DType::f16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST(Weights, RowsMayBeStridedAndOfAnyFloatType) {
  const ModelConfig model = tiny_model();
  const std::vector<float> values = random_matrix(1, 40, 72);
  std::vector<float> x = random_matrix(2, 1, 72);
  const auto product = [&](const Tensor& data) {
    Loaded loaded(model);
    loaded.weights.load(*loaded.backend, "layers.0.down.weight", data);
    std::vector<float> out(40);
    loaded.backend->linear(Tensor(x.data(), DType::f32, {1, 72}), loaded.weights.layers[0].down, {},
                           Tensor(out.data(), DType::f32, {1, 40}));
    return out;
  };
  // bf16 values are exact in every type.
  std::vector<float> exact = values, wide(40 * 100, 1e30f);
  std::vector<bf16> b(values.size());
  std::vector<f16> h(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    exact[i] = to_float(to_bf16(static_cast<float>(std::lround(values[i] * 100)) / 128));
    b[i] = to_bf16(exact[i]);
    h[i] = to_f16(exact[i]);
    wide[i / 72 * 100 + i % 72] = exact[i];
  }
  const std::vector<float> expected = product(Tensor(exact.data(), DType::f32, {40, 72}));
  EXPECT_EQ(product(Tensor(b.data(), DType::bf16, {40, 72})), expected);
  EXPECT_EQ(product(Tensor(h.data(), DType::f16, {40, 72})), expected);
  Tensor strided(wide.data(), DType::f32, {40, 72});
  strided.row_stride = 100;
  EXPECT_EQ(product(strided), expected);
  // Rows in reverse, as a negative stride.
  Tensor reversed(exact.data() + 39 * 72, DType::f32, {40, 72});
  reversed.row_stride = -72;
  const std::vector<float> backwards = product(reversed);
  EXPECT_EQ(std::vector<float>(backwards.rbegin(), backwards.rend()), expected);
}

TEST(Weights, VectorsMayBeStridedAndOfAnyFloatType) {
  const ModelConfig model = tiny_model();
  std::vector<float> spread(12 * 3, 9.0f);
  std::vector<f16> h(12);
  std::vector<bf16> b(12);
  for (size_t i = 0; i < 12; ++i) {
    spread[3 * i] = static_cast<float>(i) / 4;
    h[i] = to_f16(spread[3 * i]);
    b[i] = to_bf16(spread[3 * i]);
  }
  Tensor strided(spread.data(), DType::f32, {12});
  strided.row_stride = 3;
  for (const Tensor& data :
       {strided, Tensor(h.data(), DType::f16, {12}), Tensor(b.data(), DType::bf16, {12})}) {
    Loaded loaded(model);
    loaded.weights.load(*loaded.backend, "layers.0.q_norm.weight", data);
    for (size_t i = 0; i < 12; ++i)
      EXPECT_EQ(loaded.weights.layers[0].q_norm.weight[i], static_cast<float>(i) / 4);
  }
}

TEST(Weights, BytesAreThoseThatAreAllocated) {
  size_t allocated = 0;
  for (const bool tied : {false, true}) {
    ModelConfig model = tiny_model();
    model.tie_embeddings = tied;
    Weights weights(model, DType::bf16);
    HookedBackend backend(nullptr);
    const size_t bytes = weights.bytes(backend);
    weights.allocate(backend);
    // Every matrix and vector lies within the one allocation and none overlaps another.
    std::set<std::pair<const char*, const char*>> ranges;
    const auto add = [&](const LinearWeight& w) {
      const char* data = static_cast<const char*>(w.data);
      ranges.emplace(data, data + backend.weight_bytes(w.spec));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0u);
    };
    add(weights.embed);
    add(weights.lm_head);
    for (const LayerWeights& layer : weights.layers)
      for (const LinearWeight* w : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) add(*w);
    EXPECT_EQ(ranges.size(), tied ? 9u : 10u);
    const char* end = nullptr;
    for (const auto& [first, last] : ranges) {
      EXPECT_LE(end, first);
      end = last;
    }
    EXPECT_LE(static_cast<size_t>(end - ranges.begin()->first), bytes);
    if (tied) {
      EXPECT_LT(bytes, allocated);
    }
    allocated = bytes;
  }
}

TEST(Weights, ListsWhatActivationsAreMultipliedWith) {
  for (const bool tied : {false, true}) {
    ModelConfig model = tiny_model();
    model.tie_embeddings = tied;
    const Loaded loaded(model);
    const Weights& w = loaded.weights;
    const std::vector<const LinearWeight*> expected = {
        &w.layers[0].qkv,     &w.layers[0].o,    &w.layers[0].gate_up,
        &w.layers[0].down,    &w.layers[1].qkv,  &w.layers[1].o,
        &w.layers[1].gate_up, &w.layers[1].down, &w.lm_head};
    EXPECT_EQ(w.products(), expected);
    for (const LinearWeight* matrix : w.products()) EXPECT_NE(matrix->data, nullptr);
  }
}

TEST(Weights, LoadFromSeveralThreadsAtOnce) {
  const ModelConfig model = tiny_model();
  const Request request = make_request(1, random_prompt(1, 30), 10);
  const std::unique_ptr<Engine> one_by_one = make_engine();
  one_by_one->submit(request);
  auto engine = std::make_unique<Engine>(tiny_config(), model);
  const auto slots = Weights(model, DType::f32).slots();
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (size_t i = t; i < slots.size(); i += 4) load_slot(*engine, slots[i], i + 2);
    });
  for (std::thread& thread : threads) thread.join();
  engine->finish_loading();
  engine->submit(request);
  EXPECT_EQ(run_all(*engine).at({1, 0}).tokens, run_all(*one_by_one).at({1, 0}).tokens);
}

// Every row at a multiple of 128 bytes, and no array in another.
TEST(Activations, RowsAreAligned) {
  ModelConfig model = tiny_model();
  model.hidden_size = 42;
  model.vocab_size = 131;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Activations acts(model, dtype, 5, 3);
    const std::unique_ptr<Backend> backend = cpu_backend();
    acts.allocate(*backend);
    uintptr_t end = 0;
    size_t bytes = 0;
    for (const Tensor& x : {acts.residual, acts.normed, acts.delta, acts.qkv, acts.attn,
                            acts.gate_up, acts.act, acts.last, acts.logits}) {
      const size_t row = static_cast<size_t>(x.row_stride) * dtype_size(x.dtype);
      EXPECT_GE(x.row_stride, x.cols());
      EXPECT_LT(x.row_stride, x.cols() + 64);
      EXPECT_EQ(row % 128, 0u);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(x.data) % 128, 0u);
      EXPECT_GE(reinterpret_cast<uintptr_t>(x.data), end);
      end = reinterpret_cast<uintptr_t>(x.data) + row * static_cast<size_t>(x.rows());
      bytes += row * static_cast<size_t>(x.rows());
    }
    EXPECT_EQ(acts.bytes(), bytes);
    EXPECT_EQ(acts.logits.dtype, DType::f32);
  }
}

TEST(KvCache, ViewsFollowTheBackendsLayout) {
  const ModelConfig model = tiny_model();
  const std::unique_ptr<Backend> backend = cpu_backend();
  for (const int tile : {1, 16}) {
    KvCache cache(model, DType::bf16, 32, tile);
    EXPECT_EQ(cache.view().k, nullptr);
    EXPECT_EQ(cache.view().k_tile, tile);
    EXPECT_EQ(cache.view().num_blocks, 0);
    EXPECT_EQ(cache.block_bytes(), 2u * 2 * 32 * 2 * 12 * 2);  // layers, K and V, slots, heads, …
    for (const int blocks : {1, 7}) {  // allocated anew, as when its size has been found
      cache.allocate(*backend, blocks);
      const KvView first = cache.layer(0), second = cache.layer(1);
      EXPECT_EQ(first.num_blocks, blocks);
      EXPECT_EQ(first.tile(), tile);
      EXPECT_EQ(first.block_stride, 2 * 2 * 32 * 2 * 12);
      const auto at = [](const void* p) { return static_cast<const char*>(p); };
      EXPECT_EQ(at(first.v) - at(first.k), 32 * 2 * 12 * 2);
      EXPECT_EQ(at(second.k) - at(first.v), 32 * 2 * 12 * 2);
    }
  }
}

// What a backend is asked, and when.
TEST(Loading, ABackendIsAskedFirstAndPreparedLast) {
  class Asked : public HookedBackend {
   public:
    explicit Asked(std::vector<std::string>& log)
        : HookedBackend([&log](std::string_view op) { log.emplace_back(op); }), log_(log) {}
    void check_model(DType weights, int32_t num_heads, const std::vector<int32_t>& rotary_dims,
                     const KvView& kv) const override {
      log_.emplace_back("check_model");
      EXPECT_EQ(weights, DType::bf16);
      EXPECT_EQ(num_heads, 4);
      EXPECT_EQ(rotary_dims, std::vector<int32_t>{tiny_model().head_dim});
      EXPECT_EQ(kv.num_kv_heads, 2);
      EXPECT_EQ(kv.dtype, DType::f16);
    }
    void prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows) override {
      log_.emplace_back("prepare");
      EXPECT_EQ(weights.size(), 9u);
      EXPECT_EQ(max_rows, 256);
    }

   private:
    std::vector<std::string>& log_;
  };
  std::vector<std::string> log;
  EngineConfig config = tiny_config();
  config.dtype = DType::bf16;
  config.kv_cache_dtype = DType::f16;
  config.num_blocks = 0;
  config.memory_fraction = 0.9;
  auto engine = std::make_unique<Engine>(config, tiny_model(), std::make_unique<Asked>(log));
  EXPECT_EQ(log.at(0), "check_model");
  EXPECT_EQ(log.at(1), "alloc");
  load_random(*engine);
  const auto first = [&](const char* op) { return std::find(log.begin(), log.end(), op); };
  ASSERT_NE(first("prepare"), log.end());
  ASSERT_NE(first("attention"), log.end());  // the step that comes before the cache is sized
  EXPECT_LT(first("prepare"), first("embed"));
}

TEST(ModelConfig, ImpossibleValuesAreNamed) {
  const auto error = [](const std::function<void(ModelConfig&)>& change) {
    ModelConfig model = tiny_model();
    change(model);
    try {
      Weights weights(model, DType::f32);
    } catch (const std::invalid_argument& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(error([](auto& m) { m.vocab_size = 0; }).find("vocab_size"), std::string::npos);
  EXPECT_NE(error([](auto& m) { m.num_kv_heads = 3; }).find("num_kv_heads (3)"), std::string::npos);
  EXPECT_NE(error([](auto& m) { m.layers.clear(); }).find("layers"), std::string::npos);
  EXPECT_NE(error([](auto& m) { m.layers[0].rope = 1; }).find("rope 1"), std::string::npos);
  EXPECT_NE(error([](auto& m) { m.layers[0].window = -1; }).find("window"), std::string::npos);
  EXPECT_NE(error([](auto& m) { m.ropes[0].inv_freq.resize(7); }).find("14"), std::string::npos);
  EXPECT_NE(error([](auto& m) { m.norm_eps = -1.0f; }).find("norm_eps"), std::string::npos);
  EXPECT_EQ(error([](auto&) {}), "");
}

}  // namespace
}  // namespace ni
