// The paged KV cache's bookkeeping (Kwon et al., "Efficient Memory Management for Large Language
// Model Serving with PagedAttention", SOSP 2023), with prefix reuse. It sees tokens and block ids
// only.
//
// A block is free, referenced by one or more sequences, or cached: unreferenced, but its contents
// are known to the prefix cache and may be reused until it is evicted (least recently used first).
// Allocating and freeing one block is O(1).
//
// Prefix cache: a full block is found by a hash chained over all tokens before it. A hash may
// collide, so a hit also needs equal token ids, an equal parent (by identity, not by hash) and an
// equal salt. An identity is never used twice: when a block is evicted, cached blocks that continue
// it can no longer be found, and are evicted in their turn.
//
// Cost: allocate, free and evict are O(1) on arrays and allocate no memory; finding or committing a
// block is one hash of its tokens and one probe. Nothing depends on the number of blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/sequence.h"

namespace ni {

// Hash of `count` tokens after a prefix whose hash is `parent`.
using BlockHash = std::function<uint64_t(uint64_t parent, const int32_t* tokens, int count)>;
uint64_t default_block_hash(uint64_t parent, const int32_t* tokens, int count);

struct BlockManagerConfig {
  int num_blocks = 0;
  int block_size = 16;
  bool enable_prefix_caching = true;
  BlockHash hash = default_block_hash;  // replaceable, so that a test can make every block collide
};

struct BlockManagerStats {
  int num_blocks = 0;
  int num_free = 0;             // neither referenced nor cached
  int num_cached = 0;           // unreferenced, contents known
  int num_used = 0;             // referenced
  uint64_t prefix_queries = 0;  // tokens looked up by take_prefix
  uint64_t prefix_hits = 0;     // tokens found by it
  uint64_t evictions = 0;
  uint64_t copies = 0;  // copy-on-write copies
};

class BlockManager {
 public:
  explicit BlockManager(BlockManagerConfig config);
  // Another number of blocks, all of them free. Before anything was handed out.
  void resize(int num_blocks);

  int block_size() const { return config_.block_size; }
  int num_blocks() const { return config_.num_blocks; }
  // Blocks that can be handed out now: free and cached.
  int num_available() const { return num_available_; }
  // ceil(num_tokens / block_size)
  int blocks_for(int num_tokens) const {
    return num_tokens / config_.block_size + (num_tokens % config_.block_size != 0);
  }
  // Sequences that hold the block.
  int ref_count(int32_t block) const { return ref_counts_[static_cast<size_t>(block)]; }

  // Cached tokens at the front of the sequence: whole blocks, at most num_tokens - 1 tokens (one
  // row must be computed to get logits). Changes nothing.
  int lookup_prefix(const Sequence& seq) const;
  // Takes the cached prefix into an empty block table; sets num_computed. Returns its tokens.
  int take_prefix(Sequence& seq);
  // Undoes take_prefix of a sequence that cannot start after all; the statistics forget it, too.
  void return_prefix(Sequence& seq);
  // Changes whenever a block becomes available or cached: what was impossible may be possible now.
  uint64_t version() const { return version_; }

  // New blocks that `grow` would need, a copy of a shared last block included.
  int blocks_needed(const Sequence& seq, int num_tokens) const;
  // Makes the block table cover num_tokens slots, all writable from num_computed on: a shared block
  // there is replaced by a fresh one and the copy appended to `copies`. False, and nothing changed,
  // if blocks are lacking.
  bool grow(Sequence& seq, int num_tokens, std::vector<BlockCopy>& copies);
  // Lets the child, which holds none, share all blocks of the parent.
  void fork(const Sequence& parent, Sequence& child);
  // The step that wrote the first num_computed tokens has succeeded: full blocks enter the prefix
  // cache. If equal contents are already there, the block stays private and the chain goes on from
  // the cached one.
  void commit(Sequence& seq);
  // Drops the blocks beyond num_tokens slots (rejected drafts); committed ones must not be among
  // them.
  void shrink(Sequence& seq, int num_tokens);
  // Gives all blocks back and sets num_computed to 0. Cached ones go to the young end of the LRU
  // list, last block first, so that a tail is evicted before what it continues.
  void free(Sequence& seq);
  // Forgets all cached contents. Throws std::logic_error while blocks are referenced.
  void reset_prefix_cache();

