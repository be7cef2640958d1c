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

// A CTA a multiprocessor goes through tiles of up to 16 strips of 8 weight rows (gated: pairs of
// them, of the gate and of the other half). A stage of the ring is `atoms` times 64 columns (128
// bytes) of the tile's rows and of x; or x stands in shared memory as a whole, with a norm always.
struct SkinnySm90Plan {
  int rows = 0;   // of x, in a row block
  int tile = 0;   // strips of a CTA
  int atoms = 0;  // of a stage
  int stages = 0;
  int ahead = 0;            // of them come before x
  int paced = 0;            // of those, are under way at a time
  int ctas = 0;             // a row block
  bool whole = false;       // x stands in shared memory as a whole
  bool held = false;        // and before that in registers, where it is normalised
  int whole_bytes = 0;      // of that
  int x_bytes = 0;          // and of its norm's weights and sums, which follow
  int out_bytes = 0;        // where many rows' sums become results
  int smem = 0;             // bytes of dynamic shared memory
  bool holds_all = false;   // the ring, of the weights
  bool lets_start = false;  // the next kernel before its own wait
  int stage_bytes = 0;

  int64_t tiles(int64_t n) const { return (n + kStripRows * tile - 1) / (kStripRows * tile); }
  // With x as a whole: whether it leaves room for a ring.
  bool fits() const { return x_bytes <= 96 * 1024 && stages >= kMinStages; }
  // A stage is given back when the next one's products have been begun.
  static constexpr int kMinStages = 3;
  static constexpr int kStripRows = 8;
  static constexpr int kF32Tile = 16;  // of more than 16 rows of fp32
  // Where these become results: four strips at a time, 32 bytes for different banks.
  static constexpr int kF32RowBytes = 4 * kStripRows * 4 + 32;
  // So many that a stage has work enough for the tensor core to do while the next is begun, and no
  // more: what is in flight is the ring without the stages at work.
  static constexpr int stage_atoms(int rows, int tile) {
    return rows > 64 ? 1 : rows > 16 || tile > 8 ? 2 : 4;
  }
  // With more than 16 rows; with more than 128 none of fewer than 4, which would read x for too
  // little.
  static constexpr int kWideTiles[] = {2, 4, 6, 8, 12, 14, 16};
  static constexpr bool is_wide(int tile, int rows) {
    for (const int one : kWideTiles)
      if (one == tile) return rows <= 128 || tile >= 4;
    return false;
  }
};

inline constexpr int kSkinnySm90MaxStages = 16;
inline constexpr int kSkinnyAlign = 1024;   // of a swizzled box
inline constexpr int kSkinnyNormWarps = 8;  // that normalise x
// Vectors of 8 elements of x, at most, that each thread holds which normalises.
inline constexpr int kSkinnyHeldVectors = 2;
inline constexpr int kSkinnyWholeBytes = 32 * 1024;  // x at most, where nothing else asks for it

// With more rows than this, normalising them in every CTA takes longer than a kernel of its own.
inline constexpr int64_t kSkinnyMaxNormRows = 16;
// With more than this, cuBLASLt and an activation of its own, or linear_large, may be faster than a
// gate in the product (Linear::fuses() knows); with more than that they are.
inline constexpr int64_t kSkinnyMaxGateRows = 64, kSkinnyMaxTimedGateRows = 256;

// Rows of x that the kernel for so many computes with.
inline constexpr int skinny_sm90_rows(int rows) {
  return rows <= 8 ? 8 : rows <= 16 ? 16 : (rows + 63) / 64 * 64;
}

