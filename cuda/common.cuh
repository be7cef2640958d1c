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

// All kernels that launch() starts want a multiprocessor's memory divided alike: it is only divided
// anew when nothing runs there, so one that wants it otherwise cannot start beside the one before
// it.
template <typename Kernel>
void prefer_shared_memory(Kernel kernel, const char* name) {
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             name);
}

// Programmatic dependent launch (CUDA guide, Hopper on): a kernel is put on the card before the one
// before it has ended, and waits itself. let_next_start() allows the next kernel onto the card.
// Whoever calls it after the own wait_for_previous() has at most one older kernel beside the next
// one. Products that have a norm, or room for the next kernel beside them, call it before: what
// follows has much to look up or to fetch, and it runs beside two or more. Every kernel waits
// before it ends (some block of it must), so where a wait returns, all older kernels have ended.
// Before its wait a kernel that was launched with launch() writes nothing and reads only what no
// kernel of the step writes: weights, the step's inputs, tokens that were in the cache before.
// Where that depends on who they are, the caller says so: `settled`. So the first kernel of a step
// (after its inputs) and what stands between two kernels that write and read a cache must wait
// before they let the next one start. (A block that ends counts as if it had called
// let_next_start().)
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

inline bool has_dependent_launch() {
  static const bool has = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major >= 9;
  }();
  return has;
}

// Hopper's: CTAs that reach each other's shared memory.
inline bool has_clusters() {
  static const bool has = [] {
    int device = 0, clusters = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
           clusters != 0;
  }();
  return has;
}

// `cluster`: CTAs of a cluster; 1: none.
template <typename... Params, typename... Args>
void launch_clusters(int cluster, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem,
                     cudaStream_t stream, const char* name, const Args&... args) {
  if (has_dependent_launch()) prefer_shared_memory(kernel, name);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  if (has_dependent_launch()) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
            const char* name, const Args&... args) {
  launch_clusters(1, kernel, grid, block, smem, stream, name, args...);
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
  return __float2half_rn(isnan(v) ? v : fminf(fmaxf(v, -65504.0f), 65504.0f));
}

// 2^x and 1 / x by the hardware, to 2 ulp; what would be subnormal is 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Whether 16-bit rows can be moved 8 elements at a time. No data: nothing stands in the way.
inline bool is_vector_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
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

// Threads of a block that normalises a row of so many vectors; thread t sums vectors t, t +
// threads, …, then lanes, then warps are summed. Whoever takes such a sum takes it in this order.
constexpr int kNormThreads = 512;
__host__ __device__ inline int norm_threads(int vectors) {
  const int warps = (vectors + 31) / 32;
  return 32 * (warps < kNormThreads / 32 ? warps : kNormThreads / 32);
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
