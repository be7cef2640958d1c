#include "cpu/isa.h"

#include <cstdlib>

#include "core/check.h"

namespace ni {

extern const KernelTable kernels_portable, kernels_reference;
#if defined(__x86_64__)
extern const KernelTable kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#endif

namespace {

std::vector<const KernelTable*> find_usable() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&kernels_avx512_bf16);
  if (avx512) tables.push_back(&kernels_avx512);
  if (avx2) tables.push_back(&kernels_avx2);
#endif
  tables.push_back(&kernels_portable);
  tables.push_back(&kernels_reference);
  return tables;
}

}  // namespace

const std::vector<const KernelTable*>& usable_kernels() {
  static const std::vector<const KernelTable*> tables = find_usable();
  return tables;
}

const KernelTable& select_kernels(const std::string& name) {
  std::string wanted = name;
  const char* from = "isa";
  if (const char* env = std::getenv("NANO_INFERENCE_CPU_ISA"); wanted.empty() && env != nullptr) {
    wanted = env;
    from = "NANO_INFERENCE_CPU_ISA";
  }
  if (wanted.empty()) return *usable_kernels().front();
  std::string usable;
  for (const KernelTable* table : usable_kernels()) {
    if (wanted == table->isa) return *table;
    usable += (usable.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument(
      concat(from, " '", wanted, "' is unknown or not supported here; usable: ", usable));
}

}  // namespace ni
