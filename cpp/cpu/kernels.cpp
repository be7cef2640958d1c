// One table of kernels; compiled once per instruction set with NI_ISA and NI_ISA_<name> defined.
// No std templates and no shared inline functions here: the objects must hold no weak symbols.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own intrinsics' "undefined" operands.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/kernels.h"

#if defined(NI_ISA_reference)
#include "cpu/kernels_reference.h"
#else
#include "cpu/kernels_attention.h"
#include "cpu/kernels_linear.h"
#include "cpu/kernels_rows.h"
#endif

#define NI_CONCAT_(a, b) a##b
#define NI_CONCAT(a, b) NI_CONCAT_(a, b)
#define NI_STRING_(a) #a
#define NI_STRING(a) NI_STRING_(a)

namespace ni {

extern const KernelTable NI_CONCAT(kernels_, NI_ISA);
const KernelTable NI_CONCAT(kernels_, NI_ISA) = {
    .isa = NI_STRING(NI_ISA),
    .block_rows = kBlockRows,
    .bf16_dot = kBf16Dot,
    .pack_rows = pack_rows,
    .linear = linear,
    .attention = attention,
    .norm = norm,
    .rotate = rotate,
    .activation = activation,
    .scale = scale,
    .load_floats = load_floats,
    .store_floats = store_floats,
    .max = max,
    .exp_sum = exp_sum,
};

}  // namespace ni
