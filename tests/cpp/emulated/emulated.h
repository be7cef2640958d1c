// CUDA kernels on the CPU, so that their tests run where there is no card: what translate.py makes
// of them is compiled by the host compiler, with this header before all else. A block's threads are
// fibers that take turns, in an order of chance, where they wait for each other; blocks run one
// after the other, but for those that look at what others count (ld.acquire, atom.add.acq_rel):
// there others may run in between, as many as the card holds. It shows what a kernel computes and
// touches, and some races: those in which somebody runs ahead for lack of a barrier. Of its speed
// it shows nothing.
//
// Not as on a card: copies happen when they are asked for; the tensor core rounds 16 products and
// the sum so far once; special functions are exact; __shared__ variables keep what the block before
// left; nothing overlaps; a cluster has one block (linear_large's, of two, run on a card only).
#pragma once

// All of CUDA's headers that kernels use, before __CUDA_ARCH__ is defined: for the host.
#define cudaLaunchKernelEx cudaLaunchKernelEx_of_the_runtime
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#undef cudaLaunchKernelEx

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <type_traits>

#undef __forceinline__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace ni::emulated {

inline float widen(uint16_t bits, bool is_bf16) {
  return is_bf16 ? std::bit_cast<float>(static_cast<uint32_t>(bits) << 16)
                 : __half2float(std::bit_cast<__half>(bits));
}
inline uint16_t narrow(float v, bool is_bf16) {
  return is_bf16 ? std::bit_cast<uint16_t>(__float2bfloat16_rn(v))
                 : std::bit_cast<uint16_t>(__float2half_rn(v));
}

// An instruction's operand: a value, or where a result goes.
struct Operand {
  void* to;
  uint64_t bits;
};
template <typename T>
uint64_t bits_of(T v) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}
template <typename T>
Operand in(T v) {
  return {nullptr, bits_of(v)};
}
template <typename T>
Operand out(T& v) {
  return {&v, 0};
}
void ptx(const char* text, std::initializer_list<Operand> operands);

// Runs it, or adds it to the graph that is being captured.
void enqueue(std::function<void()> work);
void run(dim3 grid, dim3 threads, const std::function<void()>& thread);
// For the running thread:
inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * threadIdx.y) % 32);
}
void yield();
// … and perhaps other blocks, of which kMaxResident are on their way at most.
inline constexpr int kMaxResident = 16;
void yield_to_blocks();
int resident();  // which of them this is
void synchronise_block();
// At a barrier of so many threads; without waiting for the others.
void synchronise(int barrier, int threads);
void arrive(int barrier, int threads);
// The values of all lanes of this warp that still run.
const uint64_t* exchange(uint64_t value);
// Shared memory is named by its distance from here.
unsigned char* dynamic_shared();

}  // namespace ni::emulated

namespace ni::emulated {

struct LaunchConfig {
  dim3 grid, threads;
  size_t bytes = 0;
  cudaStream_t stream = nullptr;
};
template <typename... Params, typename... Args>
void launch(const LaunchConfig& config, void (*kernel)(Params...), Args&&... args) {
  enqueue([config, kernel, ... copies = static_cast<Params>(args)] {
    run(config.grid, config.threads, [&] { kernel(copies...); });
  });
}

}  // namespace ni::emulated

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  ni::emulated::launch({config->gridDim, config->blockDim}, kernel, args...);
  return cudaSuccess;
}

inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void __syncthreads() {
  ni::emulated::synchronise_block();
}
inline void __syncwarp() {
  ni::emulated::exchange(0);
}
inline size_t __cvta_generic_to_shared(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) -
                               ni::emulated::dynamic_shared());
}

template <typename T>
T __shfl_sync(unsigned, T v, int lane) {
  return ni::emulated::from_bits<T>(ni::emulated::exchange(ni::emulated::bits_of(v))[lane % 32]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int lanes) {
  return __shfl_sync(mask, v, ni::emulated::lane() ^ lanes);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  for (int i = 16; i > 0; i /= 2) v = std::max(v, __shfl_xor_sync(mask, v, i));
  return v;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return ~__reduce_max_sync(mask, ~v);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, int lanes) {
  const int lane = ni::emulated::lane();
  return __shfl_sync(mask, v, lane < lanes ? lane : lane - lanes);
}
inline unsigned __ballot_sync(unsigned, bool v) {
  const uint64_t* all = ni::emulated::exchange(v ? 1 : 0);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= all[i] != 0 ? 1u << i : 0u;
  return result;
}
inline bool __all_sync(unsigned mask, bool v) {
  return __ballot_sync(mask, v) == mask;
}
inline bool __any_sync(unsigned mask, bool v) {
  return __ballot_sync(mask, v) != 0;
}

template <typename T, typename V>
T atomicAdd(T* at, V v) {
  const T before = *at;
  *at = static_cast<T>(before + static_cast<T>(v));
  return before;
}
template <typename T>
T atomicMax(T* at, T v) {
  const T before = *at;
  if (v > before) *at = v;
  return before;
}
template <typename T>
T atomicMin(T* at, T v) {
  const T before = *at;
  if (v < before) *at = v;
  return before;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline int __clz(int v) {
  return std::countl_zero(static_cast<unsigned>(v));
}
inline int __ffs(int v) {
  return v == 0 ? 0 : 1 + std::countr_zero(static_cast<unsigned>(v));
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline uint32_t __float_as_uint(float v) {
  return std::bit_cast<uint32_t>(v);
}
inline float __uint_as_float(uint32_t v) {
  return std::bit_cast<float>(v);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline unsigned long long __float2ull_rn(float v) {
  return static_cast<unsigned long long>(std::nearbyint(v));
}
inline unsigned long long __double2ull_ru(double v) {
  return static_cast<unsigned long long>(std::ceil(v));
}
inline float rsqrtf(float v) {
  return 1 / std::sqrt(v);
}
inline float __expf(float v) {
  return std::exp(v);
}
using std::isinf;
using std::isnan;
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
