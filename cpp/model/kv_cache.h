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
  // block_size: a multiple of 16 or a power of two below. k_tile: the backend's (BackendInfo).
  KvCache(const ModelConfig& config, DType dtype, int block_size, int k_tile);

  // Bytes of one block: K and V of all layers.
  size_t block_bytes() const;
  // Gives back what it had before, then allocates: addresses may change.
  void allocate(Backend& backend, int num_blocks);
  KvView layer(size_t index) const;
  // A layer's view without memory.
  const KvView& view() const { return view_; }

 private:
  KvView view_;
  size_t num_layers_;
  Buffer buffer_;
};

}  // namespace ni
