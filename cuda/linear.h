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
  // Whether run() takes the norm, the gate and the rotation of `a` for so many rows; above 64, once
  // prepare() has found that this takes less time. (An out whose rows are not of 16-byte vectors
  // run() refuses to rotate.)
  bool fuses(const LinearWeight& w, const LinearArgs& a, int64_t rows) const;
  // x, out: device memory; out of the activations' type or fp32 (then no accumulate).
  // settled (common.cuh): no kernel that may still run has written the weight, or what a rotation
  // needs: none since one that waited before it let the next one start.
  // With units (out is fp32): whether they have been made; with units.only `out` is then not
  // written.
  bool run(const Tensor& x, const LinearWeight& w, const LinearArgs& a, const Tensor& out,
           cudaStream_t stream, bool settled = true, const LogitUnits& units = {});
  // Candidates timed so far: none if the cache file knew all plans.
  int num_timed() const;
  // What was chosen, for people: one line a plan. (The time of a product to logits includes making
  // their units.)
  std::vector<std::string> describe() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// -- linear_skinny.cu, linear_skinny_sm90.cu ------------------------------------------------------
// y[rows, out_features] = x W^T + bias, in the canonical order (see above); right for any number of
// rows, made for few.
struct SkinnyArgs {
  const void* x = nullptr;
  int64_t x_stride = 0, rows = 0;
  const void* w = nullptr;
  int64_t w_stride = 0, in_features = 0, out_features = 0;
  const float* bias = nullptr;  // rounded to `dtype` before it is added, like cuBLASLt's epilogue
  DType dtype = DType::bf16;    // of x and W
  void* out = nullptr;
  DType out_dtype = DType::bf16;  // dtype, or f32 (then of what follows at most a norm)
  int64_t out_stride = 0;
  bool accumulate = false;  // out = round(out + round(y))
  bool settled = false;     // common.cuh; of W, norms, positions and slots
  // Where fuses_skinny() says so:
  NormWeight norm;  // RMSNorm of x first; no weight: none
  float norm_eps = 0;
  bool gated = false;  // out[rows, out_features / 2] = act(y[:, : half]) * y[:, half :]
  Activation act = Activation::silu;
  LogitUnits units;  // fp32 out: also of the result, where makes_units() says so
};
void linear_skinny(const SkinnyArgs& a, const Card& card, cudaStream_t stream);
// Hopper's, where in_features is a multiple of 64.
void linear_skinny_sm90(const SkinnyArgs& a, const Card& card, cudaStream_t stream);
bool fuses_skinny(const SkinnyArgs& a, const Card& card);
bool makes_units(const SkinnyArgs& a, const Card& card);

// -- linear_large_sm90.cu -------------------------------------------------------------------------
// The same for many rows, at least 128, with a gate or, `rope` not null, with rope_kv_write() of
// the result, where fuses_large() says so, or, with units, only these, where makes_units_large()
// says so; the same bits.
void linear_large_sm90(const SkinnyArgs& a, const RopeKvWrite* rope, const Card& card,
                       cudaStream_t stream);
bool fuses_large(const SkinnyArgs& a, const RopeKvWrite* rope, const Card& card);
bool makes_units_large(const SkinnyArgs& a, const Card& card);

// Adds to *count the number of elements of a and b (same type and shape) with different bits.
void count_differences(const Tensor& a, const Tensor& b, int* count, cudaStream_t stream);

}  // namespace ni::cuda
