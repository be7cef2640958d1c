// Which backends there are.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace ni {

// device: "cpu". Throws std::invalid_argument naming the known devices or instruction sets.
std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options);

// Instruction sets of the CPU backend that this machine can run, best first; "reference" is last.
std::vector<std::string> cpu_isas();

}  // namespace ni
