// How the attention kernels are launched: tile sizes, pipeline depths and shared memory as
// functions of the card and of the cache's element size. Pure host code, so that it is tested
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/types.h"

namespace ni::cuda {

// Cuts of the context, at absolute multiples; part of the arithmetic (attention.cuh).
inline constexpr int kTile = 64;      // tokens of a softmax step
inline constexpr int kKvChunk = 256;  // tokens whose sums are closed before they are merged
static_assert(kKvChunk % kTile == 0);
inline constexpr int kChunkTiles = kKvChunk / kTile;

// Cuts of the work (AttnTiling).
inline constexpr int kDecodeRows = 4;     // most query rows of a sequence in attention_decode
inline constexpr int kPrefillRows = 128;  // query rows of a prefill item
inline constexpr int kMmaRows = 16;       // rows of an m16n8k16 product
inline constexpr int kDecodeThreads = 128;

inline constexpr const char* kAttentionHeadDims = "64, 96, 128, 256";
inline constexpr bool is_attention_head_dim(int head_dim) {
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

// Quotients by a number of the launch, in a multiplication and a shift (Granlund and Montgomery,
// 1994): n / by = n (2^32 + multiplier) >> (32 + shift), for n from 0 to 2^31 - 1.
struct Divisor {
  uint32_t by, multiplier, shift;

  explicit constexpr Divisor(int32_t divisor)
      : by(static_cast<uint32_t>(divisor)), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < by) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  NI_HD int32_t quotient(int32_t n) const {
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(n)) >> shift);
  }
};

// A CTA of a decode kernel: one 16-row tile, a ring of `stages` pairs of a K and a V tile, or on
// Hopper of single tiles.
struct DecodePlan {
  int stages = 0;
  int smem = 0;         // bytes of dynamic shared memory
  int ctas_per_sm = 0;  // that fit
};

// A CTA of Hopper's decode kernel: four warps that compute, one that copies, one that counts; a
// ring of `stages` tiles, of K and of V in turns.
inline constexpr int kDecodeWarps = 4;
static_assert(kKvChunk == kDecodeWarps * kTile);
inline constexpr int kDecodeSm90Threads = 32 * (kDecodeWarps + 2);
inline constexpr int kDecodeCtasPerSm = 2;  // at most
inline constexpr int kDecodeUnits = 3;      // units of work whose q is there or on its way
// P [tile][16][64] in 16 bits, as many q [16][head_dim] whose rows are 16 bytes further apart than
// they are long, row maxima, and 1 KB for descriptions of work and barriers.
inline constexpr int decode_sm90_extra_smem(int head_dim) {
  return kDecodeWarps * kMmaRows * kTile * 2 + kDecodeUnits * kMmaRows * (2 * head_dim + 16) +
         kMmaRows * kDecodeWarps * 4 + 1024;
}

// Rows of sums (m, l, O) that an item leaves: even, so that they are 16-byte aligned in every item.
inline constexpr int decode_partial_rows(int max_query_len, int num_heads) {
  return (max_query_len * num_heads + 1) / 2 * 2;
}
// Bytes of an item of kDecodeRows query rows; of shorter queries as many times more items fit
// there.
inline constexpr int64_t decode_item_bytes(int num_heads, int head_dim) {
  return int64_t{kDecodeRows} * decode_partial_rows(1, num_heads) * (head_dim + 2) * 4;
}

// A CTA of the mma.sync prefill kernel: 16 query rows a warp.
struct PrefillPlan {
  int rows = 0;    // query rows of a CTA, a divisor of kPrefillRows
  int stages = 0;  // pairs of a K and a V tile
  int smem = 0;    // bytes of dynamic shared memory
};

// Columns of the output that one CTA of the prefill kernel makes: sums of a chunk and totals stay
// in registers. Wider heads are shared by two CTAs, which both compute the scores.
inline constexpr int prefill_out_cols(int head_dim) {
  return std::min(head_dim, 128);
}

// 1 KB of shared memory of every CTA is the system's.
inline constexpr int ctas_that_fit(int smem_per_sm, int smem) {
  return smem_per_sm / (smem + 1024);
}

// P of a decode tile [16][72] in 16 bits (8 elements of padding against bank conflicts), the row
// maxima of four warps, and a flag. Before q [16][head_dim] and the ring.
inline constexpr int kDecodePStride = kTile + 8;
inline constexpr int kDecodeExtraSmem = kMmaRows * kDecodePStride * 2 + 4 * kMmaRows * 4 + 128;
static_assert(kDecodeExtraSmem % 128 == 0);

// The fewest stages that keep 64 KB in flight on a multiprocessor (latency times bandwidth needs
// about 30), else those that keep the most: many small CTAs hide each other's softmax.
inline constexpr DecodePlan plan_decode(int max_smem, int smem_per_sm, int head_dim, int kv_bytes) {
  constexpr int kMaxStages = 4, kInFlight = 64 * 1024;
  const int max_ctas = head_dim > 128 ? 2 : 4;  // by registers
  const int pair = 2 * kTile * head_dim * kv_bytes;
  DecodePlan best;
  int best_bytes = -1;
  for (int stages = 1; stages <= kMaxStages; ++stages) {
    const int smem = kDecodeExtraSmem + kMmaRows * head_dim * 2 + stages * pair;
    const int ctas = std::min(max_ctas, ctas_that_fit(smem_per_sm, smem));
    if (smem > max_smem || ctas == 0) break;
    const int bytes = ctas * (stages - 1) * pair;
    if (bytes > best_bytes) {
      best = {stages, smem, ctas};
      best_bytes = bytes;
    }
    if (bytes >= kInFlight) break;
  }
  return best;
}

// Two CTAs, so that one computes while the other waits, where each has four tiles or more in
// flight.
inline constexpr DecodePlan plan_decode_sm90(int head_dim, int kv_bytes) {
  constexpr int kMaxSmem = 227 * 1024, kSmemPerSm = 228 * 1024, kMaxStages = 10;
  const int tile = kTile * head_dim * kv_bytes, extra = decode_sm90_extra_smem(head_dim);
  for (int ctas = head_dim > 128 ? 1 : kDecodeCtasPerSm; ctas >= 1; --ctas) {  // by registers
    const int room = std::min(kMaxSmem, kSmemPerSm / ctas - 1024) - extra;
    const int stages = std::min(kMaxStages, room / tile);
    if (stages >= 4) return {stages, stages * tile + extra, ctas};
  }
  return {};
}

// Two stages rather than one, then as many rows as fit.
inline constexpr PrefillPlan plan_prefill(int max_smem, int head_dim, int kv_bytes) {
  const int pair = kTile * (head_dim + prefill_out_cols(head_dim)) * kv_bytes;
  for (int stages = 2; stages >= 1; --stages) {
    for (int rows = kPrefillRows; rows >= kPrefillRows / 2; rows /= 2) {
      const int smem = rows * head_dim * 2 + stages * pair;
      if (smem <= max_smem) return {rows, stages, smem};
    }
  }
  return {};
}

}  // namespace ni::cuda
