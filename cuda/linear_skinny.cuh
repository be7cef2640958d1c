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

// Two at once, as they lie in memory; bf16 rounds both in one instruction.
template <typename T>
__device__ __forceinline__ uint32_t bits_of_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 two = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  } else {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  }
}
// The same as from_float() rounds.
template <typename T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>)
    return bits_of_pair<T>(as_float(from_float<T>(low)), as_float(from_float<T>(high)));
  return bits_of_pair<T>(low, high);
}
template <typename T>
__device__ __forceinline__ float2 pair_of_bits(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  return __half22float2(reinterpret_cast<const __half2&>(bits));
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
__device__ __forceinline__ void store_16bit(const SkinnyArgs& a, int64_t at, float v, T before) {
  T rounded = round_linear<T>(v);
  if (a.accumulate) rounded = add_linear(rounded, before);
  static_cast<T*>(a.out)[at] = rounded;
}
template <typename T>
__device__ __forceinline__ void store_linear(const SkinnyArgs& a, int64_t at, float v, T before) {
  if (a.out_dtype == DType::f32) {
    static_cast<float*>(a.out)[at] = v;
  } else {
    store_16bit(a, at, v, before);
  }
}

}  // namespace ni::cuda
