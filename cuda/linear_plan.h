// How linear_skinny is launched. Pure host code, so that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ni::cuda {

// A CTA multiplies `rows` rows of x with strips of 8 weight rows, one a warp; both come in stages
// of some columns through a ring in shared memory.
struct SkinnyPlan {
  int rows = 0;   // 8, 16, 32 or 64
  int warps = 0;  // strips of a CTA
  int stages = 0;
  int smem = 0;  // bytes of dynamic shared memory
};

inline constexpr int kSkinnyMaxStages = 8;

// Columns of a stage.
inline constexpr int skinny_stage_k(int rows) {
  return rows <= 16 ? 256 : 128;
}
// Bytes of a row of a stage: 32 bytes of padding put neighbouring rows into different banks.
inline constexpr int skinny_row_bytes(int rows) {
  return skinny_stage_k(rows) * 2 + 32;
}

// As few warps a CTA as spread the strips evenly over the multiprocessors, as many as keep the
// reading of x, which every CTA repeats, small.
inline constexpr SkinnyPlan plan_skinny(int64_t m, int64_t n, int num_sms, int max_smem,
                                        int smem_per_sm) {
  SkinnyPlan best;
  double best_cost = 1e300;
  const int rows = m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;
  const int64_t strips = (n + 7) / 8, row_blocks = (m + rows - 1) / rows;
  for (int warps = 1; warps <= 8; warps *= 2) {
    const int64_t ctas = (strips + warps - 1) / warps * row_blocks;
    const auto per_sm = static_cast<int>((ctas + num_sms - 1) / num_sms);
    const int stage = (rows + 8 * warps) * skinny_row_bytes(rows);
    const int share = std::min(max_smem, smem_per_sm / std::min(per_sm, 4) - 1024);
    const int stages = std::clamp(share / stage, 2, kSkinnyMaxStages);
    if (stages * stage > max_smem) continue;
    // Of the busiest multiprocessor: its weights, and x at half price (it comes from the L2 cache).
    const double read_rows = 8.0 * warps + 0.5 * static_cast<double>(std::min<int64_t>(m, rows));
    const double cost = per_sm * read_rows;
    if (cost < best_cost * 0.98) {
      best_cost = cost;
      best = {rows, warps, stages, stages * stage};
    }
  }
  return best;
}

}  // namespace ni::cuda
