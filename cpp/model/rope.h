// Cosines and sines of the rotary position embedding (Su et al., "RoFormer", 2021), one table a
// rope.
#pragma once

#include <cmath>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"

namespace ni {

class RopeTables {
 public:
  static size_t bytes(const ModelConfig& config, int max_positions) {
    size_t floats = 0;
    for (const RopeConfig& rope : config.ropes)
      floats += 2 * rope.inv_freq.size() * static_cast<size_t>(max_positions);
    return floats * sizeof(float);
  }

  RopeTables(const ModelConfig& config, int max_positions, Backend& backend)
      : config_(config), positions_(static_cast<size_t>(max_positions)) {
    std::vector<float> values;
    values.reserve(bytes(config, max_positions) / sizeof(float));
    for (const RopeConfig& rope : config.ropes) {
      for (const bool sine : {false, true}) {
        for (size_t p = 0; p < positions_; ++p) {
          for (const float f : rope.inv_freq) {
            // The angle is rounded to float as in the reference implementations.
            const float angle = static_cast<float>(p) * f;
            values.push_back((sine ? std::sin(angle) : std::cos(angle)) * rope.attention_factor);
          }
        }
      }
    }
    if (values.empty()) return;
    buffer_ = backend.alloc(values.size() * sizeof(float));
    backend.upload(values.data(), buffer_.data(), values.size() * sizeof(float));
  }

  // Tables of ropes[index]; index -1: none.
  RopeArgs args(int index) const {
    RopeArgs a;
    if (index < 0) return a;
    const auto* table = reinterpret_cast<const float*>(buffer_.data());
    size_t half = 0;
    for (int i = 0; i <= index; ++i) {
      half = config_.ropes[static_cast<size_t>(i)].inv_freq.size();
      if (i < index) table += 2 * half * positions_;
    }
    a.cos = table;
    a.sin = table + half * positions_;
    a.rotary_dim = static_cast<int32_t>(2 * half);
    return a;
  }

 private:
  const ModelConfig& config_;
  size_t positions_;
  Buffer buffer_;
};

}  // namespace ni
