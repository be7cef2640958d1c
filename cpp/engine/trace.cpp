#include "engine/trace.h"

#include <utility>

namespace ni {

void Trace::push() {
  const std::lock_guard lock(mutex_);
  std::swap(ring_[next_], scratch_);
  next_ = (next_ + 1) % ring_.size();
  if (size_ < ring_.size()) ++size_;
}

std::vector<StepRecord> Trace::read(uint64_t since) const {
  const std::lock_guard lock(mutex_);
  std::vector<StepRecord> out;
  for (size_t i = 0; i < size_; ++i) {
    const StepRecord& record = ring_[(next_ + ring_.size() - size_ + i) % ring_.size()];
    if (record.step >= since) out.push_back(record);
  }
  return out;
}

}  // namespace ni
