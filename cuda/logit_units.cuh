// What the sampler wants to know of a row before it reads logits: of every 16 neighbours, a unit,
// the largest and their mass under it. The product that makes the logits sums them up as it stores
// them (linear_skinny_sm90.cu), else the sampler's first kernel does (sampling.cu), in the same
// order: a token does not depend on who did.
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

// A unit of which each lane has two logits or four, in lanes whose numbers differ in the bits from
// kLane on; NaN counts as -infinity. Sums are made of pairs whose columns differ in bit 3, then 0,
// 1 and 2; so the index into v has bit 3, then, if there are four, 0.
template <int kLane, int kOwn>
__device__ __forceinline__ LogitUnit logit_unit(const float (&v)[kOwn], float factor) {
  static_assert(kOwn == 2 || kOwn == 4);
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kLanes = kUnitLogits / kOwn;
  float max = -kInf;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) max = fmaxf(max, v[i]);  // not NaN
#pragma unroll
  for (int apart = 1; apart < kLanes; apart *= 2)
    max = fmaxf(max, __shfl_xor_sync(kAll, max, apart * kLane));
  const Softmax softmax{fmaxf(max, kLowest), factor};
  float p[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) p[i] = softmax.p_of(fmaxf(v[i], -kInf));
  float mass = kOwn == 2 ? p[0] + p[1] : (p[0] + p[kOwn - 2]) + (p[1] + p[kOwn - 1]);
#pragma unroll
  for (int apart = 1; apart < kLanes; apart *= 2)
    mass += __shfl_xor_sync(kAll, mass, apart * kLane);
  return {max, mass};
}

// The same of a unit of which four lanes have four neighbours each; in each of them.
__device__ __forceinline__ LogitUnit logit_unit(const float4& v, float factor) {
  constexpr unsigned kAll = 0xffffffffu;
  float max = fmaxf(fmaxf(fmaxf(-kInf, v.x), v.y), fmaxf(fmaxf(-kInf, v.z), v.w));
  max = fmaxf(max, __shfl_xor_sync(kAll, max, 1));
  max = fmaxf(max, __shfl_xor_sync(kAll, max, 2));
  const Softmax softmax{fmaxf(max, kLowest), factor};
  float p[4] = {softmax.p_of(fmaxf(v.x, -kInf)), softmax.p_of(fmaxf(v.y, -kInf)),
                softmax.p_of(fmaxf(v.z, -kInf)), softmax.p_of(fmaxf(v.w, -kInf))};
#pragma unroll
  for (float& one : p) one += __shfl_xor_sync(kAll, one, 2);
  const float half = (p[0] + p[1]) + (p[2] + p[3]);
  return {max, half + __shfl_xor_sync(kAll, half, 1)};
}

}  // namespace ni::cuda
