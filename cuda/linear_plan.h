// How linear_skinny is launched. Pure host code, so that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ni::cuda {

// -- linear_skinny.cu -----------------------------------------------------------------------------

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
inline constexpr int skinny_rows(int64_t m) {
  return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;
}

// As few warps a CTA as spread the strips evenly over the multiprocessors, as many as keep the
// reading of x, which every CTA repeats, small.
inline constexpr SkinnyPlan plan_skinny(int64_t m, int64_t n, int num_sms, int max_smem,
                                        int smem_per_sm) {
  SkinnyPlan best;
  double best_cost = 1e300;
  const int rows = skinny_rows(m);
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

// -- linear_skinny_sm90.cu ------------------------------------------------------------------------

// A CTA a multiprocessor goes through tiles of up to 8 strips of 16 weight rows, a warp a strip, or
// `shares` warps a strip, with 16 rows of x each. A stage of the ring is `atoms` times 64 columns
// (128 bytes) of the tile's rows and of x; or x stands in shared memory as a whole, with a norm
// always.
struct SkinnySm90Plan {
  int rows = 0;    // of x: 8, 16, 32 or 64
  int tile = 0;    // strips of a CTA
  int shares = 1;  // warps of a strip
  int warps = 0;   // that compute; one more copies
  int atoms = 0;   // 1, 2 or 4
  int stages = 0;
  int ctas = 0;        // a row block
  bool whole = false;  // x stands in shared memory as a whole
  int x_bytes = 0;     // of that, with its norm's weights and sums
  int x_stride = 0;    // bytes from row to row there
  int smem = 0;        // bytes of dynamic shared memory
  int stage_bytes = 0;

  int64_t tiles(int64_t n) const { return (n + kStripRows * tile - 1) / (kStripRows * tile); }
  // With x as a whole: whether it leaves room for a ring.
  bool fits() const { return x_bytes <= 96 * 1024 && stages >= 3; }
  static constexpr int kStripRows = 16;
};

inline constexpr int kSkinnySm90MaxStages = 16;
inline constexpr int kSkinnyShareWarps = 12;         // at most, where warps share strips
inline constexpr int kSkinnyAlign = 1024;            // of a swizzled box
inline constexpr int kSkinnyWholeBytes = 32 * 1024;  // x at most, where nothing else asks for it

// With more rows than this, normalising them in every CTA takes longer than a kernel of its own.
inline constexpr int64_t kSkinnyMaxNormRows = 16;
// Whether a gated activation is worth more than what cuBLASLt would be faster: with more than 32
// rows it is with large weights.
inline constexpr bool gains_by_gate(int64_t rows, int64_t weight_elements) {
  return rows <= 32 || (rows <= 64 && weight_elements <= int64_t{1} << 26);
}

// (If the product is gated, a strip is 8 rows of the gate and 8 of the other half.)
inline SkinnySm90Plan plan_skinny_sm90(int64_t m, int64_t n, int64_t k, bool norm, int num_sms,
                                       int max_smem, int smem_per_sm) {
  constexpr int kStripRows = SkinnySm90Plan::kStripRows, kMaxTile = 8;
  SkinnySm90Plan best;
  double best_cost = 1e300;
  int best_rounds = 1;
  best.rows = skinny_rows(m);
  const int64_t strips = (n + kStripRows - 1) / kStripRows;
  for (int tile = kMaxTile; tile >= 1; --tile) {
    const int64_t tiles = (strips + tile - 1) / tile;
    const auto rounds = static_cast<int>((tiles + num_sms - 1) / num_sms);
    // Of the busiest multiprocessor: rows of weights, of x (from the L2 cache, read once a round),
    // and what a round costs to begin.
    const double x_rows = norm ? 0 : 0.5 * static_cast<double>(std::min<int64_t>(m, best.rows));
    const double cost = rounds * (kStripRows * tile + x_rows + 2);
    if (cost < best_cost * 0.99) {
      best_cost = cost;
      best_rounds = rounds;
      best.tile = tile;
      best.ctas = static_cast<int>(std::min<int64_t>(tiles, num_sms));
    }
  }
  // A chain of products a strip and 16 rows: more rows take warps of their own while there are few.
  if (best.tile * (best.rows / 16) <= kSkinnyShareWarps) best.shares = std::max(1, best.rows / 16);
  best.warps = best.tile * best.shares;
  best.whole = norm || (best.rows <= 16 && 2 * m * k <= kSkinnyWholeBytes);
  const int atom_bytes = best.tile * kStripRows * 128 + (best.whole ? 0 : best.rows * 128);
  constexpr int kStage = 20 * 1024;  // bytes at most, so that a ring has many
  best.atoms = 1;
  if (best.rows <= 16 || best.shares > 1)
    while (best.atoms < (best.rows <= 16 ? 4 : 2) && 2 * best.atoms * atom_bytes <= kStage)
      best.atoms *= 2;
  best.stage_bytes = best.atoms * atom_bytes;
  const int64_t columns = (k + 64 * best.atoms - 1) / (64 * best.atoms) * (64 * best.atoms);
  // Neighbouring rows of x lie in different banks. After them come the norm's fp32 weights and the
  // sums of 16 warps a row.
  best.x_stride = static_cast<int>(columns * 2 + 16);
  if (best.whole) best.x_bytes = static_cast<int>(m * best.x_stride + (norm ? k * 4 + m * 64 : 0));
  const int fixed = best.x_bytes + 8 * (2 * kSkinnySm90MaxStages + 1) + kSkinnyAlign;
  // Few weights: half of a multiprocessor's shared memory, so that the next kernel's ring fills
  // beside. Many keep the memory busy only with more in flight than that. And where so few CTAs
  // leave multiprocessors idle, or the kernel before leaves some sooner, two CTAs must not fit one:
  // the hardware would put them there, and they would take twice as long.
  const int half = smem_per_sm / 2 - 1024, whole = max_smem - fixed;
  constexpr int kEnough = 56 * 1024;  // bytes in flight
  const int64_t weights = int64_t{2} * best_rounds * best.tile * kStripRows * columns;
  const bool is_large =
      half - fixed < kEnough || best.rows == 32 || (best.rows < 32 && weights > int64_t{4} * half);
  const bool is_alone = is_large || best.rows == 64 || 2 * best.ctas <= num_sms;
  best.stages =
      std::min((is_large ? whole : half - fixed) / best.stage_bytes, kSkinnySm90MaxStages);
  best.smem = std::max(best.stages * best.stage_bytes + fixed, is_alone ? half + 1024 : 0);
  return best;
}

}  // namespace ni::cuda
