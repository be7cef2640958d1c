// Launch configurations of the attention kernels on every card they are made for, without a card.
#include "../../cuda/attention_plan.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace ni::cuda {
namespace {

struct CardMemory {
  int arch, max_smem, smem_per_sm;
};
constexpr CardMemory kCards[] = {
    {80, 163 * 1024, 164 * 1024},
    {86, 99 * 1024, 100 * 1024},
    {89, 99 * 1024, 100 * 1024},
    {90, 227 * 1024, 228 * 1024},
};

template <typename F>
void for_each_case(const F& f) {
  for (const CardMemory& card : kCards)
    for (const int head_dim : {64, 96, 128, 256})
      for (const int kv_bytes : {1, 2}) {
        SCOPED_TRACE(testing::Message() << "arch " << card.arch << " head_dim " << head_dim
                                        << " kv_bytes " << kv_bytes);
        f(card, head_dim, kv_bytes);
      }
}

TEST(AttentionPlan, DivisorsDivide) {
  for (const int32_t by :
       {1, 2, 3, 5, 7, 8, 16, 48, 96, 100, 127, 128, 129, 8192, 65537, 2147483647}) {
    const Divisor divisor(by);
    EXPECT_EQ(divisor.by, static_cast<uint32_t>(by));
    for (const int64_t near : {int64_t{0}, int64_t{by}, 7 * int64_t{by}, int64_t{1} << 20,
                               (int64_t{1} << 31) / by * by, (int64_t{1} << 31) - 1})
      for (int64_t n = std::max<int64_t>(near - 3, 0); n <= near + 3 && n >> 31 == 0; ++n)
        EXPECT_EQ(divisor.quotient(static_cast<int32_t>(n)), n / by) << n << " / " << by;
  }
}

TEST(AttentionPlan, DecodeFitsEveryCard) {
  for_each_case([](const CardMemory& card, int head_dim, int kv_bytes) {
    const DecodePlan plan = plan_decode(card.max_smem, card.smem_per_sm, head_dim, kv_bytes);
    const int tiles = plan.stages * 2 * kTile * head_dim * kv_bytes;
    EXPECT_GE(plan.stages, 1);
    EXPECT_LE(plan.stages, 4);  // what the kernel can wait for
    EXPECT_GE(plan.ctas_per_sm, 1);
    EXPECT_LE(plan.smem, card.max_smem);
    EXPECT_LE(plan.ctas_per_sm * (plan.smem + 1024), card.smem_per_sm);
    EXPECT_GE(plan.smem, tiles + kMmaRows * (2 * head_dim + 2 * kDecodePStride + 16));
    EXPECT_LE(plan.ctas_per_sm * kDecodeThreads, 1536);
  });
}

TEST(AttentionPlan, DecodeKeepsHopperAndAmpereBusy) {
  for_each_case([](const CardMemory& card, int head_dim, int kv_bytes) {
    if (card.arch != 80 && card.arch != 90) return;
    const DecodePlan plan = plan_decode(card.max_smem, card.smem_per_sm, head_dim, kv_bytes);
    EXPECT_GE(plan.ctas_per_sm * (plan.stages - 1) * 2 * kTile * head_dim * kv_bytes, 64 * 1024);
  });
}

TEST(AttentionPlan, DecodeFitsHopper) {
  for (const int head_dim : {64, 96, 128, 256})
    for (const int kv_bytes : {1, 2}) {
      SCOPED_TRACE(testing::Message() << "head_dim " << head_dim << " kv_bytes " << kv_bytes);
      const DecodePlan plan = plan_decode_sm90(head_dim, kv_bytes);
      const int tiles = plan.stages * kTile * head_dim * kv_bytes;
      EXPECT_GE(plan.ctas_per_sm, 1);
      EXPECT_LE(plan.smem, 227 * 1024);
      EXPECT_LE(plan.ctas_per_sm * (plan.smem + 1024), 228 * 1024);
      // The ring, P of four tiles, q with padding, maxima, and something for the rest.
      EXPECT_GE(plan.smem,
                tiles + 4 * 16 * 64 * 2 + kDecodeUnits * 16 * (2 * head_dim + 16) + 1024);
      EXPECT_GE(plan.ctas_per_sm * tiles, 64 * 1024);    // in flight
      EXPECT_EQ(head_dim * kv_bytes * kTile % 1024, 0);  // tiles begin where the swizzle does
    }
}

// As the kernels lay them out: rows of (m, l), then rows of O, item after item.
TEST(AttentionPlan, SumsOfItemsAreAlignedAndFit) {
  for (const int head_dim : {64, 96, 128, 256})
    for (int heads = 1; heads <= 256; ++heads)
      for (int queries = 1; queries <= kDecodeRows; ++queries) {
        const int64_t rows = decode_partial_rows(queries, heads), item = rows * (head_dim + 2) * 4;
        ASSERT_GE(rows, queries * heads);
        ASSERT_EQ(item % 16, 0) << heads << " heads, " << queries << " queries";
        ASSERT_EQ(rows * 2 * 4 % 16, 0) << heads << " heads, " << queries << " queries";
        const int64_t most = int64_t{2048} * kDecodeRows / queries;
        ASSERT_LE(most * item, 2048 * decode_item_bytes(heads, head_dim));
      }
}

TEST(AttentionPlan, PrefillFitsEveryCard) {
  for_each_case([](const CardMemory& card, int head_dim, int kv_bytes) {
    const PrefillPlan plan = plan_prefill(card.max_smem, head_dim, kv_bytes);
    EXPECT_TRUE(plan.rows == 64 || plan.rows == 128) << plan.rows;  // 4 or 8 warps
    EXPECT_TRUE(plan.stages == 1 || plan.stages == 2) << plan.stages;
    EXPECT_EQ(plan.smem, plan.rows * head_dim * 2 +
                             plan.stages * kTile * (head_dim + std::min(head_dim, 128)) * kv_bytes);
    EXPECT_LE(plan.smem, card.max_smem);
    const bool is_scarce = card.max_smem < 100 * 1024 && head_dim == 256;
    EXPECT_EQ(plan.rows, is_scarce ? 64 : 128);
    EXPECT_EQ(plan.stages, is_scarce && kv_bytes == 2 ? 1 : 2);
  });
}

TEST(AttentionPlan, TooLittleSharedMemoryIsNoPlan) {
  EXPECT_EQ(plan_decode(48 * 1024, 64 * 1024, 256, 2).stages, 0);
  EXPECT_EQ(plan_prefill(48 * 1024, 256, 2).rows, 0);
}

TEST(AttentionPlan, ItemsAndChunksAreMadeOfWholeTiles) {
  EXPECT_EQ(kKvChunk % kTile, 0);
  EXPECT_EQ(kPrefillRows % 64, 0);
  for (const int head_dim : {0, 32, 80, 112, 192, 512})
    EXPECT_FALSE(is_attention_head_dim(head_dim));
}

}  // namespace
}  // namespace ni::cuda
