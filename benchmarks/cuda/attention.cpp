#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "bench.h"
#include "core/attn_items.h"
#include "cuda/attention_plan.h"

namespace ni::cuda {

// The two kernels behind attention_prefill() (cuda/attention.cuh, which only nvcc reads). False:
// not for this card.
bool attention_prefill_sm90(const AttnParams& p, int32_t num_items, const Card& card,
                            cudaStream_t stream);
void attention_prefill_mma(const AttnParams& p, int32_t num_items, const Card& card,
                           cudaStream_t stream);

}  // namespace ni::cuda

namespace ni::cuda::bench {
namespace {

// FlashAttention-3 on an H200, same heads, bf16, paged cache with blocks of 16.
constexpr const char* kPeer = "FlashAttention-3 on an H200";

// Lengths from `low` to `high` in a random order, always the same one.
std::vector<int32_t> spread(int32_t count, int32_t low, int32_t high) {
  std::vector<int32_t> lengths;
  for (int32_t i = 0; i < count; ++i)
    lengths.push_back(low + i * (high - low) / std::max(1, count - 1));
  std::shuffle(lengths.begin(), lengths.end(), std::mt19937(1));
  return lengths;
}

// Sequences in a paged cache of several layers, laid out as the engine does:
// [block][layer][K, V][kv head][slot][d]; blocks are shuffled.
class Sequences {
 public:
  Sequences(const std::vector<int32_t>& contexts, int32_t query, DType dtype, int64_t layers,
            const Card& card)
      : tables_(permutation(static_cast<int32_t>(contexts.size()) * blocks_of(longest(contexts)))) {
    const auto seqs = static_cast<int32_t>(contexts.size());
    const int32_t context = longest(contexts);
    std::vector<int32_t> starts;
    for (int32_t s = 0; s <= seqs; ++s) starts.push_back(s * query);
    StepInputs in;
    AttnLists lists;
    build_attn_items(starts.data(), contexts.data(), seqs, attention_tiling(card), lists, in);
    starts_ = Device<int32_t>(starts);
    contexts_ = Device<int32_t>(contexts);
    num_items_ = static_cast<int32_t>(lists.decode.size() + lists.prefill.size());
    items_ = Device<AttnItem>(lists.decode.empty() ? lists.prefill : lists.decode);
    cuts_ = Device<DecodeCut>(lists.cuts);
    in.num_tokens = seqs * query;
    in.num_seqs = seqs;
    in.max_query_len = query;
    in.max_context_len = context;
    in.block_table_stride = blocks_of(context);
    in.cu_seqlens_q = starts_.data();
    in.context_lens = contexts_.data();
    in.block_tables = tables_.data();
    in.decode_items = in.prefill_items = items_.data();
    in.decode_cuts = cuts_.data();
    step_ = Device<StepInputs>(std::vector<StepInputs>{in});

    KvView& kv = params_.kv;
    kv = {nullptr, nullptr, dtype, seqs * blocks_of(context), kBlockSize, kKvHeads, kHeadDim};
    kv.k_tile = 1;
    kv.block_stride = 2 * layers * kv.block_elements();
    const int64_t elements = kv.num_blocks * kv.block_stride;
    if (dtype == DType::bf16) {
      cache16_ = random_bf16(elements);
      kv.k = cache16_.data();
    } else {
      cache8_ = random_of<fp8>(elements, [](float v) { return to_fp8(v); });
      kv.k = cache8_.data();
    }
    q_ = random_bf16(in.num_tokens * kQkvCols);
    out_ = Device<bf16>(in.num_tokens * kHeads * kHeadDim);
    params_.q = q_.data();
    params_.q_stride = kQkvCols;
    params_.out = out_.data();
    params_.out_stride = kHeads * kHeadDim;
    params_.args = {kHeads, 1 / std::sqrt(static_cast<float>(kHeadDim)), 0, 0};
    params_.step = step_.data();
  }

  static constexpr int32_t kMaxItems = 2048;  // as CudaBackend asks for
  static int32_t longest(const std::vector<int32_t>& contexts) {
    return *std::max_element(contexts.begin(), contexts.end());
  }
  static int32_t blocks_of(int32_t context) { return (context + kBlockSize - 1) / kBlockSize; }

  AttnParams layer(int64_t i) const {
    AttnParams p = params_;
    const int64_t part = p.kv.block_elements() * static_cast<int64_t>(dtype_size(p.kv.dtype));
    p.kv.k = static_cast<char*>(params_.kv.k) + 2 * i * part;
    p.kv.v = static_cast<char*>(p.kv.k) + part;
    return p;
  }
  int32_t num_items() const { return num_items_; }

