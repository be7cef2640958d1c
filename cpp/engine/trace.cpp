#include "engine/trace.h"

#include <utility>

namespace ni {

void Trace::push(StepRecord& record) {
  const std::lock_guard lock(mutex_);
  std::swap(ring_[next_], record);
  next_ = (next_ + 1) % ring_.size();
  if (size_ < ring_.size()) ++size_;
}

std::vector<StepRecord> Trace::read(uint64_t since) const {
  std::vector<StepRecord> out;
  while (out.size() < ring_.size()) {  // records may come as fast as they are read
    const std::lock_guard lock(mutex_);
    if (size_ == 0) return out;
    const size_t oldest = (next_ + ring_.size() - size_) % ring_.size();
    const uint64_t first = ring_[oldest].step;  // steps are consecutive
    const uint64_t skip = since > first ? since - first : 0;
    if (skip >= size_) return out;
    out.push_back(ring_[(oldest + skip) % ring_.size()]);
    since = out.back().step + 1;
  }
  return out;
}

}  // namespace ni