// f32: the result, lm_head's: of the tiles there are pairs of strips (units of logits) and, since
// it has many, no small ones.
inline SkinnySm90Plan plan_skinny_sm90(int64_t m, int64_t n, int64_t k, bool norm, bool gated,
                                       int num_sms, int max_smem, int smem_per_sm,
                                       bool f32 = false) {
  constexpr int kStripRows = SkinnySm90Plan::kStripRows, kMaxTile = 16;
  constexpr int kMinStages = SkinnySm90Plan::kMinStages;
  SkinnySm90Plan best;
  double best_cost = 1e300;
  int best_rounds = 1;
  const int64_t strips = (n + kStripRows - 1) / kStripRows;
  // Row blocks, of at most 64 to 256 rows, share the multiprocessors; where a block leaves half of
  // them without work, two of up to 32, which then read half of x each.
  const bool is_narrow = m > 32 && m <= 64 && n <= int64_t{kStripRows} * num_sms;
  for (int64_t most = is_narrow ? 32 : 64; most <= std::min<int64_t>((m + 63) / 64 * 64, 256);
       most += most < 64 ? 32 : 64) {
    const int64_t blocks = (m + most - 1) / most, rows = (m + blocks - 1) / blocks;
    const int64_t sms = std::max<int64_t>(1, num_sms / blocks);
    const int64_t waves = (blocks + num_sms - 1) / num_sms;
    for (int tile = kMaxTile; tile >= 1; --tile) {
      if ((gated || f32) && tile % 2 != 0) continue;
      if (f32 && tile < (m > 16 ? SkinnySm90Plan::kF32Tile : 10)) continue;
      if (m > 16 && !SkinnySm90Plan::is_wide(tile, static_cast<int>(rows))) continue;
      const int64_t tiles = (strips + tile - 1) / tile;
      const auto rounds = static_cast<int>((tiles + sms - 1) / sms);
      // Of the busiest multiprocessor: rows of weights, of x (from the L2 cache, read once a round;
      // with several row blocks the weights come from there, too, but where one is ahead of another
      // they come from memory again), and what a round costs to begin.
      constexpr double kSeveralBlocks = 1.6;
      const auto x_rows = static_cast<double>(rows);
      const bool is_small = most < 64;
      const double x_cost = norm                                     ? 0
                            : !is_small && (blocks > 1 || rows > 64) ? x_rows
                                                                     : 0.5 * x_rows;
      const double cost = (blocks > 1 && !is_small ? kSeveralBlocks : 1.0) *
                          static_cast<double>(waves * rounds) * (kStripRows * tile + x_cost + 2);
      if (cost < best_cost * 0.99) {
        best_cost = cost;
        best_rounds = rounds;
        best.rows = static_cast<int>(rows);
        best.tile = tile;
        // Those too many keep the next kernel's from their places: it shall have one on each.
        best.ctas =
            static_cast<int>(2 * tiles > num_sms && blocks == 1 ? num_sms : std::min(tiles, sms));
      }
    }
  }
  best.whole = norm || (m <= 16 && 2 * m * k <= kSkinnyWholeBytes);
  best.atoms = SkinnySm90Plan::stage_atoms(best.rows, best.tile);
  const auto aligned = [](int bytes) {
    return (bytes + kSkinnyAlign - 1) / kSkinnyAlign * kSkinnyAlign;
  };
  best.stage_bytes = best.atoms * best.tile * kStripRows * 128 +
                     aligned(best.whole ? 0 : best.atoms * best.rows * 128);
  const int64_t columns = (k + 64 * best.atoms - 1) / (64 * best.atoms) * (64 * best.atoms);
  // Only the copy engine fills columns behind x with zeros. `parts`: what a warp of norm.cu has of
  // a row, 16 at most.
  const int64_t parts = (k / 8 + 31) / 32;
  best.held = norm && columns == k && parts <= 16 &&
              m * parts <= int64_t{kSkinnyNormWarps} * kSkinnyHeldVectors;
  if (best.whole) {  // then the norm's fp32 weights and the sums of 16 warps a row
    best.whole_bytes = static_cast<int>(m * columns * 2);
    best.x_bytes = best.whole_bytes + static_cast<int>(norm ? k * 4 + m * 64 : 0);
  }
  // The tensor core reads 64 rows of W and 8 or 16 of x, or 64 to 256 of x, where there are fewer.
  const int over = m > 16 ? (skinny_sm90_rows(best.rows) - best.rows) * 128
                          : (8 - best.tile % 8) % 8 * kStripRows * 128 + 1024;
  const int out_row = f32 ? SkinnySm90Plan::kF32RowBytes * (best.rows <= 64 ? 2 : 1)
                          : (best.tile + 1) * kStripRows * 2;
  best.out_bytes = m > 16 ? skinny_sm90_rows(best.rows) * out_row : 0;
  const int fixed =
      best.x_bytes + best.out_bytes + 8 * (2 * kSkinnySm90MaxStages + 3) + kSkinnyAlign + over;
  // A CTA whose ring takes all its weights and one of the next kernel's shall fit one
  // multiprocessor, so that the rings fill while other kernels compute. Two CTAs of one kernel
  // shall not stand on one: the hardware would put two where the kernel before makes room first and
  // none elsewhere, and they would take twice as long. So products of up to 16 rows without a norm
  // (`o`, `down`) take a little more than half of the shared memory, and those with one (qkv,
  // `gate_up`; not lm_head) a little less where that holds their weights; that two of these do not
  // stand together is due to the grid, which has a CTA for every multiprocessor. Attention with
  // heads of up to 128 has room beside either. Many weights keep the memory busy only with more in
  // flight than that, and more rows of x take as much.
  const int half = smem_per_sm / 2 - 1024, whole = max_smem - fixed;
  const int64_t weights = int64_t{2} * best_rounds * best.tile * kStripRows * columns;
  // Of more rows, which have no norm, those with more columns than x (qkv, `gate_up`) leave room
  // likewise, where some stages more than the least fit then.
  constexpr int kWideStages = kMinStages + 1;
  const bool is_wide = m > 16, grows = is_wide && n > k && best.ctas == num_sms;
  const bool has_stages = (half - 1024 - fixed) / best.stage_bytes >= kWideStages;
  // A gate's product with a norm (`gate_up`) leaves room even where it has some times as many
  // weights as fit: its first ones come while `o` computes, whose end it need not wait for to
  // begin.
  constexpr int kGateTimes = 5;
  const bool is_gate = gated && best.ctas == num_sms;
  const bool leaves_room = is_wide ? weights <= half && grows && has_stages
                                   : norm && weights <= (is_gate ? kGateTimes : 1) * half;
  const int room = (leaves_room ? half - 1024 : half + 1024) - fixed;
  constexpr int kEnough = 56 * 1024;  // bytes in flight
  const bool is_large =
      room < std::max(kEnough, kMinStages * best.stage_bytes) ||
      (weights > int64_t{2} * half && !leaves_room) ||
      (is_wide && !leaves_room && (m > 64 || room < kWideStages * best.stage_bytes));
  best.stages = std::min((is_large ? whole : room) / best.stage_bytes, kSkinnySm90MaxStages);
  best.smem = std::max(best.stages * best.stage_bytes + fixed, leaves_room ? 0 : half + 1024);
  best.holds_all = best_rounds == 1 && best.stages * best.atoms * 64 >= k;
  best.lets_start = norm || best.holds_all || leaves_room;
  // Few weights come in time anyway, and what comes before x delays x and the last results of the
  // kernel before, which stand behind it (1.5 us behind 95 KB of `gate_up` on every
  // multiprocessor). So only some are asked for before x, or, where x does not come by the copy
  // engine, all, but no more than some at a time.
  constexpr int kPaced = 48 * 1024, kPacedPart = 24 * 1024;
  constexpr int kBesideNorm = 32 * 1024, kBesideRows = 16 * 1024;
  const int w_bytes = best.atoms * best.tile * kStripRows * 128;  // of a stage
  best.ahead = best.stages;
  if (best.stages < kMinStages) return best;  // no kernel's
  if (is_wide ? weights <= half : norm && best.holds_all && !best.held)
    best.ahead = std::clamp((is_wide ? kBesideRows : kBesideNorm) / w_bytes, 1, best.stages);
  best.paced = best.ahead;
  if (best.held && (best.holds_all || (leaves_room && !is_large)))
    best.paced = std::clamp((best.holds_all ? kPaced : kPacedPart) / w_bytes, 1, best.ahead);
  return best;
}

