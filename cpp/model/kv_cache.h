// The memory of the paged cache: one allocation, [block][layer][K, V]…; the layout inside is
// KvView's. Blocks come first, so that memory which is touched for the first time, a page at a
// time, costs little in any one step. (With layers first, every layer enters a new page in the same
// step.)
#pragma once

#include "backend/backend.h"
#include "model/config.h"

namespace ni {

class KvCache {
 public:
  // block_size: a multiple of 16 or a power of two below.
  KvCache(const ModelConfig& config, DType dtype, int block_size);

  // Bytes of one block: K and V of all layers.
  size_t block_bytes() const;
  void allocate(Backend& backend, int num_blocks);
  KvView layer(size_t index) const;

 private:
  KvView view_;
  size_t num_layers_;
  Buffer buffer_;
};

}  // namespace ni
