// The step trace: what every step did and why, in a ring of bounded size. The engine thread writes,
// anybody reads. Records of a run can be replayed: the block tables at any step follow from the
// blocks of the entries until then.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "engine/scheduler.h"

namespace ni {

struct StepRecord {
  struct Entry {
    uint64_t request_id = 0;
    int choice = 0;
    int num_query = 0;    // rows of this step
    int context_len = 0;  // tokens in the cache after it
    int num_samples = 0;
    bool is_decode = false;
    // Its sequence had ended by the time the step's results came (overlap, see scheduler.h): it got
    // nothing, and its blocks may have been somebody else's already.
    bool in_vain = false;
    // Blocks [first_block, …) of its table: all when it was admitted, resumed or forked, else from
    // the first that this step writes to. They are blocks[blocks_begin, blocks_end) of the record.
    int first_block = 0;
    int blocks_begin = 0, blocks_end = 0;
  };
  struct Finished {
    uint64_t request_id = 0;
    int choice = 0;
    FinishReason reason = FinishReason::none;
  };
  uint64_t step = 0;                        // counts from 1
  double start_time = 0.0, end_time = 0.0;  // seconds, steady clock
  bool failed = false;
  int num_tokens = 0, num_decodes = 0;
  int num_running = 0, num_waiting = 0;  // sequences, after the step
  int blocks_free = 0, blocks_cached = 0, blocks_used = 0;
  std::vector<Entry> entries;
  std::vector<int32_t> blocks;  // of all entries
  std::vector<StepPlan::Event> admitted, resumed, preempted;
  std::vector<BlockCopy> copies;
  std::vector<Finished> finished;  // by this step, or aborted since the record before

  std::span<const int32_t> blocks_of(const Entry& e) const {
    return {blocks.data() + e.blocks_begin, static_cast<size_t>(e.blocks_end - e.blocks_begin)};
  }
};

class Trace {
 public:
  explicit Trace(size_t capacity) : ring_(capacity) {}
  bool enabled() const { return !ring_.empty(); }

  // Takes the record and gives an old one in exchange, whose vectors keep their capacity.
  void push(StepRecord& record);
  // Records with step >= since, oldest first. Holds the lock for one record at a time, so that the
  // engine never waits for a reader.
  std::vector<StepRecord> read(uint64_t since) const;

 private:
  mutable std::mutex mutex_;
  std::vector<StepRecord> ring_;
  size_t next_ = 0;
  size_t size_ = 0;
};

}  // namespace ni