// -- linear_large_sm90.cu -------------------------------------------------------------------------

// A tile: so many rows of x by `columns` rows of W; a stage has 64 columns of both.
inline constexpr int kLargeTileRows = 128;
inline constexpr int large_stage_bytes(int columns) {
  return (kLargeTileRows + columns) * 128;
}
// Where 16 rows of each of 8 warps become results: half of the columns at a time, or, where a head
// may be rotated, all.
inline constexpr int large_out_bytes(int columns) {
  return 8 * 16 * (columns == 128 ? 2 * columns : columns);
}
inline constexpr int large_stages(int columns) {
  constexpr int kMaxSmem = 227 * 1024, kBarriers = 256;
  return (kMaxSmem - kSkinnyAlign - kBarriers - large_out_bytes(columns)) /
         large_stage_bytes(columns);
}
inline constexpr int large_smem(int columns) {
  return kSkinnyAlign + large_stages(columns) * large_stage_bytes(columns) +
         large_out_bytes(columns) + 8 * (2 * large_stages(columns) + 2);
}
// 128, 160 or 192 rows of W: those with which the busiest cluster is done first. A wide tile reads
// less for as much arithmetic, which is 5% of the time.
inline constexpr int large_columns(int64_t rows, int64_t n, int clusters, int cluster) {
  int best = 0;
  double best_cost = 1e300;
  for (const int columns : {192, 160, 128}) {
    const int64_t row_tiles = (rows + cluster * kLargeTileRows - 1) / (cluster * kLargeTileRows);
    const int64_t items = row_tiles * ((n + columns - 1) / columns);
    const double each = columns + 0.1 * (192 - columns);
    const double cost = static_cast<double>((items + clusters - 1) / clusters) * each;
    if (cost < best_cost) {
      best_cost = cost;
      best = columns;
    }
  }
  return best;
}

}  // namespace ni::cuda
