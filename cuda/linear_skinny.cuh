// How a product's sum becomes an element of the result: what cuBLASLt's kernels do, to the bit.
#pragma once

#include "cuda/common.cuh"
#include "cuda/linear.h"

namespace ni::cuda {

template <typename T>
__device__ __forceinline__ float with_bias(const SkinnyArgs& a, float sum, int col) {
  return a.bias == nullptr ? sum : __fadd_rn(sum, as_float(from_float<T>(a.bias[col])));
}

// Unlike from_float(), too large a float16 becomes infinite.
template <typename T>
__device__ __forceinline__ T round_linear(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return from_float<T>(v);
  }
}

// `at`: elements from a.out.
template <typename T>
__device__ __forceinline__ void store_linear(const SkinnyArgs& a, int64_t at, float v) {
  if (a.out_dtype == DType::f32) {
    static_cast<float*>(a.out)[at] = v;
    return;
  }
  T* to = static_cast<T*>(a.out) + at;
  T rounded = round_linear<T>(v);
  if (a.accumulate) rounded = from_float<T>(__fadd_rn(as_float(*to), as_float(rounded)));
  *to = rounded;
}

}  // namespace ni::cuda