 private:
  AttnParams params_;
  int32_t num_items_ = 0;
  Device<int32_t> tables_;
  Device<int32_t> starts_{1}, contexts_{1};
  Device<AttnItem> items_{1};
  Device<DecodeCut> cuts_{1};
  Device<StepInputs> step_{1};
  Device<bf16> cache16_{1}, q_{1}, out_{1};
  Device<fp8> cache8_{1};
};
}  // namespace

void bench_decode(Bench& b) {
  struct Case {
    int32_t seqs, low, high;  // contexts
    double peer_us;
  };
  constexpr Case kCases[] = {
      {1, 1024, 1024, 12.9},         {1, 4096, 4096, 15.7},      {1, 16384, 16384, 32.2},
      {1, 131072, 131072, kMissing}, {8, 1024, 1024, 19.0},      {8, 4096, 4096, 42.8},
      {8, 16384, 16384, 133},        {64, 1024, 1024, 77},       {64, 4096, 4096, 256},
      {256, 1024, 1024, 284},        {256, 4096, 4096, 1004},    {64, 128, 384, kMissing},
      {128, 400, 1300, kMissing},    {256, 400, 1300, kMissing}, {256, 100, 2000, kMissing},
  };
  const size_t bytes =
      decode_workspace_bytes(Sequences::kMaxItems, Sequences::kMaxItems, kHeads, kHeadDim);
  const Device<char> workspace(static_cast<int64_t>(bytes));
  check_cuda(cudaMemset(workspace.data(), 0, bytes), "cudaMemset");
  Table table{"decode",
              concat("Paged decode attention (32/8 heads of 128, blocks of 16), beside ", kPeer),
              {"cache", "batch", "context", "us", "GB/s", "% of copy", "FA3 us", "FA3 / us"},
              {}};
  for (const DType dtype : {DType::bf16, DType::fp8_e4m3}) {
    for (const auto& [seqs, low, high, peer] : kCases) {
      const std::vector<int32_t> contexts = spread(seqs, low, high);
      const int64_t tokens = std::accumulate(contexts.begin(), contexts.end(), int64_t{0});
      const int64_t read =
          int64_t{2} * tokens * kKvHeads * kHeadDim * static_cast<int64_t>(dtype_size(dtype));
      const int64_t layers = b.cold_copies(read);
      const Sequences sequences(contexts, 1, dtype, layers, b.card);
      const double us = b.timer.us(layers, [&](int64_t i) {
        attention_decode(sequences.layer(i), 1, Sequences::kMaxItems, workspace.data(), b.card,
                         b.timer.stream());
      });
      const auto moved = static_cast<double>(read + int64_t{4} * seqs * kHeads * kHeadDim);
      const double peer_us = dtype == DType::bf16 ? peer : kMissing;
      table.rows.push_back({dtype_name(dtype), seqs,
                            low == high ? concat(low) : concat(low, "-", high), us,
                            b.gbs(moved, us), b.share(moved, us), peer_us, peer_us / us});
    }
  }
  b.finish(std::move(table));
}

void bench_prefill(Bench& b) {
  struct Case {
    int32_t seqs, query;
    double peer_tflops;
  };
  Table table{"prefill",
              concat("Paged prefill attention, causal, bf16, beside ", kPeer, " (TFLOP/s)"),
              {"batch", "tokens", "wgmma us", "mma us", "wgmma", "mma", "FA3", "wgmma / FA3"},
              {}};
  for (const auto& [seqs, query, peer] :
       {Case{1, 4096, 522}, Case{1, 8192, 562}, Case{16, 2048, 461}}) {
    const std::vector<int32_t> contexts(static_cast<size_t>(seqs), query);
    const Sequences sequences(contexts, query, DType::bf16, 1, b.card);
    const AttnParams p = sequences.layer(0);
    const cudaStream_t stream = b.timer.stream();
    double wgmma = kMissing;
    if (attention_prefill_sm90(p, sequences.num_items(), b.card, stream))
      wgmma = b.timer.us(
          1, [&](int64_t) { attention_prefill_sm90(p, sequences.num_items(), b.card, stream); });
    const double mma = b.timer.us(
        1, [&](int64_t) { attention_prefill_mma(p, sequences.num_items(), b.card, stream); });
    const double rows = query, pairs = seqs * rows * (rows + 1) / 2;
    const double tflop = 4e-6 * pairs * kHeads * kHeadDim;  // a microsecond
    table.rows.push_back(
        {seqs, query, wgmma, mma, tflop / wgmma, tflop / mma, peer, tflop / wgmma / peer});
  }
  b.finish(std::move(table));
}
}  // namespace ni::cuda::bench
