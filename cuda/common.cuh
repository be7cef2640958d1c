// What the kernels share: checked calls, dispatch of types, 16-byte vectors, warp and block sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "core/types.h"
#include "cuda/check_cuda.h"

namespace ni::cuda {

// More than 48 KB of dynamic shared memory has to be asked for, once a kernel (and it is cheap).
template <typename Kernel>
void allow_smem(Kernel kernel, size_t bytes, const char* name) {
  if (bytes > 48 * 1024)
    check_cuda(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        name);
}

// Calls f with a value of the CUDA type of an activation type.
template <typename F>
void dispatch_16bit(DType dtype, const char* what, const F& f) {
  if (dtype == DType::bf16) {
    f(__nv_bfloat16{});
  } else if (dtype == DType::f16) {
    f(__half{});
  } else {
    throw std::invalid_argument(
        concat(what, ": ", dtype_name(dtype), " is not supported on CUDA; bfloat16, float16 are"));
  }
}

__device__ __forceinline__ float as_float(float v) {
  return v;
}
__device__ __forceinline__ float as_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float as_float(__half v) {
  return __half2float(v);
}
// Rounds to nearest even. f16 saturates: an infinity in a cache would spread.
template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(fminf(fmaxf(v, -65504.0f), 65504.0f));
}

// N elements that move as one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

// The sum over a warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, i));
  return v;
}

// The sum over a block of whole warps, in every thread. `shared`: 33 floats.
__device__ __forceinline__ float block_sum(float v, float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = (blockDim.x + 31) / 32;
  v = warp_sum(v);
  __syncthreads();  // earlier users of `shared` are done
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = warp_sum(lane < warps ? shared[lane] : 0.0f);
    if (lane == 0) shared[32] = v;
  }
  __syncthreads();
  return shared[32];
}

}  // namespace ni::cuda
