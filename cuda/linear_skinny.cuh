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

// What a sum is added to. `at`: elements from a.out.
template <typename T>
__device__ __forceinline__ T load_linear(const SkinnyArgs& a, int64_t at) {
  return a.accumulate ? static_cast<const T*>(a.out)[at] : from_float<T>(0);
}
template <typename T>
__device__ __forceinline__ T add_linear(T result, T before) {
  return from_float<T>(__fadd_rn(as_float(before), as_float(result)));
}
template <typename T>
__device__ __forceinline__ void store_linear(const SkinnyArgs& a, int64_t at, float v, T before) {
  if (a.out_dtype == DType::f32) {
    static_cast<float*>(a.out)[at] = v;
    return;
  }
  T rounded = round_linear<T>(v);
  if (a.accumulate) rounded = add_linear(rounded, before);
  static_cast<T*>(a.out)[at] = rounded;
}

}  // namespace ni::cuda
