// The staging layer: over a CPU it gives exactly that CPU's results, and it sees what an operator
// writes beside them. And the work lists of attention, which it builds for its inner backend.
#include "core/attn_items.h"
#include "reference.h"

namespace ni::test {
namespace {

TEST(Staged, GivesExactlyTheInnerResults) {
  const auto plain = make_cpu("portable");
  StagedBackend staged(make_cpu("portable"));
  EXPECT_EQ(staged.info().device, "cpu");
  EXPECT_EQ(staged.info().activation_dtype, DType::f32);
  auto w = random_floats(33, 1), b = random_floats(33, 2), bias = random_floats(50, 3);
  TestWeight weight(*plain, 50, 33, DType::bf16, DType::f32, random_floats(50 * 33, 4));
  TestWeight weight_there(staged, 50, 33, DType::bf16, DType::f32, random_floats(50 * 33, 4));
  weight.weight.bias = weight_there.weight.bias = bias.data();
  const auto x = random_floats(7 * 33, 5), old = random_floats(7 * 50, 6);
  const auto run = [&](Backend& backend, const LinearWeight& matrix) {
    Guarded in(7, 33, x), residual(7, 33, x), normed(7, 33), product(7, 50, old), half(7, 25);
    backend.add_norm(in.tensor(), residual.tensor(), {w.data(), b.data()}, {NormKind::layer},
                     normed.tensor());
    backend.linear(normed.tensor(), matrix, {true}, product.tensor());
    backend.activation(product.tensor(), Activation::silu, true, half.tensor());
    EXPECT_TRUE(residual.intact() && normed.intact() && product.intact() && half.intact());
    return std::array{residual, normed, product, half};
  };
  auto here = run(*plain, weight.weight), there = run(staged, weight_there.weight);
  for (size_t i = 0; i < here.size(); ++i)
    for (int64_t r = 0; r < 7; ++r) EXPECT_TRUE(here[i].same_row(r, there[i], r)) << i;
}

// An inner backend whose norm writes where the test says.
class Careless final : public Backend {
 public:
  enum class Fault { none, beside_row, before, after, into_input, leaves_out };

  const BackendInfo& info() const override { return cpu_->info(); }
  size_t memory_available() const override { return cpu_->memory_available(); }
  Buffer alloc(size_t bytes) override { return cpu_->alloc(bytes); }
  Buffer alloc_host(size_t bytes) override { return cpu_->alloc_host(bytes); }
  void upload(const void* h, void* d, size_t n) override { cpu_->upload(h, d, n); }
  void download(const void* d, void* h, size_t n) override { cpu_->download(d, h, n); }
  void synchronize() override {}
  uint64_t mark() override { return 0; }
  void wait(uint64_t) override {}
  void run_step(GraphKey, const std::function<void()>& step) override { step(); }
  bool healthy() const override { return true; }
  void check_model(DType, int32_t, const std::vector<int32_t>&, const KvView&) const override {}
  size_t weight_bytes(const WeightSpec& s) const override { return cpu_->weight_bytes(s); }
  void load_rows(const LinearWeight& w, int64_t r, Tensor t) override { cpu_->load_rows(w, r, t); }
  void prepare(const std::vector<const LinearWeight*>&, int64_t) override {}
  void embed(const StepInputs&, const LinearWeight&, const EmbedArgs&, Tensor) override {}
  void norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) override {
    if (fault != Fault::leaves_out) cpu_->norm(x, w, a, out);
    float* first = out.as<float>();
    if (fault == Fault::beside_row) first[out.cols()] += 1;
    if (fault == Fault::before) first[-1] += 1;
    if (fault == Fault::after) first[out.rows() * out.row_stride] += 1;
    if (fault == Fault::into_input) x.as<float>()[0] += 1;
  }
  void add_norm(Tensor, Tensor, const NormWeight&, const NormArgs&, Tensor) override {}
  void linear(Tensor, const LinearWeight&, const LinearArgs&, Tensor) override {}
  void rope_kv_write(Tensor, const StepInputs&, const RopeArgs&, const KvView&) override {}
  void attention(Tensor, const StepInputs&, const AttnArgs&, const KvView&, Tensor) override {}
  void activation(Tensor, Activation, bool, Tensor) override {}
  void gather_rows(Tensor, const int32_t*, int64_t, Tensor) override {}
  void copy_blocks(const StepInputs&, const KvView&) override {}
  void sample(Tensor, const StepInputs&, int32_t, const SampleOutputs&) override {}

  Fault fault = Fault::none;

