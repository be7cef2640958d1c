#include "engine/block_manager.h"

#include <bit>
#include <cstring>
#include <random>
#include <utility>

#include "core/check.h"

namespace ni {

namespace {

uint64_t mix(uint64_t h, uint64_t value) {
  h = (h ^ value) * 0x9E3779B97F4A7C15ull;
  return h ^ (h >> 32);
}

// The salt continues the chain from `h`. Any function will do: a hit compares the salts themselves.
uint64_t salt_seed(const std::string& salt, uint64_t h) {
  for (const char c : salt) h = mix(h, static_cast<unsigned char>(c));
  return h;
}

}  // namespace

uint64_t default_block_hash(uint64_t parent, const int32_t* tokens, int count) {
  uint64_t h = parent;
  for (int i = 0; i < count; ++i) h = mix(h, static_cast<uint32_t>(tokens[i]));
  return h;
}

BlockManager::BlockManager(BlockManagerConfig config)
    : hash_seed_(std::random_device{}() | uint64_t{std::random_device{}()} << 32),
      config_(std::move(config)) {
  check_arg(config_.block_size >= 1, "block_size must be at least 1, got ", config_.block_size);
  check_arg(config_.hash != nullptr, "the block hash must not be empty");
  resize(config_.num_blocks);
}

void BlockManager::resize(int num_blocks) {
  check_arg(num_blocks >= 1, "num_blocks must be at least 1, got ", num_blocks);
  check_invariant(next_id_ == 1 && std::count(ref_counts_.begin(), ref_counts_.end(), 0) ==
                                       static_cast<ptrdiff_t>(ref_counts_.size()),
                  "the number of blocks cannot change once they are used");
  config_.num_blocks = num_blocks;
  const auto n = static_cast<size_t>(num_blocks);
  ref_counts_.assign(n, 0);
  blocks_.assign(n + 1, Block());
  const int32_t sentinel = config_.num_blocks;
  at(sentinel).prev = at(sentinel).next = sentinel;
  for (int32_t b = 0; b < sentinel; ++b) link_between(b, at(sentinel).prev, sentinel);
  num_available_ = config_.num_blocks;
  if (config_.enable_prefix_caching) {
    table_.assign(std::bit_ceil(2 * n), Entry());
    tokens_ =
        std::make_unique_for_overwrite<int32_t[]>(n * static_cast<size_t>(config_.block_size));
  }
}

// -- The list of available blocks -------------------------------------------------------------

void BlockManager::link_between(int32_t block, int32_t prev, int32_t next) {
  at(block).prev = prev;
  at(block).next = next;
  at(prev).next = block;
  at(next).prev = block;
}

void BlockManager::unlink(int32_t block) {
  at(at(block).prev).next = at(block).next;
  at(at(block).next).prev = at(block).prev;
  at(block).prev = at(block).next = kNone;
}

// The caller has checked that there is one.
int32_t BlockManager::allocate() {
  const int32_t block = blocks_.back().next;
  check_invariant(block != config_.num_blocks, "no block is available");
  unlink(block);
  --num_available_;
  ref_counts_[static_cast<size_t>(block)] = 1;
  if (at(block).id != 0) {
    --num_cached_;
    ++counters_.evictions;
    forget(block);
  }
  prefetch(blocks_.back().next);
  return block;
}

// The next block to be handed out is known long before it is wanted. With many blocks its lines are
// in none of the caches, and loading them one after the other would be most of the cost of a new
// block.
void BlockManager::prefetch(int32_t block) const {
  if (block == config_.num_blocks) return;
  const Block& next = at(block);
  __builtin_prefetch(&at(next.next), 1);
  __builtin_prefetch(&ref_counts_[static_cast<size_t>(block)], 1);
  if (!config_.enable_prefix_caching) return;
  __builtin_prefetch(&table_[home_of(next.hash)], 1);
}

void BlockManager::acquire(int32_t block) {
  if (ref_counts_[static_cast<size_t>(block)]++ > 0) return;
  unlink(block);
  --num_available_;
  --num_cached_;  // an unreferenced block can only be found through the prefix cache
}

void BlockManager::release(int32_t block) {
  if (--ref_counts_[static_cast<size_t>(block)] > 0) return;
  const int32_t sentinel = config_.num_blocks;
  ++num_available_;
  ++version_;
  if (at(block).id != 0) {
    ++num_cached_;
    link_between(block, at(sentinel).prev, sentinel);
  } else {
    link_between(block, sentinel, at(sentinel).next);
  }
}

// -- The prefix cache -------------------------------------------------------------------------

int32_t* BlockManager::tokens_of(int32_t block) const {
  return tokens_.get() + static_cast<size_t>(block) * static_cast<size_t>(config_.block_size);
}

BlockManager::Link BlockManager::root(const Sequence& seq) const {
  return {0, salt_seed(seq.request->cache_salt, hash_seed_)};
}

uint64_t BlockManager::hash_of(const Link& parent, const Sequence& seq, int index) const {
  const int32_t* tokens = seq.tokens.data() + static_cast<ptrdiff_t>(index) * config_.block_size;
  return config_.hash(parent.hash, tokens, config_.block_size);
}

// The cached block with the contents of the sequence's block `index`, or kNone.
int32_t BlockManager::find(uint64_t hash, const Link& parent, const Sequence& seq,
                           int index) const {
  const auto low = static_cast<uint32_t>(hash);
  for (size_t i = home_of(low); table_[i].block != kNone; i = after(i))
    if (table_[i].hash == low && holds(table_[i].block, parent, seq, index)) return table_[i].block;
  return kNone;
}

// Are these the contents? The hash has only suggested it.
bool BlockManager::holds(int32_t block, const Link& parent, const Sequence& seq, int index) const {
  if (at(block).parent != parent.id) return false;
  const auto count = static_cast<size_t>(config_.block_size);
  const int32_t* tokens = seq.tokens.data() + static_cast<size_t>(index) * count;
  if (std::memcmp(tokens_of(block), tokens, count * sizeof(int32_t)) != 0) return false;
  if (parent.id != 0) return true;  // the parent's identity implies the salt
  const auto salt = salts_.find(block);
  const std::string& wanted = seq.request->cache_salt;
  return salt == salts_.end() ? wanted.empty() : salt->second == wanted;
}

void BlockManager::remember(int32_t block, uint64_t hash, const Link& parent, const Sequence& seq,
                            int index) {
  const auto count = static_cast<size_t>(config_.block_size);
  std::memcpy(tokens_of(block), seq.tokens.data() + static_cast<size_t>(index) * count,
              count * sizeof(int32_t));
  if (parent.id == 0 && !seq.request->cache_salt.empty()) salts_[block] = seq.request->cache_salt;
  Block& b = at(block);
  b.id = next_id_++;
  ++version_;
  b.parent = parent.id;
  b.hash = static_cast<uint32_t>(hash);
  size_t place = home_of(b.hash);
  while (table_[place].block != kNone) place = after(place);
  table_[place] = {b.hash, block};
}

void BlockManager::forget(int32_t block) {
  size_t hole = home_of(at(block).hash);
  while (table_[hole].block != block) hole = after(hole);
  // Entries behind the hole move up, unless that would put them before their home.
  const size_t mask = table_.size() - 1;
  for (size_t i = after(hole); table_[i].block != kNone; i = after(i)) {
    if (((i - home_of(table_[i].hash)) & mask) < ((i - hole) & mask)) continue;
    table_[hole] = table_[i];
    hole = i;
  }
  table_[hole].block = kNone;
  if (at(block).parent == 0 && !salts_.empty()) salts_.erase(block);
  at(block).id = 0;
}

// Calls visit(block, hash) for each cached block at the front of the sequence; returns their
// number.
template <typename Visit>
int BlockManager::walk_prefix(const Sequence& seq, Visit visit) const {
  if (!config_.enable_prefix_caching || seq.tokens.empty()) return 0;
  const int most = (seq.num_tokens() - 1) / config_.block_size;
  Link parent = root(seq);
  for (int i = 0; i < most; ++i) {
    const uint64_t hash = hash_of(parent, seq, i);
    const int32_t block = find(hash, parent, seq, i);
    if (block == kNone) return i;
    visit(block, hash);
    parent = {at(block).id, hash};
  }
  return most;
}

int BlockManager::lookup_prefix(const Sequence& seq) const {
  return walk_prefix(seq, [](int32_t, uint64_t) {}) * config_.block_size;
}

int BlockManager::take_prefix(Sequence& seq) {
  check_invariant(seq.block_table.empty(), "a prefix needs an empty block table");
  if (!config_.enable_prefix_caching) return 0;
  const int found = walk_prefix(seq, [&](int32_t block, uint64_t hash) {
    acquire(block);
    seq.block_table.push_back(block);
    seq.committed_id = at(block).id;
    seq.committed_hash = hash;
  });
  seq.num_committed_blocks = found;
  seq.num_computed = found * config_.block_size;
  counters_.prefix_queries += static_cast<uint64_t>(seq.num_tokens());
  counters_.prefix_hits += static_cast<uint64_t>(seq.num_computed);
  return seq.num_computed;
}

void BlockManager::return_prefix(Sequence& seq) {
  if (!config_.enable_prefix_caching) return;
  counters_.prefix_queries -= static_cast<uint64_t>(seq.num_tokens());
  counters_.prefix_hits -= static_cast<uint64_t>(seq.num_computed);
  const uint64_t before = version_;
  free(seq);
  version_ = before;  // nothing has changed since the prefix was taken
}

void BlockManager::commit_full_blocks(Sequence& seq) {
  if (!config_.enable_prefix_caching) return;
  const int full = seq.num_computed / config_.block_size;
  for (int i = seq.num_committed_blocks; i < full; ++i) {
    int32_t block = seq.block_table[static_cast<size_t>(i)];
    const Link parent = i == 0 ? root(seq) : Link{seq.committed_id, seq.committed_hash};
    const uint64_t hash = hash_of(parent, seq, i);
    if (at(block).id == 0) {  // else a fork that shares it was faster
      const int32_t found = find(hash, parent, seq, i);
      if (found == kNone) {
        remember(block, hash, parent, seq, i);
      } else {
        block = found;
      }
    }
    seq.committed_id = at(block).id;
    seq.committed_hash = hash;
    seq.num_committed_blocks = i + 1;
  }
}

void BlockManager::reset_prefix_cache() {
  check_invariant(num_available_ == config_.num_blocks,
                  "the prefix cache cannot be reset while blocks are referenced");
  for (Block& block : blocks_) block.id = 0;
  std::fill(table_.begin(), table_.end(), Entry{});
  salts_.clear();
  num_cached_ = 0;
}

// -- Block tables -----------------------------------------------------------------------------

bool BlockManager::grow(Sequence& seq, int num_tokens, std::vector<BlockCopy>& copies) {
  if (blocks_needed(seq, num_tokens) > num_available_) return false;
  const int held = static_cast<int>(seq.block_table.size());
  const int wanted = blocks_for(num_tokens);
  for (int i = seq.num_computed / config_.block_size; i < std::min(held, wanted); ++i) {
    int32_t& block = seq.block_table[static_cast<size_t>(i)];
    if (ref_count(block) == 1) continue;
    const int32_t fresh = allocate();
    if (i * config_.block_size < seq.num_computed) {  // else it holds nothing yet
      copies.push_back({block, fresh});
      ++counters_.copies;
    }
    release(std::exchange(block, fresh));
  }
  for (int i = held; i < wanted; ++i) seq.block_table.push_back(allocate());
  return true;
}

void BlockManager::fork(const Sequence& parent, Sequence& child) {
  check_invariant(child.block_table.empty(), "a fork needs an empty block table");
  for (const int32_t block : parent.block_table) {
    acquire(block);
    child.block_table.push_back(block);
  }
  child.num_computed = parent.num_computed;
  child.num_committed_blocks = parent.num_committed_blocks;
  child.committed_id = parent.committed_id;
  child.committed_hash = parent.committed_hash;
}

void BlockManager::shrink(Sequence& seq, int num_tokens) {
  const auto keep = static_cast<size_t>(blocks_for(num_tokens));
  check_invariant(keep >= static_cast<size_t>(seq.num_committed_blocks),
                  "committed blocks cannot be dropped");
  while (seq.block_table.size() > keep) {
    release(seq.block_table.back());
    seq.block_table.pop_back();
  }
}

void BlockManager::free(Sequence& seq) {
  while (!seq.block_table.empty()) {
    release(seq.block_table.back());
    seq.block_table.pop_back();
  }
  seq.num_computed = 0;
  seq.num_committed_blocks = 0;
  seq.committed_id = seq.committed_hash = 0;
}

BlockManagerStats BlockManager::stats() const {
  BlockManagerStats s = counters_;
  s.num_blocks = config_.num_blocks;
  s.num_cached = num_cached_;
  s.num_free = num_available_ - num_cached_;
  s.num_used = config_.num_blocks - num_available_;
  return s;
}

// -- Invariants -------------------------------------------------------------------------------

void BlockManager::check_available_list() const {
  const int32_t sentinel = config_.num_blocks;
  int available = 0, cached = 0;
  for (int32_t b = at(sentinel).next; b != sentinel; b = at(b).next) {
    check_invariant(++available <= config_.num_blocks, "the list of available blocks has a cycle");
    check_invariant(at(at(b).next).prev == b && at(at(b).prev).next == b,
                    "the list of available blocks is broken");
    check_invariant(ref_count(b) == 0, "a referenced block is listed as available");
    check_invariant(at(b).id != 0 || cached == 0, "a free block lies behind a cached one");
    cached += at(b).id != 0;
  }
  check_invariant(available == num_available_, "the number of available blocks is wrong");
  check_invariant(cached == num_cached_, "the number of cached blocks is wrong");
  const auto unreferenced = std::count(ref_counts_.begin(), ref_counts_.end(), 0);
  check_invariant(unreferenced == available, "an unreferenced block is lost");
}

void BlockManager::check_prefix_cache() const {
  int known = 0, listed = 0;
  for (int32_t b = 0; b < config_.num_blocks; ++b) known += at(b).id != 0;
  for (size_t i = 0; i < table_.size(); ++i) {
    const auto [hash, block] = table_[i];
    if (block == kNone) continue;
    ++listed;
    check_invariant(at(block).id != 0 && at(block).hash == hash,
                    "a block without these contents is in the prefix cache");
    for (size_t j = home_of(hash); j != i; j = after(j))
      check_invariant(table_[j].block != kNone && table_[j].block != block,
                      "a cached block cannot be found, or is there twice");
  }
  check_invariant(listed == known, "a cached block is missing in the prefix cache");
  for (const auto& [block, salt] : salts_)
    check_invariant(at(block).id != 0 && at(block).parent == 0 && !salt.empty(),
                    "a salt belongs to no first block");
}

void BlockManager::check_invariants(const std::vector<const Sequence*>& sequences) const {
  std::vector<int32_t> counted(ref_counts_.size(), 0);
  for (const Sequence* seq : sequences) {
    const int held = static_cast<int>(seq->block_table.size());
    for (const int32_t b : seq->block_table) {
      check_invariant(b >= 0 && b < config_.num_blocks, "a block table holds an impossible block");
      ++counted[static_cast<size_t>(b)];
    }
    check_invariant(seq->num_computed <= held * config_.block_size,
                    "a sequence has more computed tokens than slots");
    check_invariant(seq->num_committed_blocks * config_.block_size <= seq->num_computed,
                    "a block was committed before it was computed");
    for (int i = seq->num_computed / config_.block_size; i < held; ++i)
      check_invariant(at(seq->block_table[static_cast<size_t>(i)]).id == 0,
                      "a block that will be written is in the prefix cache");
  }
  check_invariant(counted == ref_counts_, "reference counts differ from the block tables");
  check_available_list();
  check_prefix_cache();
}

}  // namespace ni
