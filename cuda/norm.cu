// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016), with or without the residual
// add before it:
//   residual += x (rounded to the activations' type);  out = (h - mean) * rsqrt(var + eps) * w (+
//   b)
// where h is the residual, or x if there is none; RMSNorm has mean 0.
// Layout: rows of n elements, strides free. One block a row; a thread holds vectors of 8 elements
// tid, tid + threads, … in registers, so that each element is read once.
// Moves 2 to 4 times rows * n * 2 bytes; bound by memory bandwidth, by the launch where rows are
// few. Promise 1: threads and the order of the sum depend on n and on the alignment of rows alone.
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace ni::cuda {
namespace {

constexpr int kMaxThreads = kNormThreads;

struct NormParams {
  const void* x;
  void* residual;
  void* out;
  int64_t x_stride, residual_stride, out_stride;
  int n;
  const float* weight;
  const float* bias;
  float eps;
  bool vectors;  // of `weight` are 16-byte aligned
  bool settled;  // common.cuh; of `weight`
};

template <int V>
__device__ __forceinline__ Vec<float, V> load_floats(const float* from, bool is_aligned) {
  Vec<float, V> v;
  if (V % 4 == 0 && is_aligned) {
#pragma unroll
    for (int j = 0; j < V; j += 4)
      reinterpret_cast<float4&>(v.v[j]) = *reinterpret_cast<const float4*>(from + j);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) v.v[j] = from[j];
  }
  return v;
}

// kItems vectors of V elements a thread.
template <typename T, int V, int kItems, bool kLayer>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(const NormParams p) {
  using Elements = Vec<T, V>;
  __shared__ float shared[33];
  const int vectors = p.n / V;
  // Weights come from memory, where all layers' lie; they come before the wait, where registers are
  // enough for them.
  constexpr bool kEarly = kItems <= 4;
  Vec<float, V> weight[kEarly ? kItems : 1];
  const auto load_weight = [&](int i) { return load_floats<V>(p.weight + i * V, p.vectors); };
  if (!p.settled) wait_for_previous();
  if constexpr (kEarly) {
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      if (const int i = threadIdx.x + k * blockDim.x; i < vectors) weight[k] = load_weight(i);
  }
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;

  float h[kItems][V];
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= vectors) {
#pragma unroll
      for (int j = 0; j < V; ++j) h[k][j] = 0;
      continue;
    }
    Elements e = reinterpret_cast<const Elements*>(x)[i];
    if (p.residual != nullptr) {
      const Elements r = reinterpret_cast<const Elements*>(residual)[i];
#pragma unroll
      for (int j = 0; j < V; ++j) e.v[j] = from_float<T>(as_float(e.v[j]) + as_float(r.v[j]));
      reinterpret_cast<Elements*>(residual)[i] = e;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      h[k][j] = as_float(e.v[j]);
      sum = kLayer ? sum + h[k][j] : __fmaf_rn(h[k][j], h[k][j], sum);
    }
  }
  sum = block_sum(sum, shared);
  const float n = static_cast<float>(p.n);
  float mean = 0, variance = sum / n;
  if constexpr (kLayer) {
    mean = sum / n;
    float squares = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (threadIdx.x + k * blockDim.x >= vectors) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) squares += (h[k][j] - mean) * (h[k][j] - mean);
    }
    variance = block_sum(squares, shared) / n;
  }
  const float factor = rsqrtf(variance + p.eps);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= vectors) continue;
    Elements y;
    const Vec<float, V> w = kEarly ? weight[kEarly ? k : 0] : load_weight(i);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float v = (h[k][j] - mean) * factor * w.v[j];
      if (p.bias != nullptr) v += p.bias[i * V + j];
      y.v[j] = from_float<T>(v);
    }
    reinterpret_cast<Elements*>(out)[i] = y;
  }
}

template <typename T, int V, int kItems>
void launch_norm(const NormParams& p, NormKind kind, int64_t rows, int threads,
                 cudaStream_t stream) {
  const auto kernel =
      kind == NormKind::layer ? norm_kernel<T, V, kItems, true> : norm_kernel<T, V, kItems, false>;
  launch(kernel, static_cast<unsigned>(rows), static_cast<unsigned>(threads), 0, stream, "norm", p);
}

template <typename T, int V>
void launch_items(const NormParams& p, NormKind kind, int64_t rows, cudaStream_t stream) {
  const int vectors = p.n / V;
  const int threads = norm_threads(vectors);
  const int items = (vectors + threads - 1) / threads;
  if (items <= 1) {
    launch_norm<T, V, 1>(p, kind, rows, threads, stream);
  } else if (items <= 2) {
    launch_norm<T, V, 2>(p, kind, rows, threads, stream);
  } else if (items <= 4) {
    launch_norm<T, V, 4>(p, kind, rows, threads, stream);
  } else {
    check_arg(items <= 8, "norm: rows of ", p.n, " elements are too long; at most ",
              8 * V * kMaxThreads,
              V == 1 ? " (of a length or stride that is no multiple of 8)" : "");
    launch_norm<T, V, 8>(p, kind, rows, threads, stream);
  }
}

}  // namespace

void norm(const void* x, int64_t x_stride, void* residual, int64_t residual_stride, int64_t rows,
          int64_t n, const NormWeight& w, const NormArgs& a, DType dtype, void* out,
          int64_t out_stride, bool settled, cudaStream_t stream) {
  if (rows == 0) return;
  const NormParams p{x,
                     residual,
                     out,
                     x_stride,
                     residual_stride,
                     out_stride,
                     static_cast<int>(n),
                     w.weight,
                     w.bias,
                     a.eps,
                     is_vector_aligned(w.weight, 0),
                     settled};
  const bool vectors = n % 8 == 0 && is_vector_aligned(x, x_stride) &&
                       is_vector_aligned(out, out_stride) &&
                       is_vector_aligned(residual, residual_stride);
  dispatch_16bit(dtype, "norm", [&](auto type) {
    using T = decltype(type);
    if (vectors) {
      launch_items<T, 8>(p, a.kind, rows, stream);
    } else {
      launch_items<T, 1>(p, a.kind, rows, stream);
    }
  });
}

}  // namespace ni::cuda
