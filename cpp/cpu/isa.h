// Choice of the instruction set, once per backend.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace ni {

// Tables that this machine can run, best first; "reference" is last.
const std::vector<const KernelTable*>& usable_kernels();

// name "": the environment variable NANO_INFERENCE_CPU_ISA if set, else the best. Throws
// std::invalid_argument listing the usable ones.
const KernelTable& select_kernels(const std::string& name);

}  // namespace ni
