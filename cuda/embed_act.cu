// The small operators that only move elements: embedding rows, gated activations, gathered rows,
// copies of cache blocks, conversions of weights.
// Layout: rows of n elements, strides free. A thread takes 8 neighbouring elements (16 bytes) where
// rows are aligned for it, else one; consecutive threads, consecutive vectors. Each element is read
// and written once; bound by bandwidth, by the launch where rows are few.
#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace ni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // a few waves; threads loop over the rest

unsigned blocks_for(int64_t units) {
  return static_cast<unsigned>(std::min(kMaxBlocks, (units + kThreads - 1) / kThreads));
}

// Calls f with 8 or 1: how many elements a thread moves at once.
template <typename F>
void dispatch_vector(bool vectors, const F& f) {
  if (vectors) {
    f(std::integral_constant<int, 8>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

struct EmbedParams {
  const int32_t* token_ids;
  const int32_t* sampled_ids;
  const int32_t* positions;
  const void* table;
  const void* positions_table;
  void* out;
  int64_t rows, n, table_stride, out_stride;
  float scale;
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) embed_kernel(const EmbedParams p) {
  wait_for_previous();
  let_next_start();
  const int64_t vectors = p.n / V, units = p.rows * vectors;
  for (int64_t u = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; u < units;
       u += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = u / vectors, at = u % vectors * V;
    int32_t id = p.token_ids[row];
    if (id < 0) id = p.sampled_ids[-1 - id];
    auto e = *reinterpret_cast<const Vec<T, V>*>(static_cast<const T*>(p.table) +
                                                 id * p.table_stride + at);
    if (p.positions_table != nullptr) {
      const auto add = *reinterpret_cast<const Vec<T, V>*>(
          static_cast<const T*>(p.positions_table) + p.positions[row] * p.table_stride + at);
#pragma unroll
      for (int j = 0; j < V; ++j)
        e.v[j] = from_float<T>(as_float(e.v[j]) * p.scale + as_float(add.v[j]));
    } else if (p.scale != 1.0f) {
#pragma unroll
      for (int j = 0; j < V; ++j) e.v[j] = from_float<T>(as_float(e.v[j]) * p.scale);
    }
    *reinterpret_cast<Vec<T, V>*>(static_cast<T*>(p.out) + row * p.out_stride + at) = e;
  }
}

template <typename T, int V, Activation kAct>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(const T* x, int64_t x_stride, int64_t rows, int64_t n, bool gated, T* out,
                      int64_t out_stride) {
  wait_for_previous();
  let_next_start();
  const int64_t vectors = n / V, units = rows * vectors;
  for (int64_t u = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; u < units;
       u += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = u / vectors, at = u % vectors * V;
    const T* from = x + row * x_stride + at;
    const auto gate = *reinterpret_cast<const Vec<T, V>*>(from);
    Vec<T, V> y;
    if (gated) {
      const auto up = *reinterpret_cast<const Vec<T, V>*>(from + n);
#pragma unroll
      for (int j = 0; j < V; ++j)
        y.v[j] = from_float<T>(activate<kAct>(as_float(gate.v[j])) * as_float(up.v[j]));
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) y.v[j] = from_float<T>(activate<kAct>(as_float(gate.v[j])));
    }
    *reinterpret_cast<Vec<T, V>*>(out + row * out_stride + at) = y;
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* x, int64_t x_stride, const int32_t* rows, int64_t count, int64_t n,
                  T* out, int64_t out_stride) {
  wait_for_previous();
  let_next_start();
  const int64_t vectors = n / V, units = count * vectors;
  for (int64_t u = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; u < units;
       u += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = u / vectors, at = u % vectors * V;
    *reinterpret_cast<Vec<T, V>*>(out + row * out_stride + at) =
        *reinterpret_cast<const Vec<T, V>*>(x + rows[row] * x_stride + at);
  }
}

// blockIdx.y: the copy; blockIdx.z: K or V.
__global__ void __launch_bounds__(kThreads)
    copy_blocks_kernel(const BlockCopy* copies, void* k, void* v, int64_t block_bytes,
                       int64_t stride_bytes) {
  const BlockCopy copy = copies[blockIdx.y];
  char* base = static_cast<char*>(blockIdx.z == 0 ? k : v);
  const auto* from = reinterpret_cast<const int4*>(base + copy.src * stride_bytes);
  auto* to = reinterpret_cast<int4*>(base + copy.dst * stride_bytes);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < block_bytes / 16;
       i += static_cast<int64_t>(gridDim.x) * kThreads)
    to[i] = from[i];
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const From* src, int64_t src_stride, int64_t rows, int64_t cols, To* dst,
                   int64_t dst_stride) {
  const int64_t units = rows * cols;
  for (int64_t u = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; u < units;
       u += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = u / cols, col = u % cols;
    const float v = as_float(src[row * src_stride + col]);
    // Plain rounding, as when a checkpoint is converted: what is too large becomes infinite.
    if constexpr (std::is_same_v<To, __half>)
      dst[row * dst_stride + col] = __float2half_rn(v);
    else
      dst[row * dst_stride + col] = from_float<To>(v);
  }
}

template <typename F>
void dispatch_float(DType dtype, const char* what, const F& f) {
  if (dtype == DType::f32) {
    f(float{});
  } else {
    dispatch_16bit(dtype, what, f);
  }
}

}  // namespace

void embed(const int32_t* token_ids, const int32_t* sampled_ids, const int32_t* positions,
           int64_t rows, const void* table, const void* positions_table, int64_t table_stride,
           int64_t n, float scale, DType dtype, void* out, int64_t out_stride,
           cudaStream_t stream) {
  if (rows == 0) return;
  const EmbedParams p{token_ids, sampled_ids,  positions,  table, positions_table, out, rows,
                      n,         table_stride, out_stride, scale};
  const bool vectors = n % 8 == 0 && is_vector_aligned(table, table_stride) &&
                       is_vector_aligned(positions_table, table_stride) &&
                       is_vector_aligned(out, out_stride);
  dispatch_16bit(dtype, "embed", [&](auto type) {
    dispatch_vector(vectors, [&](auto v) {
      constexpr int V = decltype(v)::value;
      launch(embed_kernel<decltype(type), V>, blocks_for(rows * n / V), kThreads, 0, stream,
             "embed", p);
    });
  });
}

void activation(const void* x, int64_t x_stride, int64_t rows, int64_t n, Activation act,
                bool gated, DType dtype, void* out, int64_t out_stride, cudaStream_t stream) {
  if (rows == 0) return;
  const bool vectors =
      n % 8 == 0 && is_vector_aligned(x, x_stride) && is_vector_aligned(out, out_stride);
  dispatch_16bit(dtype, "activation", [&](auto type) {
    using T = decltype(type);
    dispatch_vector(vectors, [&](auto v) {
      constexpr int V = decltype(v)::value;
      dispatch_activation(act, [&](auto kind) {
        launch(activation_kernel<T, V, decltype(kind)::value>, blocks_for(rows * n / V), kThreads,
               0, stream, "activation", static_cast<const T*>(x), x_stride, rows, n, gated,
               static_cast<T*>(out), out_stride);
      });
    });
  });
}

void gather_rows(const void* x, int64_t x_stride, const int32_t* rows, int64_t count, int64_t n,
                 DType dtype, void* out, int64_t out_stride, cudaStream_t stream) {
  if (count == 0) return;
  const bool vectors =
      n % 8 == 0 && is_vector_aligned(x, x_stride) && is_vector_aligned(out, out_stride);
  dispatch_16bit(dtype, "gather_rows", [&](auto type) {
    using T = decltype(type);
    dispatch_vector(vectors, [&](auto v) {
      constexpr int V = decltype(v)::value;
      launch(gather_kernel<T, V>, blocks_for(count * n / V), kThreads, 0, stream, "gather_rows",
             static_cast<const T*>(x), x_stride, rows, count, n, static_cast<T*>(out), out_stride);
    });
  });
}

void copy_blocks(const BlockCopy* copies, int32_t num_copies, const KvView& kv,
                 cudaStream_t stream) {
  constexpr int32_t kMostCopies = 65535;  // of a grid's second dimension
  const auto size = static_cast<int64_t>(dtype_size(kv.dtype));
  const int64_t bytes = kv.block_elements() * size;
  const int64_t stride = kv.head_offset(1, 0) * size;
  check_arg(bytes % 16 == 0, "copy_blocks: a block of ", bytes, " bytes is no multiple of 16");
  const auto parts = static_cast<unsigned>(std::min<int64_t>(8, bytes / 16 / kThreads + 1));
  for (int32_t first = 0; first < num_copies; first += kMostCopies) {
    const dim3 grid(parts, static_cast<unsigned>(std::min(kMostCopies, num_copies - first)), 2);
    copy_blocks_kernel<<<grid, kThreads, 0, stream>>>(copies + first, kv.k, kv.v, bytes, stride);
    check_launch("copy_blocks");
  }
}

void convert_rows(const void* src, DType src_dtype, int64_t src_stride, int64_t rows, int64_t cols,
                  void* dst, DType dst_dtype, int64_t dst_stride, cudaStream_t stream) {
  if (rows * cols == 0) return;
  dispatch_float(src_dtype, "convert_rows", [&](auto from) {
    dispatch_float(dst_dtype, "convert_rows", [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      convert_kernel<From, To><<<blocks_for(rows * cols), kThreads, 0, stream>>>(
          static_cast<const From*>(src), src_stride, rows, cols, static_cast<To*>(dst), dst_stride);
    });
  });
  check_launch("convert_rows");
}

}  // namespace ni::cuda
