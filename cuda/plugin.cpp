// What the plug-in library exports; cpp/backend/registry.cpp loads it. Only std:: exceptions cross
// this border.
#include <cuda_runtime_api.h>

#include <cstring>

#include "backend/registry.h"
#include "cuda/build_target.h"
#include "cuda/cuda_backend.h"

#define NI_EXPORT extern "C" __attribute__((visibility("default")))

NI_EXPORT uint64_t ni_backend_abi() {
  return ni::backend_abi();
}

// Names of the cards, one a line, or why there are none: returns whether `text` is the names.
NI_EXPORT bool ni_device_names(char* text, size_t bytes) {
  std::string out;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  bool found = error == cudaSuccess && count > 0;
  if (found) {
    std::string unusable;
    for (int i = 0; i < count; ++i) {  // every index has its line
      cudaDeviceProp properties{};
      if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) properties = {};
      out = ni::concat(out, i > 0 ? "\n" : "", properties.name);
      const std::string why = ni::cuda::why_not_usable(properties.name, properties.major,
                                                       properties.minor, NI_CUDA_TARGETS);
      if (!why.empty()) unusable = why;
    }
    found = unusable.empty();  // a mixed machine: CUDA_VISIBLE_DEVICES leaves the others
    if (!found) out = unusable;
  } else if (error == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const auto version = [](int v) { return ni::concat(v / 1000, ".", v % 1000 / 10); };
    out = driver == 0 ? "no NVIDIA driver is installed (libcuda.so.1 is missing)"
                      : ni::concat("the NVIDIA driver supports CUDA ", version(driver),
                                   ", this build needs ", version(runtime));
  } else {
    out = error == cudaSuccess || error == cudaErrorNoDevice ? "no NVIDIA card was found"
                                                             : cudaGetErrorString(error);
  }
  std::strncpy(text, out.c_str(), bytes - 1);
  text[bytes - 1] = '\0';
  return found;
}

NI_EXPORT ni::Backend* ni_create_backend(const ni::BackendOptions* options) {
  return new ni::cuda::CudaBackend(*options);
}

NI_EXPORT void ni_set_stream(ni::Backend* backend, void* stream) {
  static_cast<ni::cuda::CudaBackend*>(backend)->set_stream(stream);
}
