// Descriptions of arrays in global memory for Hopper's copy engine (PTX ISA, tensor maps).
#pragma once

#include <cuda.h>

#include <initializer_list>

#include "core/types.h"

namespace ni::cuda {

// sizes: elements of each dimension, innermost first; strides: bytes between neighbours in each
// dimension but the innermost, multiples of 16; boxes: elements that one copy brings, in the
// innermost 128, 64 or 32 bytes. What lies outside is read as zero. In shared memory the 16-byte
// chunks of each such row are permuted: chunk c of row r stands at c ^ x, where x is r % 8 for 128
// bytes, r / 2 % 4 for 64 and r / 4 % 2 for 32.
CUtensorMap make_tensor_map(const char* what, DType dtype, const void* data,
                            std::initializer_list<int64_t> sizes,
                            std::initializer_list<int64_t> strides,
                            std::initializer_list<int64_t> boxes);

}  // namespace ni::cuda
