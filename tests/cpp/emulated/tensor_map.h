// What the emulated driver writes into a CUtensorMap.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace ni::emulated {

struct TensorMap {
  const unsigned char* data;
  int32_t element_bytes, rank;
  int64_t sizes[5], strides[4];  // strides: from the second dimension on, bytes
  int32_t boxes[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace ni::emulated
