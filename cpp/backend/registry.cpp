#include "backend/registry.h"

#include "core/check.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"

namespace ni {

std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options) {
  check_arg(device == "cpu", "unknown device '", device, "'; known: cpu");
  return std::make_unique<CpuBackend>(options);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_kernels()) names.emplace_back(table->isa);
  return names;
}

}  // namespace ni
