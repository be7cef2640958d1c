// Launch configurations of linear_skinny on every card it is made for, without a card.
#include "../../cuda/linear_plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>

namespace ni::cuda {
namespace {

struct CardSizes {
  int sms, max_smem, smem_per_sm;
  int in_flight;  // bytes that hide the latency of its memory, of a multiprocessor
};
constexpr CardSizes kCards[] = {
    {108, 163 * 1024, 164 * 1024, 32 * 1024},  // sm_80
    {84, 99 * 1024, 100 * 1024, 16 * 1024},    // sm_86
    {128, 99 * 1024, 100 * 1024, 16 * 1024},   // sm_89
    {132, 227 * 1024, 228 * 1024, 32 * 1024},  // sm_90
};

template <typename F>
void for_each_case(const F& f) {
  for (const CardSizes& card : kCards)
    for (const int64_t m : {1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 500, 8192})
      for (const int64_t n : {1, 8, 1000, 1024, 4096, 6144, 28672, 151936})
        f(card, m, n, plan_skinny(m, n, card.sms, card.max_smem, card.smem_per_sm));
}

TEST(LinearPlan, FitsEveryCard) {
  for_each_case([](const CardSizes& card, int64_t m, int64_t n, const SkinnyPlan& p) {
    ASSERT_GT(p.rows, 0) << m << " x " << n;
    EXPECT_GE(p.rows, std::min<int64_t>(m, 64));
    EXPECT_LE(p.rows, std::max<int64_t>(8, 2 * m));  // no more than twice as many as there are
    EXPECT_TRUE(p.warps == 1 || p.warps == 2 || p.warps == 4 || p.warps == 8);
    EXPECT_GE(p.stages, 2);  // one comes while another is multiplied
    EXPECT_LE(p.stages, kSkinnyMaxStages);
    EXPECT_EQ(p.smem, p.stages * (p.rows + 8 * p.warps) * skinny_row_bytes(p.rows));
    EXPECT_LE(p.smem, card.max_smem);
  });
}

// Rows of a stage start at different banks and 16-byte boundaries, and a stage is whole groups.
TEST(LinearPlan, LayoutOfAStage) {
  for (const int rows : {8, 16, 32, 64}) {
    EXPECT_EQ(skinny_stage_k(rows) % 16, 0);
    EXPECT_EQ(skinny_row_bytes(rows) % 16, 0);
    EXPECT_EQ(skinny_row_bytes(rows) % 128, 32);
  }
}

TEST(LinearPlan, SpreadsFewStripsOverTheCard) {
  const SkinnyPlan p = plan_skinny(1, 1024, 132, 227 * 1024, 228 * 1024);  // 128 strips
  EXPECT_EQ(p.warps, 1);
  EXPECT_GE((p.stages - 1) * 8 * skinny_stage_k(p.rows) * 2, 24 * 1024);  // bytes in flight
}

TEST(LinearPlan, KeepsBytesInFlight) {
  for (const CardSizes& card : kCards)
    for (const int64_t m : {1, 8, 16})
      for (const int64_t n : {4096, 6144, 28672, 151936}) {
        const SkinnyPlan p = plan_skinny(m, n, card.sms, card.max_smem, card.smem_per_sm);
        const int64_t ctas = ((n + 7) / 8 + p.warps - 1) / p.warps;
        const int64_t of_sm = (ctas + card.sms - 1) / card.sms;
        const int64_t resident = std::min<int64_t>(of_sm, card.smem_per_sm / (p.smem + 1024));
        EXPECT_GE(resident * (p.stages - 1) * 8 * p.warps * skinny_stage_k(p.rows) * 2,
                  card.in_flight)
            << m << " x " << n << " on " << card.sms;
      }
}

// -- linear_skinny_sm90 ---------------------------------------------------------------------------

TEST(LinearPlanSm90, FitsTheCardAndReachesEveryStrip) {
  const CardSizes& card = kCards[3];
  for (const bool norm : {false, true})
    for (const auto& [gated, f32] : {std::pair{false, false}, {true, false}, {false, true}})
      for (const int64_t m :
           {1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 160, 192, 200, 256, 500, 9000})
        for (const int64_t n : {16, 1008, 1024, 4096, 6144, 28672, 34816, 151936})
          for (const int64_t k : {64, 192, 1024, 2048, 4096, 14336}) {
            const auto p = plan_skinny_sm90(m, n, k, norm, gated, card.sms, card.max_smem,
                                            card.smem_per_sm, f32);
            if (norm && (m > 16 || !p.fits())) continue;  // not fused
            EXPECT_GE(p.stages, 3);
            EXPECT_LE(p.stages, kSkinnySm90MaxStages);
            EXPECT_LE(p.smem, card.max_smem);
            constexpr int kLost = 1024 - 16;  // by alignment
            const int used = p.stages * p.stage_bytes + p.x_bytes + kLost;
            EXPECT_GE(p.smem, used + p.out_bytes + 8 * (2 * p.stages + 3));
            EXPECT_EQ(p.stage_bytes % kSkinnyAlign, 0);
            EXPECT_TRUE(m <= 64 ? p.rows == m || (n <= 1056 && 2 * p.rows >= m && p.rows >= 17)
                                : p.rows >= 33 && p.rows <= 256)
                << m << " " << p.rows;
            EXPECT_EQ(p.atoms,
                      SkinnySm90Plan::stage_atoms(skinny_sm90_rows(p.rows), m > 16       ? p.tile
                                                                            : p.tile > 8 ? 16
                                                                                         : 8));
            EXPECT_TRUE(m <= 16 || SkinnySm90Plan::is_wide(p.tile, p.rows));
            EXPECT_TRUE(!p.holds_all || (p.tiles(n) <= card.sms && p.stages * p.atoms * 64 >= k));
            EXPECT_TRUE(p.tile >= 1 && p.tile <= 16 && (!(gated || f32) || p.tile % 2 == 0));
            // Of logits there is one kernel for so many rows.
            EXPECT_TRUE(!f32 || (m > 16 ? p.tile == 16 : p.tile > 8));
            const int out_row = !f32 ? 16 * (p.tile + 1) : p.rows <= 64 ? 2 * 160 : 160;
            EXPECT_EQ(p.out_bytes, m > 16 ? skinny_sm90_rows(p.rows) * out_row : 0);
            // What the tensor core reads behind the last weights, and behind x, is there.
            const int unused = m > 16 ? (skinny_sm90_rows(p.rows) - p.rows) * 128
                                      : (8 - p.tile % 8) % 8 * 8 * 128 + 1024;
            EXPECT_LE(used + unused, p.smem);
            if (p.whole) {
              const int64_t atoms = (k / 64 + p.atoms - 1) / p.atoms * p.atoms;
              EXPECT_LE(atoms, 256);                      // in a box
              EXPECT_EQ(p.whole_bytes, 128 * m * atoms);  // as many as the box brings
            }
            EXPECT_GE(p.tiles(n) * 8 * p.tile, n);
            const int64_t blocks = (m + p.rows - 1) / p.rows;
            EXPECT_TRUE(p.ctas >= 1 && (p.ctas == 1 || p.ctas * blocks <= card.sms));
            EXPECT_TRUE(p.ahead >= 1 && p.ahead <= p.stages);
            EXPECT_TRUE(p.paced >= 1 && p.paced <= p.ahead);
            // Who waits for weights before x comes must not wait for x.
            EXPECT_TRUE(p.paced == p.ahead || (p.held && p.lets_start));
            // What comes slowly, and is not all, stands beside another kernel.
            EXPECT_TRUE(p.paced == p.ahead || p.holds_all ||
                        p.smem <= card.smem_per_sm / 2 - 2 * 1024);
            EXPECT_TRUE(!p.held || p.whole);
            // Two vectors a thread of 256, of rows that norm.cu sums in at most 16 warps.
            EXPECT_EQ(p.held, norm && k % (64 * p.atoms) == 0 && k / 8 <= 512 &&
                                  m * ((k / 8 + 31) / 32) <= 16);
          }
}

// Weights of a large product are read once.
TEST(LinearPlanSm90, ManyRowsShareTheWeights) {
  for (const int64_t m : {65, 128, 160, 192, 256}) {
    const auto p = plan_skinny_sm90(m, 28672, 4096, false, true, 132, 227 * 1024, 228 * 1024);
    EXPECT_EQ(p.rows, m);
    EXPECT_GE((p.stages - 1) * p.atoms * p.tile * 1024, 28 * 1024) << m;
  }
}

// The norms of the models that people run, at a few rows.
TEST(LinearPlanSm90, NormsFit) {
  for (const int64_t k : {1024, 2048, 4096, 5120, 8192})
    for (const int64_t m : {1, 2, 4, 8})
      EXPECT_EQ(2 * m * k + 4 * k < 96 * 1024 - 2048,
                plan_skinny_sm90(m, 6144, k, true, false, 132, 227 * 1024, 228 * 1024).fits())
          << m << " x " << k;
}

// An even share of the strips for every multiprocessor, within 5%, where there are enough.
TEST(LinearPlanSm90, SpreadsTheStripsEvenly) {
  for (const int64_t n : {4096, 6144, 28672, 128256, 151936}) {
    const auto p = plan_skinny_sm90(1, n, 4096, false, false, 132, 227 * 1024, 228 * 1024);
    const int64_t rounds = (p.tiles(n) + 131) / 132;
    const double even = std::ceil(static_cast<double>(n) / 8 / 132);
    EXPECT_LE(static_cast<double>(rounds * p.tile), even * 1.05) << n;
  }
}

// Two CTAs without a norm do not fit one multiprocessor; with one the grid has one for each. One of
// few weights fits beside the next kernel's.
TEST(LinearPlanSm90, OneCtaOfAKernelOnAMultiprocessorBesideTheNextKernels) {
  constexpr int kReserved = 1024, kPerSm = 228 * 1024;  // of a CTA
  const auto plan = [](int64_t m, int64_t n, int64_t k, bool norm) {
    return plan_skinny_sm90(m, n, k, norm, false, 132, 227 * 1024, kPerSm);
  };
  for (const bool norm : {false, true})
    for (const int64_t m : {1, 8, 16, 17, 32, 33, 64})
      for (const int64_t n : {1024, 2048, 4096, 6144, 28672})
        for (const int64_t k : {1024, 3072, 14336}) {
          const auto p = plan(m, n, k, norm);
          if (norm && (m > 16 || !p.fits())) continue;
          const bool has_ctas = 2 * p.tiles(n) <= 132 || p.ctas == 132;
          EXPECT_TRUE(norm ? has_ctas
                           : 2 * (p.smem + kReserved) > kPerSm || (m > 16 && n > k && has_ctas))
              << m << " x " << n << " x " << k;
        }
  const auto o = plan(1, 1024, 2048, false), gate_up = plan(1, 6144, 1024, true);
  EXPECT_LE(o.smem + gate_up.smem + 2 * kReserved, kPerSm);
  EXPECT_LT(gate_up.paced, gate_up.ahead);
  EXPECT_LE(gate_up.paced * gate_up.stage_bytes, 48 * 1024);
  // So does a gate's product of more weights than fit; it asks for them slowly.
  const auto wide_gate = plan_skinny_sm90(1, 16384, 2048, true, true, 132, 227 * 1024, kPerSm);
  EXPECT_FALSE(wide_gate.holds_all);
  EXPECT_LE(plan(1, 2048, 2048, false).smem + wide_gate.smem + 2 * kReserved, kPerSm);
  EXPECT_LE(wide_gate.paced * wide_gate.stage_bytes, 32 * 1024);
  EXPECT_LT(wide_gate.paced, wide_gate.ahead);
  // Many weights need the room themselves.
  EXPECT_GT(plan(1, 28672, 4096, false).smem, 150 * 1024);
}

// Bytes on their way to a multiprocessor: a microsecond at the rate of its share of the memory.
TEST(LinearPlanSm90, KeepsBytesInFlight) {
  for (const bool norm : {false, true})
    for (const int64_t m : {1, 8})
      for (const int64_t n : {4096, 6144, 28672, 151936}) {
        const auto p = plan_skinny_sm90(m, n, 4096, norm, false, 132, 227 * 1024, 228 * 1024);
        EXPECT_GE((p.stages - 1) * p.atoms * p.tile * 1024, 32 * 1024) << m << " x " << n;
      }
}

// -- linear_large ---------------------------------------------------------------------------------

TEST(LinearPlanLarge, FitsAndTakesTheTilesThatAreDoneFirst) {
  for (const int columns : {128, 160, 192}) {
    EXPECT_LE(large_smem(columns), 227 * 1024);
    EXPECT_GE(large_stages(columns), 4);
    EXPECT_GT(large_smem(columns) + large_stage_bytes(columns), 227 * 1024);  // no room for more
  }
  EXPECT_EQ(large_columns(4000, 28672, 66, 2), 192);  // 37 rounds
  EXPECT_EQ(large_columns(1000, 28672, 66, 2), 160);  // 11 instead of 10 of 192
  EXPECT_EQ(large_columns(256, 28672, 66, 2), 160);   // 3, as of 192
  EXPECT_EQ(large_columns(128, 128, 1, 1), 128);
}

}  // namespace
}  // namespace ni::cuda
