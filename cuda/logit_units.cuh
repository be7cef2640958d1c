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

// How a row is sampled, as far as its units depend on it.
struct UnitRow {
  float factor = 0;  // of the softmax; below 0: the row is greedy
  RoundDraws draws{};

  UnitRow() = default;
  __device__ explicit UnitRow(const SamplingRow& r)
      : factor(is_greedy(r) ? -1.0f : softmax_factor(r)),
        draws(philox_rounds(r.seed, r.choice, static_cast<uint32_t>(r.position))) {}

  __device__ __forceinline__ bool takes_first(float max) const { return factor < 0 || max == kInf; }
  // What number i of a unit, a logit that is not NaN, adds to the unit's sum: its p, or, where the
  // first of the largest is taken, a bit if it is one of these, the higher the earlier it comes.
  __device__ __forceinline__ float part(float v, float max, int i) const {
    if (takes_first(max)) return v == max ? __uint_as_float((127u + 15 - i) << 23) : 0.0f;
    return Softmax{fmaxf(max, kLowest), factor}.p_of(v);
  }
};

// Those logits of a unit that have met on a lane's side (core/philox.h).
struct UnitSide {
  float sum;
  int choice;          // who has won
  bool stands = true;  // and that in this lane, or in one whose side this one has

  static __device__ __forceinline__ UnitSide meet(float draw, const UnitSide& low,
                                                  const UnitSide& high) {
    const float both = low.sum + high.sum;
    const bool low_wins = low_side_wins(draw, low.sum, both);
    return {both, low_wins ? low.choice : high.choice, low_wins ? low.stands : high.stands};
  }
  // The side of the lane `apart`; the winner's choice is known to the winner's lanes.
  __device__ __forceinline__ void meet(float draw, int apart, bool is_low) {
    const float other = __shfl_xor_sync(0xffffffffu, sum, apart), both = sum + other;
    stands = stands && low_side_wins(draw, is_low ? sum : other, both) == is_low;
    sum = both;
  }
};

// The unit, when all have met. True in one of its lanes, which stores it. has(i): whether the lane
// has number i.
template <typename F>
__device__ __forceinline__ bool finish_unit(const UnitRow& row, float max, const UnitSide& all,
                                            const F& has, LogitUnit& unit) {
  constexpr float kParts = 0x1p24f, kMost = 0x1p28f - 16;
  if (row.takes_first(max)) {
    const int first = 15 + 127 - static_cast<int>(__float_as_uint(all.sum) >> 23);
    unit = {max, static_cast<uint32_t>(first)};
    return has(first);
  }
  const auto mass = static_cast<uint32_t>(fminf(all.sum * kParts, kMost));
  unit = {max, mass << 4 | static_cast<uint32_t>(all.choice)};
  return all.stands;
}

// A unit of which each lane has two logits, which differ in bit 3 of their numbers, or four, in
// bits 3 and 0 (so the index has bit 3, then 0). The numbers' other bits are those of `lowest`, the
// lane's lowest number, and of the lanes' numbers from bit kLane on. NaN counts as -infinity.
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
  const auto meet_in_lane = [&](int i) {
    const int low = lowest + i;
    return UnitSide::meet(row.draws.v[0], {row.part(v[i], max, low), low},
                          {row.part(v[i + kOwn / 2], max, low + 8), low + 8});
  };
  UnitSide side = meet_in_lane(0);
  if constexpr (kOwn == 4) side = UnitSide::meet(row.draws.v[1], side, meet_in_lane(1));
#pragma unroll
  for (int r = kFirst; r < kUnitRounds; ++r)
    side.meet(row.draws.v[r], kLane << (r - kFirst), (lowest >> round_bit(r) & 1) == 0);
  constexpr int kOthers = kOwn == 4 ? 6 : 7;  // bits that tell lanes apart
  return finish_unit(row, max, side, [&](int i) { return (i & kOthers) == lowest; }, unit);
}

// The same of a unit of which four lanes have four neighbours each.
__device__ __forceinline__ bool logit_unit(const float4& logits, const UnitRow& row,
                                           LogitUnit& unit) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 4;
  const float v[4] = {fmaxf(logits.x, -kInf), fmaxf(logits.y, -kInf), fmaxf(logits.z, -kInf),
                      fmaxf(logits.w, -kInf)};
  float max = fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
  max = fmaxf(max, __shfl_xor_sync(kAll, max, 1));
  max = fmaxf(max, __shfl_xor_sync(kAll, max, 2));
  const float* draws = row.draws.v;
  UnitSide sides[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sides[i] = {row.part(v[i], max, 4 * lane + i), 4 * lane + i};
    sides[i].meet(draws[0], 2, lane < 2);
  }
  UnitSide side = UnitSide::meet(draws[2], UnitSide::meet(draws[1], sides[0], sides[1]),
                                 UnitSide::meet(draws[1], sides[2], sides[3]));
  side.meet(draws[3], 1, lane % 2 == 0);
  return finish_unit(row, max, side, [&](int i) { return i / 4 == lane; }, unit);
}

// Units of a row of a warpgroup's product (wgmma.cuh), [t][2 i] and [t][2 i + 1] of its sums, from
// column `first` on, of which there are n. By all lanes; those of rows that are not `mine` store
// nothing.
template <int kTiles>
__device__ __forceinline__ void store_units(const float (&sums)[kTiles][4], int i,
                                            const UnitRow& row, int first, int n, bool mine,
                                            LogitUnit* units) {
  const int lowest = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int t = 0; t < kTiles; t += 2) {
    const int begin = first + 8 * t;
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = begin + j / 2 * 8 + lowest + j % 2;
      v[j] = col < n ? sums[t + j / 2][2 * i + j % 2] : -kInf;
    }
    LogitUnit unit;
    if (logit_unit<1>(v, row, lowest, unit) && mine && begin < n) units[begin / kUnitTokens] = unit;
  }
}

}  // namespace ni::cuda
