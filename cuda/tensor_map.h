// Descriptions of 16-bit matrices in global memory for Hopper's copy engine (PTX ISA, tensor maps).
#pragma once

#include <cuda.h>

#include <initializer_list>

#include "core/types.h"

namespace ni::cuda {

// sizes: elements of each dimension, innermost first; strides: bytes between neighbours in each
// dimension but the innermost, multiples of 16; boxes: elements that one copy brings, 64 (128
// bytes) in the innermost. What lies outside is read as zero. In shared memory the 16-byte chunks
// of each 128 bytes are permuted: chunk c of row r stands at c ^ r % 8.
CUtensorMap make_tensor_map(const char* what, DType dtype, const void* data,
                            std::initializer_list<int64_t> sizes,
                            std::initializer_list<int64_t> strides,
                            std::initializer_list<int64_t> boxes);

}  // namespace ni::cuda
