#include "bench.h"
#include "cuda/linear.h"

namespace ni::cuda::bench {
namespace {

struct Shape {
  const char* model;
  int64_t hidden, inner;
  int32_t heads, kv_heads, head_dim;
  bool qk_norm;
};
constexpr Shape kShapes[] = {{"Qwen3 0.6B", 1024, 3072, 16, 8, 128, true},
                             {"Llama 3.2 1B", 2048, 8192, 32, 8, 64, false},
                             {"Llama 3.1 8B", 4096, 14336, 32, 8, 128, false}};
constexpr int64_t kRows[] = {4096, 8192}, kMostRows = 8192;
constexpr int32_t kPositions = 8192, kBlocks = kMostRows / kBlockSize;

// What rope_kv_write() needs of one prompt.
struct Rotation {
  KvView kv;
  Device<bf16> k, v;
  Device<float> cos = random_f32(kPositions * kHeadDim / 2),
                sin = random_f32(kPositions * kHeadDim / 2), norm = random_f32(kHeadDim);
  Device<int32_t> positions;
  Device<int64_t> slots;
  StepInputs in;
  RopeKvWrite write;

  explicit Rotation(const Shape& s)
      : kv{nullptr, nullptr, DType::bf16, kBlocks, kBlockSize, s.kv_heads, s.head_dim},
        k(kBlocks * kv.block_elements()),
        v(kBlocks * kv.block_elements()),
        positions(upwards<int32_t>()),
        slots(upwards<int64_t>()) {
    kv.k = k.data();
    kv.v = v.data();
    kv.k_tile = 1;
    in.positions = positions.data();
    in.slot_mapping = slots.data();
    write = {&in, {cos.data(), sin.data(), s.head_dim, {}, {}, 1e-6f}, kv};
    if (s.qk_norm) write.rope.q_norm.weight = write.rope.k_norm.weight = norm.data();
  }
  template <typename T>
  static std::vector<T> upwards() {
    std::vector<T> all;
    for (T i = 0; i < kMostRows; ++i) all.push_back(i);
    return all;
  }
};

}  // namespace

// Of products with many rows: what follows them, as part of linear_large and apart.
void bench_large(Bench& b) {
  const cudaStream_t stream = b.timer.stream();
  Table table{
      "large",
      "linear_large (bf16; alone: the product through its plan; then: and what follows)",
      {"weight", "model", "M", "alone us", "then us", "linear_large us", "TFLOP/s", "alone %"},
      {}};
  for (const Shape& s : kShapes) {
    const int64_t q = int64_t{s.heads} * s.head_dim, k = s.hidden;
    const int64_t qkv = q + 2 * int64_t{s.kv_heads} * s.head_dim;
    const Rotation rotation(s);
    for (const bool gated : {false, true}) {
      const int64_t n = gated ? 2 * s.inner : qkv;
      const int64_t copies = b.cold_copies(2 * n * k);
      const Device<bf16> memory = random_bf16(copies * n * k, 0.02f),
                         x = random_bf16(kMostRows * k);
      const Device<bf16> out(kMostRows * n), act(kMostRows * s.inner), last = random_bf16(64 * 64);
      std::vector<LinearWeight> weights;
      for (int64_t i = 0; i < copies; ++i)
        weights.push_back({{n, k, DType::bf16, false}, memory.data() + i * n * k, nullptr});
      const LinearWeight lm_head{{64, 64, DType::bf16, false}, last.data(), nullptr};
      Linear linear(b.card, {DType::bf16, true, ""}, stream);
      std::vector<const LinearWeight*> all;
      for (const LinearWeight& w : weights) all.push_back(&w);
      all.push_back(&lm_head);
      linear.prepare(all, kMostRows);
      for (const int64_t m : kRows) {
        const auto product = [&](int64_t i) {
          linear.run({x.data(), DType::bf16, {m, k}}, weights[static_cast<size_t>(i)], {},
                     {out.data(), DType::bf16, {m, n}}, stream);
        };
        const double alone = b.timer.us(copies, product);
        const double apart = b.timer.us(copies, [&](int64_t i) {
          product(i);
          if (gated) {
            activation(out.data(), n, m, s.inner, Activation::silu, true, DType::bf16, act.data(),
                       s.inner, stream);
          } else {
            rope_kv_write(out.data(), n, m, s.heads, rotation.in.positions,
                          rotation.in.slot_mapping, rotation.write.rope, rotation.kv, DType::bf16,
                          true, stream);
          }
        });
        SkinnyArgs a;
        a.x = x.data();
        a.rows = m;
        a.x_stride = a.w_stride = a.in_features = k;
        a.out = gated ? act.data() : out.data();
        a.out_features = n;
        a.out_stride = gated ? s.inner : n;
        a.gated = gated;
        a.settled = true;
        double ours = kMissing;
        if (fuses_large(a, gated ? nullptr : &rotation.write, b.card))
          ours = b.timer.us(copies, [&](int64_t i) {
            a.w = weights[static_cast<size_t>(i)].data;
            linear_large_sm90(a, gated ? nullptr : &rotation.write, b.card, stream);
          });
        const double flops = 2e-6 * static_cast<double>(m * n * k);
        table.rows.push_back({concat(n, " x ", k, gated ? " (gate)" : " (qkv)"), s.model, m, alone,
                              apart, ours, flops / ours, 100 * alone / ours});
      }
    }
  }
  b.finish(std::move(table));
}

}  // namespace ni::cuda::bench
