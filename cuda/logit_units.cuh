// What the sampler wants to know of a row before it reads logits, or instead: of every 16
// neighbours, a unit, the largest, their mass under it, and which of them a draw takes. The product
// that makes the logits sums them up as it has them (linear_skinny_sm90.cu, linear_large_sm90.cu),
// else the sampler's first kernel does (sampling.cu), in the same order: a token does not depend on
// who did.
#pragma once

#include <limits>

#include "core/step_inputs.h"
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace ni::cuda {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kLowest = std::numeric_limits<float>::lowest();

// p = exp((z - base) * factor)
struct Softmax {
  float base, factor;
  // Of a z that is not NaN, with a base that is not -infinity.
  __device__ float p_of(float z) const {
    return fast_exp2((z - base) * (factor * 1.4426950408889634f));
  }
  __device__ float p(float z) const { return z > -kInf ? p_of(z) : 0.0f; }
};

__device__ inline bool is_greedy(const SamplingRow& r) {
  constexpr float kGreedyBelow = 1e-5f;
  return r.temperature < kGreedyBelow;
}
__device__ inline float softmax_factor(const SamplingRow& r) {
  return is_greedy(r) ? 1.0f : 1.0f / r.temperature;
}

// How a row is sampled, as far as its units depend on it. All that is done with it is done without
// branches: units are made while a tensor core waits for nothing but registers.
struct UnitRow {
  float factor = 0;  // of the softmax; below 0: the row is greedy
  RoundDraws draws{};

  UnitRow() = default;
  __device__ explicit UnitRow(const SamplingRow& r)
      : factor(is_greedy(r) ? -1.0f : softmax_factor(r)),
        draws(philox_rounds(r.seed, r.choice, static_cast<uint32_t>(r.position))) {}
};

// A unit with this maximum in this row.
struct UnitParts {
  bool takes_first;  // of the largest
  float max;
  Softmax softmax;

  __device__ __forceinline__ UnitParts(const UnitRow& row, float largest)
      : takes_first(row.factor < 0 || largest == kInf),
        max(largest),
        softmax{takes_first ? kInf : fmaxf(largest, kLowest), fabsf(row.factor)} {}
  // What number i, a logit that is not NaN, adds to the unit's sum: its p, or, where the first of
  // the largest is taken, a bit if it is one of these, the higher the earlier it comes.
  __device__ __forceinline__ float of(float v, int i) const {
    const float p = softmax.p_of(v);  // 0 with a base of infinity
    return takes_first && v == max ? __uint_as_float((127u + 15 - i) << 23) : p;
  }
};

// Those logits of a unit that have met on a lane's side (core/philox.h).
struct UnitSide {
  float sum;
  int choice;          // who has won
  bool stands = true;  // and that in this lane

  static __device__ __forceinline__ UnitSide meet(float draw, const UnitSide& low,
                                                  const UnitSide& high) {
    const float both = low.sum + high.sum;
    return {both, low_side_wins(draw, low.sum, both) ? low.choice : high.choice};
  }
  // The side of the lane `apart`; the winner's choice is known to the winner's lanes.
  __device__ __forceinline__ void meet(float draw, int apart, bool is_low) {
    const float other = __shfl_xor_sync(0xffffffffu, sum, apart), both = sum + other;
    stands = stands & (low_side_wins(draw, is_low ? sum : other, both) == is_low);
    sum = both;
  }
};

// A unit of which each lane has two logits, which differ in bit 3 of their numbers, or four, in
// bits 3 and 0 (so the index has bit 3, then 0). The numbers' other bits are those of `lowest`, the
// lane's lowest number, and of the lanes' numbers from bit kLane on. NaN counts as -infinity. True
// in the lane that has the choice, which alone knows the unit and stores it.
template <int kLane, int kOwn>
__device__ __forceinline__ bool logit_unit(const float (&logits)[kOwn], const UnitRow& row,
                                           int lowest, LogitUnit& unit) {
  static_assert(kOwn == 2 || kOwn == 4);
  constexpr int kFirst = kOwn / 2;  // round between lanes
  float v[kOwn], max = -kInf;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) max = fmaxf(max, v[i] = fmaxf(logits[i], -kInf));
#pragma unroll
  for (int r = kFirst; r < kUnitRounds; ++r)
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, kLane << (r - kFirst)));
  const UnitParts parts(row, max);
  const auto meet_in_lane = [&](int i) {
    const int low = lowest + i;
    return UnitSide::meet(row.draws.v[0], {parts.of(v[i], low), low},
                          {parts.of(v[i + kOwn / 2], low + 8), low + 8});
  };
  UnitSide side = meet_in_lane(0);
  if constexpr (kOwn == 4) side = UnitSide::meet(row.draws.v[1], side, meet_in_lane(1));
#pragma unroll
  for (int r = kFirst; r < kUnitRounds; ++r)
    side.meet(row.draws.v[r], kLane << (r - kFirst), (lowest >> round_bit(r) & 1) == 0);
  constexpr int kOthers = kOwn == 4 ? 6 : 7;  // bits of `lowest`
  constexpr float kParts = 0x1p24f, kMost = 0x1p28f - 16;
  const int first = 15 + 127 - static_cast<int>(__float_as_uint(side.sum) >> 23);
  const auto mass = static_cast<uint32_t>(fminf(side.sum * kParts, kMost));
  unit = {max, parts.takes_first ? static_cast<uint32_t>(first)
                                 : mass << 4 | static_cast<uint32_t>(side.choice)};
  return parts.takes_first ? (first & kOthers) == lowest : side.stands;
}

// Units of the rows of a warpgroup's product (wgmma.cuh) that are lane / 4 and lane / 4 + 8, from
// column `first` on, of which there are n. By all lanes; of rows that are not `mine` nothing is
// stored.
template <int kTiles>
__device__ __forceinline__ void store_units(float (&sums)[kTiles][4], const UnitRow (&rows)[2],
                                            int first, int n, const bool (&mine)[2],
                                            LogitUnit* const (&units)[2]) {
  static_assert(kTiles % 2 == 0);
  const int lowest = static_cast<int>(threadIdx.x) % 4 * 2;
  if (first + 8 * kTiles > n) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + 8 * t + lowest + i % 2 >= n) sums[t][i] = -kInf;
  }
#pragma unroll
  for (int t = 0; t < kTiles; t += 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float v[4] = {sums[t][2 * i], sums[t][2 * i + 1], sums[t + 1][2 * i],
                          sums[t + 1][2 * i + 1]};
      LogitUnit unit;
      const bool stores = logit_unit<1>(v, rows[i], lowest, unit);
      const int begin = first + 8 * t;
      if (stores & mine[i] & (begin < n)) units[i][begin / kUnitTokens] = unit;
    }
}

}  // namespace ni::cuda
