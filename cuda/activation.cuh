// Activation functions of one element, in fp32 (backend/op_args.h names them).
#pragma once

#include "backend/op_args.h"
#include "cuda/common.cuh"

namespace ni::cuda {

template <Activation kAct>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kAct == Activation::silu)
    return x * fast_reciprocal(1.0f + fast_exp2(-1.44269504f * x));
  if constexpr (kAct == Activation::gelu_tanh)
    return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  if constexpr (kAct == Activation::gelu) return 0.5f * x * erfcf(-0.70710678f * x);
  return x < 0 ? 0.0f : x;  // NaN stays NaN
}

// The same, chosen at run time.
__device__ __forceinline__ float activate(Activation act, float x) {
  switch (act) {
    case Activation::silu:
      return activate<Activation::silu>(x);
    case Activation::gelu_tanh:
      return activate<Activation::gelu_tanh>(x);
    case Activation::gelu:
      return activate<Activation::gelu>(x);
    default:
      return activate<Activation::relu>(x);
  }
}

template <typename F>
void dispatch_activation(Activation act, const F& f) {
  switch (act) {
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
  }
}

}  // namespace ni::cuda
