#include <cmath>
#include <random>

#include "bench.h"

namespace ni::cuda::bench {
namespace {

constexpr int64_t kHidden = 4096, kFfn = 14336, kVocab = 128256;  // Llama 3.1 8B

double norm_us(Bench& b, int64_t rows, int64_t n, bool add) {
  const int64_t size = rows * n, copies = b.activation_copies(size * (add ? 6 : 4));
  const Device<bf16> x = random_bf16(size * copies), residual = random_bf16(size * copies);
  const Device<bf16> out(size * copies);
  const Device<float> weight = random_f32(n);
  return b.timer.us(copies, [&](int64_t i) {
    norm(x.data() + i * size, n, add ? residual.data() + i * size : nullptr, n, rows, n,
         {weight.data(), nullptr}, {}, DType::bf16, out.data() + i * size, n, true,
         b.timer.stream());
  });
}

double activation_us(Bench& b, int64_t rows) {
  const int64_t size = rows * kFfn, copies = b.activation_copies(size * 6);
  const Device<bf16> x = random_bf16(2 * size * copies), out(size * copies);
  return b.timer.us(copies, [&](int64_t i) {
    activation(x.data() + i * 2 * size, 2 * kFfn, rows, kFfn, Activation::silu, true, DType::bf16,
               out.data() + i * size, kFfn, b.timer.stream());
  });
}

double embed_us(Bench& b, int64_t rows) {
  constexpr int64_t kCopies = 64;  // of the ids: other rows of the table every time
  const int64_t size = rows * kHidden, out_copies = b.activation_copies(2 * size);
  const Device<bf16> table = random_bf16(kVocab * kHidden), out(size * out_copies);
  std::mt19937 rng(1);
  std::vector<int32_t> ids(static_cast<size_t>(rows * kCopies));
  for (int32_t& id : ids) id = static_cast<int32_t>(rng() % kVocab);
  const Device<int32_t> tokens(ids);
  return b.timer.us(kCopies, [&](int64_t i) {
    embed(tokens.data() + i * rows, nullptr, nullptr, rows, table.data(), nullptr, kHidden, kHidden,
          1, DType::bf16, out.data() + i % out_copies * size, kHidden, b.timer.stream());
  });
}

// Up to 256 rows are tokens of different sequences (blocks), more are those of a prompt.
double rope_us(Bench& b, int64_t rows) {
  constexpr int32_t kBlocks = 4096, kMaxPositions = 8192;
  const KvView shape{nullptr, nullptr, DType::bf16, kBlocks, kBlockSize, kKvHeads, kHeadDim};
  const Device<bf16> k(kBlocks * shape.block_elements()), v(kBlocks * shape.block_elements());
  KvView kv = shape;
  kv.k = k.data();
  kv.v = v.data();
  kv.k_tile = 1;
  const int64_t step = rows > 256 ? 1 : kBlockSize;
  const int64_t copies = std::min<int64_t>(64, kBlocks * kBlockSize / (rows * step));
  const std::vector<int32_t> blocks = permutation(kBlocks);
  std::vector<int64_t> slots;
  std::vector<int32_t> positions;
  for (int64_t t = 0; t < rows * copies; ++t) {
    const int64_t at = t * step;
    slots.push_back(blocks[static_cast<size_t>(at / kBlockSize)] * int64_t{kBlockSize} +
                    at % kBlockSize);
    positions.push_back(static_cast<int32_t>(at % kMaxPositions));
  }
  const Device<int64_t> slot_mapping(slots);
  const Device<int32_t> position(positions);
  std::vector<float> cosines, sines;
  for (int64_t i = 0; i < kMaxPositions * kHeadDim / 2; ++i) {
    const double angle =
        static_cast<double>(i / (kHeadDim / 2)) / (1.0 + static_cast<double>(i % (kHeadDim / 2)));
    cosines.push_back(static_cast<float>(std::cos(angle)));
    sines.push_back(static_cast<float>(std::sin(angle)));
  }
  const Device<float> cos(cosines), sin(sines);
  RopeArgs rope;
  rope.cos = cos.data();
  rope.sin = sin.data();
  rope.rotary_dim = kHeadDim;
  const int64_t size = rows * kQkvCols, qkv_copies = b.activation_copies(2 * size);
  const Device<bf16> qkv = random_bf16(size * qkv_copies);
  return b.timer.us(copies, [&](int64_t i) {
    rope_kv_write(qkv.data() + i % qkv_copies * size, kQkvCols, rows, kHeads,
                  position.data() + i * rows, slot_mapping.data() + i * rows, rope, kv, DType::bf16,
                  true, b.timer.stream());
  });
}
}  // namespace

void bench_rows(Bench& b) {
  Table table{"rows",
              "Operators on rows (hidden 4096, Llama 3.1 8B)",
              {"operator", "rows", "us", "GB/s", "% of copy"},
              {}};
  const auto add = [&](const char* name, int64_t rows, int64_t bytes_of_row, double us) {
    const auto bytes = static_cast<double>(rows * bytes_of_row);
    table.rows.push_back({name, rows, us, b.gbs(bytes, us), b.share(bytes, us)});
  };
  constexpr int64_t kSizes[] = {1, 64, 256, 4096};
  for (const int64_t t : kSizes) add("norm", t, 4 * kHidden, norm_us(b, t, kHidden, false));
  for (const int64_t t : kSizes) add("add and norm", t, 8 * kHidden, norm_us(b, t, kHidden, true));
  for (const int64_t t : kSizes) add("rope and KV write", t, 4 * kQkvCols, rope_us(b, t));
  for (const int64_t t : kSizes) add("silu and multiply", t, 6 * kFfn, activation_us(b, t));
  for (const int64_t t : kSizes) add("embed", t, 4 * kHidden, embed_us(b, t));
  b.finish(std::move(table));
}
}  // namespace ni::cuda::bench
