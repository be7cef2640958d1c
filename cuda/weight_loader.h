// Weights from host memory (usually a mapped file) to the card: rows are copied into pinned buffers
// and from there by the copy engine, so that reading a file, copying and converting overlap. Any
// number of threads may load at once; each takes a lane of two buffers, or waits for one.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "core/tensor.h"

namespace ni::cuda {

class WeightLoader {
 public:
  explicit WeightLoader(int device);
  ~WeightLoader();
  WeightLoader(const WeightLoader&) = delete;

  // dst[rows, dst_stride] of dst_dtype = src[rows, cols]; returns when it is there.
  void load(const Tensor& src, void* dst, DType dst_dtype, int64_t dst_stride);

 private:
  static constexpr size_t kMaxLanes = 8;
  static constexpr size_t kBufferBytes = 8 << 20;
  struct Lane;
  Lane* take();
  void give_back(Lane* lane);

  int device_;
  std::mutex mutex_;
  std::condition_variable free_changed_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<Lane*> free_;
};

}  // namespace ni::cuda
