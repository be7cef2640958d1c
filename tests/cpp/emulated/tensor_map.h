// What a CUtensorMap says.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

namespace ni::emulated {

struct TensorMap {
  const unsigned char* data;
  int64_t element_bytes;
  std::vector<int64_t> sizes, strides, boxes;  // strides: from the second dimension on, bytes
};
const TensorMap& tensor_map(const CUtensorMap& map);

}  // namespace ni::emulated
