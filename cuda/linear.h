// Matrix products y = x W^T + bias on tensor cores: cuBLASLt with plans that are timed at the
// start, and a kernel of our own for few rows.
//
// Weights are rows of `stride(in_features)` elements, zero beyond in_features. x needs a 16-byte
// aligned base and rows a multiple of 8 elements and at least stride8(in_features) apart; what lies
// between its columns and that may be anything finite.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace ni::cuda {

class Linear {
 public:
  struct Options {
    DType dtype = DType::bf16;
    // One arithmetic for a weight at every number of rows: fp32 accumulation by the tensor core in
    // groups of 16 ascending k, the sum never split.
    bool batch_invariant = true;
    std::string plan_cache;  // a file; empty: none
  };
  Linear(const Card& card, const Options& options, cudaStream_t stream);
  ~Linear();

  // Elements between the rows of a weight.
  static int64_t weight_stride(int64_t in_features) { return (in_features + 63) / 64 * 64; }

  // Chooses plans by timing (or takes them from the cache file) and prepares biases. Weights of one
  // shape share plans. The last weight is lm_head: its output is fp32, its rows at most 512.
  void prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows);
  // x, out: device memory; out of the activations' type or fp32 (then no accumulate).
  void run(const Tensor& x, const LinearWeight& w, const LinearArgs& a, const Tensor& out,
           cudaStream_t stream);
  // Candidates timed so far: none if the cache file knew all plans.
  int num_timed() const;
  // What was chosen, for people: one line a plan.
  std::vector<std::string> describe() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// -- linear_skinny.cu -----------------------------------------------------------------------------
// The kernel for few rows, right for any number of them; in the canonical order (see above).
// bias: fp32 or null, rounded to `dtype` before it is added, as cuBLASLt's epilogue takes it.
// out_dtype: dtype or f32. accumulate: out = round(sum + bias + out).
void linear_skinny(const void* x, int64_t x_stride, int64_t rows, const void* w, int64_t w_stride,
                   int64_t in_features, int64_t out_features, const float* bias, bool accumulate,
                   DType dtype, void* out, DType out_dtype, int64_t out_stride, const Card& card,
                   cudaStream_t stream);

}  // namespace ni::cuda