 private:
  std::unique_ptr<CpuBackend> cpu_ = make_cpu("reference", 1);
};

TEST(Staged, SeesStrayWritesAndForgottenElements) {
  using Fault = Careless::Fault;
  for (const int64_t cols : {20, 32}) {  // 32 floats fill 128 bytes
    auto w = random_floats(static_cast<size_t>(cols), 1);
    const auto x = random_floats(static_cast<size_t>(3 * cols), 2);
    for (const Fault fault : {Fault::none, Fault::beside_row, Fault::before, Fault::after,
                              Fault::into_input, Fault::leaves_out}) {
      auto inner = std::make_unique<Careless>();
      inner->fault = fault;
      StagedBackend staged(std::move(inner));
      Guarded in(3, cols, x), out(3, cols, x);
      const auto norm = [&] { staged.norm(in.tensor(), {w.data()}, {}, out.tensor()); };
      if (fault == Fault::none) {
        norm();
        EXPECT_FALSE(std::isnan(out.at(2, cols - 1)));
      } else if (fault == Fault::leaves_out) {
        norm();
        EXPECT_TRUE(std::isnan(out.at(0, 0)) && std::isnan(out.at(2, cols - 1)));
      } else {
        EXPECT_THROW(norm(), std::logic_error) << static_cast<int>(fault);
      }
    }
  }
}

// -- Work lists ----------------------------------------------------------------------------------

struct Lists {
  std::vector<std::pair<int32_t, int32_t>> decode, prefill;
  std::vector<DecodeCut> cuts;
  StepInputs in;
};

Lists lists(const std::vector<int32_t>& query_lens, const std::vector<int32_t>& contexts,
            const AttnTiling& tiling) {
  std::vector<int32_t> starts{0};
  for (const int32_t n : query_lens) starts.push_back(starts.back() + n);
  AttnLists got{{{9, 9}}, {{9, 9}}, {{9, 9, 9}}};
  Lists out;
  build_attn_items(starts.data(), contexts.data(), static_cast<int32_t>(contexts.size()), tiling,
                   got, out.in);
  out.cuts = got.cuts;
  for (const AttnItem& i : got.decode) out.decode.emplace_back(i.seq, i.index);
  for (const AttnItem& i : got.prefill) out.prefill.emplace_back(i.seq, i.index);
  return out;
}

using Items = std::vector<std::pair<int32_t, int32_t>>;

TEST(AttnItems, CutDecodesAlongTheCacheAndPrefillsAlongTheirRows) {
  const Lists l = lists({1, 70, 4, 0, 5, 1}, {257, 70, 256, 90, 300, 1}, {256, 64, 4, 100});
  EXPECT_EQ(l.decode, (Items{{0, 0}, {0, 1}, {2, 0}, {5, 0}}));
  // Last positions: 299 of sequence 4; 69 and 63 of sequence 1.
  EXPECT_EQ(l.prefill, (Items{{4, 0}, {1, 1}, {1, 0}}));
}

TEST(AttnItems, TiesKeepTheOrderOfSequences) {
  const Lists l = lists({64, 128, 64}, {128, 128, 128}, {256, 64, 4, 100});
  EXPECT_EQ(l.prefill, (Items{{0, 0}, {1, 1}, {2, 0}, {1, 0}}));
}

TEST(AttnItems, WithoutRoomASequenceIsNotCut) {
  const std::vector<int32_t> ones(4, 1), contexts{300, 900, 300, 600};  // 2, 4, 2 and 3 chunks
  const Items cut{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {1, 2}, {1, 3},
                  {2, 0}, {2, 1}, {3, 0}, {3, 1}, {3, 2}};
  EXPECT_EQ(lists(ones, contexts, {256, 64, 1, 11}).decode, cut);
  // The shortest is the first that is not cut, the later of equals.
  EXPECT_EQ(
      lists(ones, contexts, {256, 64, 1, 10}).decode,
      (Items{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {1, 2}, {1, 3}, {2, -1}, {3, 0}, {3, 1}, {3, 2}}));
  EXPECT_EQ(lists(ones, contexts, {256, 64, 1, 8}).decode,
            (Items{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {1, 2}, {1, 3}, {2, -1}, {3, -1}}));
  EXPECT_EQ(lists(ones, contexts, {256, 64, 1, 7}).decode,
            (Items{{0, -1}, {1, 0}, {1, 1}, {1, 2}, {1, 3}, {2, -1}, {3, -1}}));
  // The longest does not fit, the next does.
  EXPECT_EQ(lists(ones, contexts, {256, 64, 1, 6}).decode,
            (Items{{0, -1}, {1, -1}, {2, -1}, {3, 0}, {3, 1}, {3, 2}}));
  EXPECT_EQ(lists(ones, contexts, {256, 64, 1, 4}).decode,
            (Items{{0, -1}, {1, -1}, {2, -1}, {3, -1}}));
  // One chunk is the whole, with its own index as long as there is room.
  EXPECT_EQ(lists({1, 1}, {300, 20}, {256, 64, 1, 2}).decode, (Items{{0, -1}, {1, 0}}));
}

TEST(AttnItems, ShortQueriesMayHaveMoreItems) {
  const std::vector<int32_t> contexts{1100, 600};  // 5 and 3 chunks
  const auto build = [&](std::vector<int32_t> rows) {
    return lists(rows, contexts, {256, 64, 4, 2});
  };
  EXPECT_EQ(build({1, 1}).decode.size(), 8u);  // 2 * 4 / 1
  EXPECT_EQ(build({1, 2}).decode.size(), 4u);  // 2 * 4 / 2: the shorter is cut
  EXPECT_EQ(build({3, 1}).decode.size(), 2u);
  EXPECT_EQ(build({9, 1}).decode.size(), 3u);  // the first is not cut along its context
}

TEST(AttnItems, CountsGoWithTheLists) {
  const auto expect = [](const Lists& l, int32_t rows, int32_t whole, int32_t chunks) {
    EXPECT_EQ(l.in.num_decode_items, static_cast<int32_t>(l.decode.size()));
    EXPECT_EQ(l.in.num_prefill_items, static_cast<int32_t>(l.prefill.size()));
    EXPECT_EQ(l.in.max_decode_query_len, rows);
    EXPECT_EQ(l.in.num_whole_items, whole);
    EXPECT_EQ(l.in.max_decode_chunks, chunks);
  };
  expect(lists({1, 2, 9}, {1100, 600, 40}, {256, 64, 4, 4}), 2, 0, 5);
  expect(lists({1, 4, 9}, {1100, 600, 40}, {256, 64, 4, 4}), 4, 1, 5);
  expect(lists({1, 4, 9}, {1100, 600, 40}, {256, 64, 4, 2}), 4, 2, 5);
  expect(lists({9}, {40}, {256, 64, 4, 2}), 0, 0, 0);
}

// A range begins where the work before it says: tokens, and 50 for each chunk.
TEST(AttnItems, CutsHaveEqualShares) {
  AttnTiling tiling{256, 64, 4, 100};
  tiling.decode_ranges = 7;
  tiling.item_cost = 50;
  const std::vector<int32_t> contexts{300, 1, 0, 1100, 90, 256};  // the fifth is a prefill
  const Lists l = lists({1, 2, 1, 4, 60, 1}, contexts, tiling);
  ASSERT_EQ(l.in.num_decode_ranges, 7);
  ASSERT_EQ(l.cuts.size(), 8u);
  const auto work = [](int32_t context) { return context + 50 * ((context + 255) / 256); };
  const int32_t total = work(300) + work(1) + work(1100) + work(256);
  for (size_t i = 0; i < 7; ++i) {
    const DecodeCut& cut = l.cuts[i];
    const auto [seq, chunk] = l.decode.at(static_cast<size_t>(cut.item));
    EXPECT_EQ(chunk, 0);
    EXPECT_EQ(cut.context, contexts[static_cast<size_t>(seq)]);
    double before = cut.part / 4294967296.0 * work(cut.context);
    for (const auto& [s, c] : l.decode)
      if (s < seq && c == 0) before += work(contexts[static_cast<size_t>(s)]);
    EXPECT_NEAR(before, total * static_cast<double>(i) / 7, 1e-3) << i;
  }
  EXPECT_EQ(l.cuts[7].item, static_cast<int32_t>(l.decode.size()));
  EXPECT_EQ(l.cuts[7].part, 0u);
}

TEST(AttnItems, NoCutsOfWholeSequencesOfNoneOrUnasked) {
  AttnTiling tiling{256, 64, 1, 2};
  EXPECT_EQ(lists({1}, {300}, tiling).in.num_decode_ranges, 0);
  tiling.decode_ranges = 7;
  EXPECT_EQ(lists({1}, {300}, tiling).in.num_decode_ranges, 7);
  for (const Lists& l : {lists({1, 1}, {300, 300}, tiling), lists({70}, {70}, tiling)}) {
    EXPECT_EQ(l.in.num_decode_ranges, 0);
    EXPECT_TRUE(l.cuts.empty());
  }
}

TEST(AttnItems, PaddingRowsGetNone) {
  const Lists l = lists({1, 1, 1}, {5, 0, 0}, {256, 64, 4, 100});
  EXPECT_EQ(l.decode, (Items{{0, 0}}));
  EXPECT_TRUE(l.prefill.empty());
}

}  // namespace
}  // namespace ni::test
