#include "backend/registry.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>

#include "core/check.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"

namespace ni {
namespace {

constexpr const char* kCudaLibrary = "libnano_inference_cuda.so";

// The plug-in: what it exports, or why it cannot be used. It is never unloaded: buffers point into
// its code.
struct CudaPlugin {
  Backend* (*create)(const BackendOptions*) = nullptr;
  void (*set_stream)(Backend*, void*) = nullptr;
  std::vector<std::string> devices;
  std::string error;

  CudaPlugin() {
    const std::string path = library_path();
    if (!std::filesystem::exists(path)) {
      error = concat("this build has no CUDA backend (", path,
                     " does not exist); install where nvcc and the cuBLAS headers are found");
      return;
    }
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      error = concat("the CUDA backend cannot be loaded: ", dlerror(),
                     " (cuBLAS: pip install nvidia-cublas)");
      return;
    }
    const auto abi = symbol<uint64_t (*)()>(library, "ni_backend_abi");
    const auto names = symbol<bool (*)(char*, size_t)>(library, "ni_device_names");
    create = symbol<decltype(create)>(library, "ni_create_backend");
    set_stream = symbol<decltype(set_stream)>(library, "ni_set_stream");
    if (abi == nullptr || names == nullptr || create == nullptr || set_stream == nullptr ||
        abi() != backend_abi()) {
      error = concat(path, " was built for another version of nano-inference");
      return;
    }
    std::vector<char> text(4096);
    if (!names(text.data(), text.size())) {
      error = text.data();
      return;
    }
    std::istringstream lines(text.data());
    for (std::string line; std::getline(lines, line);) devices.push_back(line);
  }

  template <typename F>
  static F symbol(void* library, const char* name) {
    return reinterpret_cast<F>(dlsym(library, name));
  }

  // Beside the library or program that this code is linked into; $NANO_INFERENCE_CUDA_LIBRARY names
  // another place.
  static std::string library_path() {
    if (const char* path = std::getenv("NANO_INFERENCE_CUDA_LIBRARY")) return path;
    Dl_info self{};
    if (dladdr(reinterpret_cast<const void*>(&cpu_isas), &self) == 0) return kCudaLibrary;
    return (std::filesystem::path(self.dli_fname).parent_path() / kCudaLibrary).string();
  }
};

const CudaPlugin& cuda_plugin() {
  static const CudaPlugin plugin;
  return plugin;
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options) {
  if (device == "cuda") {
    check_runtime(cuda_error().empty(), "CUDA cannot be used: ", cuda_error());
    return std::unique_ptr<Backend>(cuda_plugin().create(&options));
  }
  check_arg(device == "cpu", "unknown device '", device, "'; known: cpu, cuda");
  return std::make_unique<CpuBackend>(options);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_kernels()) names.emplace_back(table->isa);
  return names;
}

std::vector<std::string> cuda_device_names() {
  return cuda_plugin().devices;
}

std::string cuda_error() {
  return cuda_plugin().error;
}

void set_stream(Backend& backend, void* stream) {
  if (backend.info().device == "cuda") cuda_plugin().set_stream(&backend, stream);
}

}  // namespace ni