  BlockManagerStats stats() const;
  // Throws std::logic_error naming what is inconsistent. `sequences`: all that hold blocks.
  void check_invariants(const std::vector<const Sequence*>& sequences) const;

 private:
  const uint64_t hash_seed_;  // of this process: nobody can prepare prompts that all collide
  uint64_t version_ = 0;
  static constexpr int32_t kNone = -1;
  struct alignas(32) Block {             // never across two cache lines
    int32_t prev = kNone, next = kNone;  // in the list of available blocks
    uint32_t hash = 0;                   // low half; where it is in the table
    uint64_t id = 0;      // identity of its cached contents; 0: not in the prefix cache
    uint64_t parent = 0;  // identity of the contents before it; 0: it is a first block
  };
  // Of the prefix cache's table: open addressing, linear probing.
  struct Entry {
    uint32_t hash = 0;
    int32_t block = kNone;  // kNone: empty
  };
  // A place in a chain of contents: what comes before the next block.
  struct Link {
    uint64_t id;
    uint64_t hash;
  };

  Block& at(int32_t block) { return blocks_[static_cast<size_t>(block)]; }
  const Block& at(int32_t block) const { return blocks_[static_cast<size_t>(block)]; }
  int32_t* tokens_of(int32_t block) const;
  size_t home_of(uint32_t hash) const { return hash & (table_.size() - 1); }
  size_t after(size_t place) const { return (place + 1) & (table_.size() - 1); }

  void commit_full_blocks(Sequence& seq);
  int32_t allocate();
  void prefetch(int32_t block) const;
  void acquire(int32_t block);
  void release(int32_t block);
  void unlink(int32_t block);
  void link_between(int32_t block, int32_t prev, int32_t next);

  Link root(const Sequence& seq) const;
  uint64_t hash_of(const Link& parent, const Sequence& seq, int index) const;
  int32_t find(uint64_t hash, const Link& parent, const Sequence& seq, int index) const;
  bool holds(int32_t block, const Link& parent, const Sequence& seq, int index) const;
  void remember(int32_t block, uint64_t hash, const Link& parent, const Sequence& seq, int index);
  void forget(int32_t block);
  template <typename Visit>
  int walk_prefix(const Sequence& seq, Visit visit) const;
  void check_available_list() const;
  void check_prefix_cache() const;

  BlockManagerConfig config_;
  std::vector<int32_t> ref_counts_;  // apart from Block: read for every sequence in every step
  std::vector<Block> blocks_;  // the last is the sentinel of the circular list of available blocks:
                               // free ones first, then cached ones, least recently used first
  std::vector<Entry> table_;   // the size is a power of two, at least twice num_blocks
  std::unique_ptr<int32_t[]>
      tokens_;  // [num_blocks, block_size] of cached blocks, for the comparison
  std::unordered_map<int32_t, std::string> salts_;  // of cached first blocks that have one
  int num_available_ = 0;
  int num_cached_ = 0;  // available and in the prefix cache
  uint64_t next_id_ = 1;
  BlockManagerStats counters_;
};

// Inline: asked for every sequence in every step. Products, because a division costs more.
inline int BlockManager::blocks_needed(const Sequence& seq, int num_tokens) const {
  const int size = config_.block_size;
  const int held = static_cast<int>(seq.block_table.size());
  int needed = 0, writable = held;
  if (int64_t{held} * size < num_tokens) {
    needed = blocks_for(num_tokens) - held;
  } else {
    while (int64_t{writable - 1} * size >= num_tokens) --writable;
  }
  for (int i = writable - 1; i >= 0 && int64_t{i + 1} * size > seq.num_computed; --i)
    needed += ref_count(seq.block_table[static_cast<size_t>(i)]) > 1;
  return needed;
}

inline void BlockManager::commit(Sequence& seq) {
  if (seq.num_computed - seq.num_committed_blocks * config_.block_size >= config_.block_size)
    commit_full_blocks(seq);
}

}  // namespace ni
