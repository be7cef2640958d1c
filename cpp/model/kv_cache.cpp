#include "model/kv_cache.h"

#include "core/check.h"

namespace ni {

KvCache::KvCache(const ModelConfig& config, DType dtype, int block_size, int k_tile)
    : num_layers_(config.layers.size()) {
  const bool valid = block_size > 0 && (block_size % 16 == 0 || 16 % block_size == 0);
  check_arg(valid, "block_size must be 1, 2, 4, 8 or a multiple of 16, got ", block_size);
  view_.dtype = dtype;
  view_.block_size = block_size;
  view_.num_kv_heads = config.num_kv_heads;
  view_.head_dim = config.head_dim;
  view_.k_tile = k_tile;
  view_.block_stride = 2 * static_cast<int64_t>(num_layers_) * view_.block_elements();
}

size_t KvCache::block_bytes() const {
  return num_layers_ * static_cast<size_t>(view_.block_bytes());
}

void KvCache::allocate(Backend& backend, int num_blocks) {
  view_.num_blocks = num_blocks;
  buffer_ = Buffer();
  buffer_ = backend.alloc(block_bytes() * static_cast<size_t>(num_blocks));
}

KvView KvCache::layer(size_t index) const {
  const size_t half = static_cast<size_t>(view_.block_bytes()) / 2;
  KvView view = view_;
  view.k = buffer_.data() + 2 * half * index;
  view.v = buffer_.data() + 2 * half * index + half;
  return view;
}

}  // namespace ni
