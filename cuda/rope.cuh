// A head's elements as one warp has them, for QK-norm and rotation: lane l holds pair k, elements
// [2 l + 64 k, + 2). Every operation is named, so that whoever does this gets the same bits.
#pragma once

#include "cuda/common.cuh"

namespace ni::cuda {

__device__ __forceinline__ float head_factor(float squares, int d, float eps) {
  return rsqrtf(__fadd_rn(__fdiv_rn(squares, static_cast<float>(d)), eps));
}

// x *= rsqrt(mean of squares + eps) * weight. weight: those of this lane's pairs.
template <int kPairs>
__device__ __forceinline__ void normalise_head(float2 (&v)[kPairs], const float2 (&weight)[kPairs],
                                               int lane, int d, float eps) {
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    if (2 * lane + 64 * k >= d) continue;
    squares = __fmaf_rn(v[k].x, v[k].x, squares);
    squares = __fmaf_rn(v[k].y, v[k].y, squares);
  }
  const float factor = head_factor(warp_sum(squares), d, eps);
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    v[k].x = __fmul_rn(v[k].x, __fmul_rn(factor, weight[k].x));
    v[k].y = __fmul_rn(v[k].y, __fmul_rn(factor, weight[k].y));
  }
}

// A pair turned by its angles; `other`: the elements that rotate with it, which stand half of the
// rotated dimensions before (`upper`) or behind.
__device__ __forceinline__ float2 rotate_pair(float2 v, float2 other, float2 cos, float2 sin,
                                              bool upper) {
  const float2 turned = upper ? other : float2{-other.x, -other.y};
  return {__fmaf_rn(turned.x, sin.x, __fmul_rn(v.x, cos.x)),
          __fmaf_rn(turned.y, sin.y, __fmul_rn(v.y, cos.y))};
}

// fp8 (e4m3) rounds to nearest even and saturates.
template <typename C>
__device__ __forceinline__ void store_pair(C* to, float2 v, float inverse_scale) {
  Vec<C, 2> pair;
  if constexpr (sizeof(C) == 1) {
    pair.v[0] = C(__fmul_rn(v.x, inverse_scale));
    pair.v[1] = C(__fmul_rn(v.y, inverse_scale));
  } else {
    pair.v[0] = from_float<C>(v.x);
    pair.v[1] = from_float<C>(v.y);
  }
  *reinterpret_cast<Vec<C, 2>*>(to) = pair;
}

}  // namespace ni::cuda
