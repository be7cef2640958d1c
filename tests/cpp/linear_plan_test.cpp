// Launch configurations of linear_skinny on every card it is made for, without a card.
#include "../../cuda/linear_plan.h"

#include <gtest/gtest.h>

#include <cmath>

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
  const CardSizes small{170, 99 * 1024, 100 * 1024, 0};  // sm_120
  for (const CardSizes& card : {kCards[3], small})
    for (const bool norm : {false, true})
      for (const int64_t m : {1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 500})
        for (const int64_t n : {16, 1008, 1024, 4096, 6144, 28672, 151936})
          for (const int64_t k : {64, 192, 1024, 2048, 4096, 14336}) {
            const auto p =
                plan_skinny_sm90(m, n, k, norm, card.sms, card.max_smem, card.smem_per_sm);
            if (norm && (m > 16 || !p.fits())) continue;  // not fused
            EXPECT_GE(p.stages, card.sms == 132 ? 3 : 2);
            EXPECT_LE(p.stages, kSkinnySm90MaxStages);
            EXPECT_LE(p.smem, card.max_smem);
            EXPECT_GE(p.smem, p.stages * p.stage_bytes + p.x_bytes + 16 * p.stages);
            EXPECT_LE(p.stage_bytes, p.smem / 2);
            EXPECT_EQ(p.stage_bytes % kSkinnyAlign, 0);
            EXPECT_GE(p.rows, std::min<int64_t>(m, 64));
            EXPECT_TRUE(p.warps >= 1 && p.warps <= (p.shares > 1 ? kSkinnyShareWarps : 8));
            EXPECT_EQ(p.warps, p.tile * p.shares);
            EXPECT_TRUE(p.shares == 1 || p.shares * 16 == p.rows);
            EXPECT_LE(16 * p.tile, 256);  // rows of a box
            EXPECT_GE(p.tiles(n) * 16 * p.tile, n);
            EXPECT_LE(p.ctas, std::min<int64_t>(card.sms, p.tiles(n)));
          }
}

// The norms of the models that people run, at a few rows.
TEST(LinearPlanSm90, NormsFit) {
  for (const int64_t k : {1024, 2048, 4096, 5120, 8192})
    for (const int64_t m : {1, 2, 4, 8})
      EXPECT_EQ(2 * m * k + 4 * k < 96 * 1024 - 2048,
                plan_skinny_sm90(m, 6144, k, true, 132, 227 * 1024, 228 * 1024).fits())
          << m << " x " << k;
}

// An even share of the strips for every multiprocessor, within 5%, where there are enough.
TEST(LinearPlanSm90, SpreadsTheStripsEvenly) {
  for (const int64_t n : {4096, 6144, 28672, 128256, 151936}) {
    const auto p = plan_skinny_sm90(1, n, 4096, false, 132, 227 * 1024, 228 * 1024);
    const int64_t rounds = (p.tiles(n) + 131) / 132;
    const double even = std::ceil(static_cast<double>(n) / 16 / 132);
    EXPECT_LE(static_cast<double>(rounds * p.tile), even * 1.05) << n;
  }
}

// Where some multiprocessors have no CTA, or many rows follow kernels whose blocks end at different
// times, two CTAs do not fit one multiprocessor.
TEST(LinearPlanSm90, NoTwoOnOneMultiprocessorWhileOthersHaveNone) {
  constexpr int kHalf = 228 * 1024 / 2 - 1024;  // of which two fit
  for (const bool norm : {false, true})
    for (const int64_t m : {1, 8, 16, 17, 32, 33, 64})
      for (const int64_t n : {1024, 2048, 4096, 6144, 28672})
        for (const int64_t k : {1024, 3072, 14336}) {
          const auto p = plan_skinny_sm90(m, n, k, norm, 132, 227 * 1024, 228 * 1024);
          if (norm && (m > 16 || !p.fits())) continue;
          if (m > 16 || 2 * p.ctas <= 132) {
            EXPECT_GT(p.smem, kHalf) << m << " x " << n << " x " << k;
          }
        }
  // Few weights leave room for the next kernel; many need the room themselves.
  EXPECT_LE(plan_skinny_sm90(1, 4096, 1024, true, 132, 227 * 1024, 228 * 1024).smem, kHalf);
  EXPECT_GT(plan_skinny_sm90(1, 28672, 4096, false, 132, 227 * 1024, 228 * 1024).smem, 150 * 1024);
}

// Bytes on their way to a multiprocessor: a microsecond at the rate of its share of the memory.
TEST(LinearPlanSm90, KeepsBytesInFlight) {
  for (const bool norm : {false, true})
    for (const int64_t m : {1, 8})
      for (const int64_t n : {4096, 6144, 28672, 151936}) {
        const auto p = plan_skinny_sm90(m, n, 4096, norm, 132, 227 * 1024, 228 * 1024);
        EXPECT_GE((p.stages - 1) * p.atoms * p.tile * 2048, 32 * 1024) << m << " x " << n;
      }
}

}  // namespace
}  // namespace ni::cuda
