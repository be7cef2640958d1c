// Which backends there are. The CUDA backend is a library of its own beside this one, loaded the
// first time that somebody asks for it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace ni {

// device: "cpu" or "cuda". Throws std::invalid_argument naming the known devices or instruction
// sets, std::runtime_error with cuda_error() where CUDA cannot be used.
std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options);

// Instruction sets of the CPU backend that this machine can run, best first; "reference" is last.
std::vector<std::string> cpu_isas();

// Names of the cards that the CUDA backend can use, by index; empty: cuda_error() says why.
std::vector<std::string> cuda_device_names();
// What is missing for the CUDA backend, in a sentence; empty: nothing.
std::string cuda_error();

// The stream (cudaStream_t) on which a CUDA backend's operators run from now on, for guests that
// have their own. Other backends have none: no effect.
void set_stream(Backend& backend, void* stream);

// A number that differs when a plug-in was built against another contract.
constexpr uint64_t backend_abi() {
  return 5 + (sizeof(BackendOptions) << 8) + (sizeof(BackendInfo) << 20) +
         (sizeof(StepInputs) << 32) + (sizeof(KvView) << 44);
}

}  // namespace ni
