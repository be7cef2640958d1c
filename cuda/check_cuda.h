// Checked calls of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include "core/check.h"

namespace ni::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // it is told here, and not to the next launch that asks
  throw std::runtime_error(
      concat(what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")"));
}

// After a launch: a wrong configuration is known at once, a fault inside the kernel later.
inline void check_launch(const char* kernel) {
  check_cuda(cudaGetLastError(), kernel);
}

}  // namespace ni::cuda
