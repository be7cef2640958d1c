#include "engine/block_manager.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace ni {
namespace {

// A constant hash: every block collides with every other one.
uint64_t constant_hash(uint64_t, const int32_t*, int) {
  return 42;
}

BlockManagerConfig make_config(int num_blocks, int block_size = 4,
                               BlockHash hash = default_block_hash, bool prefix_caching = true) {
  BlockManagerConfig config;
  config.num_blocks = num_blocks;
  config.block_size = block_size;
  config.hash = std::move(hash);
  config.enable_prefix_caching = prefix_caching;
  return config;
}

Sequence make_sequence(std::vector<int32_t> tokens, const std::string& salt = "") {
  auto request = std::make_shared<Request>();
  request->cache_salt = salt;
  Sequence seq;
  seq.request = std::move(request);
  seq.num_prompt = static_cast<int>(tokens.size());
  seq.tokens = std::move(tokens);
  return seq;
}

std::vector<int32_t> range(int first, int count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) tokens[static_cast<size_t>(i)] = first + i;
  return tokens;
}

// Takes blocks for all tokens, "computes" them and commits.
void compute(BlockManager& blocks, Sequence& seq) {
  std::vector<BlockCopy> copies;
  ASSERT_TRUE(blocks.grow(seq, seq.num_tokens(), copies));
  seq.num_computed = seq.num_tokens();
  blocks.commit(seq);
}

TEST(BlockManager, RejectsImpossibleConfig) {
  EXPECT_THROW(BlockManager(make_config(0)), std::invalid_argument);
  EXPECT_THROW(BlockManager(make_config(4, 0)), std::invalid_argument);
  EXPECT_THROW(BlockManager(make_config(4, 4, nullptr)), std::invalid_argument);
}

TEST(BlockManager, GrowAndFreeKeepCount) {
  BlockManager blocks(make_config(4));
  Sequence seq = make_sequence(range(0, 9));
  std::vector<BlockCopy> copies;
  EXPECT_EQ(blocks.blocks_for(0), 0);
  EXPECT_EQ(blocks.blocks_for(8), 2);
  EXPECT_EQ(blocks.blocks_for(9), 3);
  EXPECT_EQ(blocks.blocks_needed(seq, 9), 3);
  EXPECT_TRUE(blocks.grow(seq, 9, copies));
  EXPECT_EQ(seq.block_table.size(), 3u);
  EXPECT_EQ(blocks.blocks_needed(seq, 12), 0);
  EXPECT_EQ(blocks.blocks_needed(seq, 13), 1);
  EXPECT_EQ(blocks.num_available(), 1);
  EXPECT_EQ(blocks.stats().num_used, 3);
  blocks.check_invariants({&seq});
  blocks.free(seq);
  EXPECT_TRUE(seq.block_table.empty());
  EXPECT_EQ(blocks.stats().num_free, 4);
  EXPECT_TRUE(copies.empty());
  blocks.check_invariants({});
}

TEST(BlockManager, GrowThatFailsChangesNothing) {
  BlockManager blocks(make_config(3));
  Sequence a = make_sequence(range(0, 6)), b = make_sequence(range(0, 6));
  compute(blocks, a);
  std::vector<BlockCopy> copies;
  EXPECT_FALSE(blocks.grow(b, 6, copies));
  EXPECT_TRUE(b.block_table.empty());
  EXPECT_EQ(blocks.num_available(), 1);
  // A copy counts too: two sharers of two partial tails, one block left.
  Sequence c = make_sequence(a.tokens);
  blocks.fork(a, c);
  EXPECT_FALSE(blocks.grow(c, 9, copies));  // one copy and one more block
  EXPECT_EQ(c.block_table, a.block_table);
  EXPECT_TRUE(copies.empty());
  EXPECT_TRUE(blocks.grow(c, 8, copies));
  blocks.check_invariants({&a, &c});
}

TEST(BlockManager, PrefixIsFoundUpToTheLastToken) {
  BlockManager blocks(make_config(16));
  Sequence a = make_sequence(range(0, 12));
  compute(blocks, a);
  Sequence same = make_sequence(range(0, 12));
  // All three blocks are known, but one row must be computed.
  EXPECT_EQ(blocks.lookup_prefix(same), 8);
  Sequence longer = make_sequence(range(0, 13));
  EXPECT_EQ(blocks.lookup_prefix(longer), 12);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 4))), 0);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(1, 12))), 0);
  std::vector<int32_t> changed = range(0, 13);
  changed[5] = 99;
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(changed)), 4);

  EXPECT_EQ(blocks.take_prefix(longer), 12);
  EXPECT_EQ(longer.num_computed, 12);
  EXPECT_EQ(longer.num_committed_blocks, 3);
  EXPECT_EQ(longer.block_table, a.block_table);
  EXPECT_EQ(blocks.ref_count(a.block_table[0]), 2);
  EXPECT_EQ(blocks.stats().prefix_queries, 13u);
  EXPECT_EQ(blocks.stats().prefix_hits, 12u);
  blocks.check_invariants({&a, &longer});
  // Still usable by the one when the other is gone.
  blocks.free(a);
  blocks.check_invariants({&longer});
  compute(blocks, longer);
  blocks.check_invariants({&longer});
}

TEST(BlockManager, UncommittedAndPartialBlocksAreNotFound) {
  BlockManager blocks(make_config(8));
  Sequence a = make_sequence(range(0, 12));
  std::vector<BlockCopy> copies;
  ASSERT_TRUE(blocks.grow(a, 12, copies));
  a.num_computed = 7;  // one full block
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 12))), 0);
  blocks.commit(a);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 12))), 4);
  blocks.free(a);
  EXPECT_EQ(blocks.stats().num_cached, 1);
  EXPECT_EQ(blocks.stats().num_free, 7);
  blocks.check_invariants({});
}

TEST(BlockManager, SaltsSeparate) {
  for (const BlockHash& hash : {BlockHash(default_block_hash), BlockHash(constant_hash)}) {
    BlockManager blocks(make_config(32, 4, hash));
    const std::vector<std::string> salts = {"", "x", "y"};
    std::vector<Sequence> owners;
    for (const std::string& salt : salts) {
      Sequence probe = make_sequence(range(0, 9), salt);
      EXPECT_EQ(blocks.lookup_prefix(probe), 0) << salt;
      compute(blocks, probe);
      owners.push_back(probe);
    }
    for (size_t i = 0; i < salts.size(); ++i) {
      Sequence again = make_sequence(range(0, 9), salts[i]);
      EXPECT_EQ(blocks.take_prefix(again), 8);
      EXPECT_EQ(again.block_table[0], owners[i].block_table[0]);
      EXPECT_EQ(again.block_table[1], owners[i].block_table[1]);
      blocks.free(again);
    }
    EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 9), "z")), 0);
    for (Sequence& seq : owners) blocks.free(seq);
    blocks.check_invariants({});
  }
}

TEST(BlockManager, ConstantHashFindsTheRightBlocks) {
  BlockManager blocks(make_config(400, 2, constant_hash));
  // 100 chains of three blocks; many have an equal second block after a different first one.
  std::vector<Sequence> owners;
  for (int i = 0; i < 100; ++i) owners.push_back(make_sequence({i, i + 1, 7, i % 3, 8, i % 5, 9}));
  for (Sequence& seq : owners) compute(blocks, seq);
  for (const Sequence& owner : owners) {
    Sequence seq = make_sequence(owner.tokens);
    EXPECT_EQ(blocks.take_prefix(seq), 6);
    EXPECT_EQ(seq.block_table,
              std::vector<int32_t>(owner.block_table.begin(), owner.block_table.begin() + 3));
    blocks.free(seq);
  }
  EXPECT_EQ(blocks.lookup_prefix(make_sequence({7, 0, 8, 0, 9})), 0);  // not as a first block
  EXPECT_EQ(blocks.lookup_prefix(make_sequence({3, 4, 8, 0, 9})), 2);  // not as a second block
  std::vector<const Sequence*> holders;
  for (const Sequence& seq : owners) holders.push_back(&seq);
  blocks.check_invariants(holders);
}

TEST(BlockManager, EqualContentsStayPrivateButContinueTheChain) {
  BlockManager blocks(make_config(8));
  Sequence a = make_sequence(range(0, 8)), b = make_sequence(range(0, 12));
  std::vector<BlockCopy> copies;
  ASSERT_TRUE(blocks.grow(b, 12, copies));  // looked up before a was there
  compute(blocks, a);
  b.num_computed = 12;
  blocks.commit(b);
  EXPECT_NE(a.block_table[0], b.block_table[0]);
  // A third request finds a's two blocks and then b's third one.
  Sequence c = make_sequence(range(0, 13));
  EXPECT_EQ(blocks.take_prefix(c), 12);
  EXPECT_EQ(c.block_table,
            (std::vector<int32_t>{a.block_table[0], a.block_table[1], b.block_table[2]}));
  blocks.check_invariants({&a, &b, &c});
  blocks.free(b);
  EXPECT_EQ(blocks.stats().num_free, 5);  // b's private copies were forgotten, 3 of 8 are in use
  EXPECT_EQ(blocks.stats().num_cached, 0);
  blocks.check_invariants({&a, &c});
}

TEST(BlockManager, EvictsTheLeastRecentlyUsedAndTailsFirst) {
  BlockManager blocks(make_config(6));
  Sequence a = make_sequence(range(0, 12)), b = make_sequence(range(100, 12));
  compute(blocks, a);
  compute(blocks, b);
  blocks.free(a);
  blocks.free(b);
  EXPECT_EQ(blocks.stats().num_cached, 6);
  // Reuse makes a the younger one.
  Sequence again = make_sequence(range(0, 13));
  EXPECT_EQ(blocks.take_prefix(again), 12);
  blocks.free(again);

  const Sequence probe_a = make_sequence(range(0, 13)), probe_b = make_sequence(range(100, 13));
  std::vector<BlockCopy> copies;
  Sequence taker = make_sequence(range(200, 24));
  const int expected[][2] = {{12, 8}, {12, 4}, {12, 0}, {8, 0}, {4, 0}, {0, 0}};
  for (int taken = 1; taken <= 6; ++taken) {
    ASSERT_TRUE(blocks.grow(taker, taken * 4, copies));
    EXPECT_EQ(blocks.lookup_prefix(probe_a), expected[taken - 1][0]) << taken;
    EXPECT_EQ(blocks.lookup_prefix(probe_b), expected[taken - 1][1]) << taken;
    blocks.check_invariants({&taker});
  }
  EXPECT_EQ(blocks.stats().evictions, 6u);
}

TEST(BlockManager, FreeBlocksAreUsedBeforeCachedOnes) {
  BlockManager blocks(make_config(4));
  Sequence a = make_sequence(range(0, 4)), b = make_sequence(range(50, 3));
  compute(blocks, a);
  compute(blocks, b);
  blocks.free(a);
  blocks.free(b);
  Sequence c = make_sequence(range(90, 12));
  compute(blocks, c);
  EXPECT_EQ(blocks.stats().evictions, 0u);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 5))), 4);
}

TEST(BlockManager, ChildrenOfAnEvictedBlockAreUnreachableNotWrong) {
  BlockManager blocks(make_config(6, 4, constant_hash));
  Sequence a = make_sequence(range(0, 4));
  compute(blocks, a);
  // b computes the same first block privately; its second block continues a's identity.
  Sequence b = make_sequence(range(0, 8));
  compute(blocks, b);
  blocks.free(a);  // 1 cached, 3 free
  Sequence filler = make_sequence(range(300, 16));
  std::vector<BlockCopy> copies;
  ASSERT_TRUE(blocks.grow(filler, 16, copies));  // evicts a's block; b's second block lives on
  EXPECT_EQ(blocks.stats().evictions, 1u);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 9))), 0);
  blocks.free(filler);
  // The same first block comes back with a new identity: the old child does not belong to it.
  Sequence c = make_sequence(range(0, 4));
  compute(blocks, c);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 9))), 4);
  blocks.check_invariants({&b, &c});
  blocks.free(b);
  blocks.free(c);
  blocks.check_invariants({});
}

TEST(BlockManager, ForksShareUntilTheyWrite) {
  BlockManager blocks(make_config(8));
  Sequence a = make_sequence(range(0, 6));
  compute(blocks, a);
  Sequence b = make_sequence(a.tokens), c = make_sequence(a.tokens);
  blocks.fork(a, b);
  blocks.fork(a, c);
  EXPECT_EQ(blocks.stats().num_used, 2);
  EXPECT_EQ(blocks.ref_count(a.block_table[1]), 3);
  const int32_t shared = a.block_table[1];
  std::vector<BlockCopy> copies;
  for (Sequence* seq : {&a, &b, &c}) {
    EXPECT_EQ(blocks.blocks_needed(*seq, 7), seq == &c ? 0 : 1);
    seq->tokens.push_back(50);
    ASSERT_TRUE(blocks.grow(*seq, 7, copies));
    blocks.check_invariants({&a, &b, &c});
  }
  // The last sharer writes in place.
  ASSERT_EQ(copies.size(), 2u);
  EXPECT_EQ(copies[0].src, shared);
  EXPECT_EQ(copies[0].dst, a.block_table[1]);
  EXPECT_EQ(copies[1].dst, b.block_table[1]);
  EXPECT_EQ(c.block_table[1], shared);
  EXPECT_EQ(a.block_table[0], c.block_table[0]);
  EXPECT_EQ(blocks.stats().copies, 2u);
  EXPECT_EQ(blocks.stats().num_used, 4);
  for (Sequence* seq : {&a, &b, &c}) blocks.free(*seq);
  EXPECT_EQ(blocks.num_available(), 8);
  blocks.check_invariants({});
}

TEST(BlockManager, ForkAtABlockBoundaryCopiesNothing) {
  BlockManager blocks(make_config(8));
  Sequence a = make_sequence(range(0, 8));
  compute(blocks, a);
  Sequence b = make_sequence(a.tokens);
  blocks.fork(a, b);
  std::vector<BlockCopy> copies;
  ASSERT_TRUE(blocks.grow(a, 9, copies));
  ASSERT_TRUE(blocks.grow(b, 9, copies));
  EXPECT_TRUE(copies.empty());
  EXPECT_EQ(blocks.stats().num_used, 4);
  // A shared block without contents (reserved, then forked) is replaced, not copied.
  Sequence c = make_sequence(range(20, 4));
  ASSERT_TRUE(blocks.grow(c, 8, copies));
  c.num_computed = 4;
  Sequence d = make_sequence(c.tokens);
  blocks.fork(c, d);
  ASSERT_TRUE(blocks.grow(d, 5, copies));
  EXPECT_TRUE(copies.empty());
  EXPECT_NE(c.block_table[1], d.block_table[1]);
  blocks.check_invariants({&a, &b, &c, &d});
}

TEST(BlockManager, ShrinkDropsRejectedSlots) {
  BlockManager blocks(make_config(8));
  Sequence a = make_sequence(range(0, 8));
  compute(blocks, a);
  std::vector<BlockCopy> copies;
  ASSERT_TRUE(blocks.grow(a, 20, copies));
  blocks.shrink(a, 9);
  EXPECT_EQ(a.block_table.size(), 3u);
  EXPECT_EQ(blocks.num_available(), 5);
  blocks.check_invariants({&a});
  EXPECT_THROW(blocks.shrink(a, 4), std::logic_error);  // the second block is committed
}

TEST(BlockManager, ResetForgetsContents) {
  BlockManager blocks(make_config(8));
  Sequence a = make_sequence(range(0, 9)), salted = make_sequence(range(0, 9), "s");
  compute(blocks, a);
  compute(blocks, salted);
  blocks.free(salted);
  EXPECT_THROW(blocks.reset_prefix_cache(), std::logic_error);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 9))), 8);
  blocks.free(a);
  blocks.reset_prefix_cache();
  EXPECT_EQ(blocks.stats().num_free, 8);
  EXPECT_EQ(blocks.stats().num_cached, 0);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 9))), 0);
  EXPECT_EQ(blocks.lookup_prefix(make_sequence(range(0, 9), "s")), 0);
  blocks.check_invariants({});
}

TEST(BlockManager, WithoutPrefixCacheNothingIsKept) {
  BlockManager blocks(make_config(8, 4, default_block_hash, false));
  Sequence a = make_sequence(range(0, 9));
  compute(blocks, a);
  EXPECT_EQ(a.num_committed_blocks, 0);
  Sequence b = make_sequence(range(0, 9));
  EXPECT_EQ(blocks.lookup_prefix(b), 0);
  EXPECT_EQ(blocks.take_prefix(b), 0);
  blocks.free(a);
  EXPECT_EQ(blocks.stats().num_free, 8);
  EXPECT_EQ(blocks.stats().prefix_queries, 0u);
  blocks.reset_prefix_cache();
  blocks.check_invariants({});
}

// The unpaged mode of the engine: one block holds a whole sequence.
TEST(BlockManager, HugeBlocks) {
  BlockManager blocks(make_config(2, 1 << 20, default_block_hash, false));
  Sequence a = make_sequence(range(0, 100)), b = make_sequence(range(0, 5)),
           c = make_sequence(range(0, 1));
  std::vector<BlockCopy> copies;
  ASSERT_TRUE(blocks.grow(a, 1 << 20, copies));
  ASSERT_TRUE(blocks.grow(b, 5, copies));
  EXPECT_FALSE(blocks.grow(c, 1, copies));
  EXPECT_EQ(a.block_table.size(), 1u);
  blocks.check_invariants({&a, &b});
}

TEST(BlockManager, InvariantsAreViolatedLoudly) {
  BlockManager blocks(make_config(8));
  Sequence a = make_sequence(range(0, 9));
  compute(blocks, a);
  EXPECT_THROW(blocks.check_invariants({}), std::logic_error);        // a reference too many
  EXPECT_THROW(blocks.check_invariants({&a, &a}), std::logic_error);  // too few
  Sequence bad = a;
  bad.num_computed = 4;  // would write into a committed block
  bad.num_committed_blocks = 1;
  EXPECT_THROW(blocks.check_invariants({&bad}), std::logic_error);
  bad = a;
  bad.block_table[0] = 99;
  EXPECT_THROW(blocks.check_invariants({&bad}), std::logic_error);
}

// Random use beside a model of the cache's memory: every slot of a block holds what a kernel would
// have computed from all tokens before it and the salt. Whatever take_prefix hands out must hold
// exactly what the sequence would have computed itself.
class RandomUse {
 public:
  RandomUse(uint32_t seed, int num_blocks, BlockHash hash)
      : random_(seed),
        blocks_(make_config(num_blocks, kBlockSize, std::move(hash))),
        slots_(static_cast<size_t>(num_blocks * kBlockSize)) {}

  void run(int steps) {
    for (int i = 0; i < steps; ++i) {
      const int action = pick(10);
      if (sequences_.empty() || (action < 4 && sequences_.size() < 4)) {
        start();
      } else if (action < 7) {
        extend(sequences_[static_cast<size_t>(pick(static_cast<int>(sequences_.size())))]);
      } else if (action < 8) {
        fork(sequences_[static_cast<size_t>(pick(static_cast<int>(sequences_.size())))]);
      } else {
        const auto victim = sequences_.begin() + pick(static_cast<int>(sequences_.size()));
        blocks_.free(*victim);
        sequences_.erase(victim);
      }
      check();
      if (::testing::Test::HasFailure()) return;
    }
    for (Sequence& seq : sequences_) blocks_.free(seq);
    sequences_.clear();
    check();
    EXPECT_EQ(blocks_.stats().num_free + blocks_.stats().num_cached, blocks_.num_blocks());
    EXPECT_GT(blocks_.stats().prefix_hits, 0u);
    EXPECT_GT(blocks_.stats().evictions, 0u);
    EXPECT_GT(blocks_.stats().copies, 0u);
  }

 private:
  static constexpr int kBlockSize = 3;
  int pick(int n) { return std::uniform_int_distribution<int>(0, n - 1)(random_); }

  // What K and V at `position` depend on: the salt and all tokens up to there.
  static std::string contents(const Sequence& seq, int position) {
    std::string s = seq.request->cache_salt + ":";
    for (int i = 0; i <= position; ++i)
      s += std::to_string(seq.tokens[static_cast<size_t>(i)]) + ",";
    return s;
  }
  std::string& slot(const Sequence& seq, int position) {
    const int32_t block = seq.block_table[static_cast<size_t>(position / kBlockSize)];
    return slots_[static_cast<size_t>(block * kBlockSize + position % kBlockSize)];
  }

  void compute_all(Sequence& seq) {
    copies_.clear();
    if (!blocks_.grow(seq, seq.num_tokens(), copies_)) {
      blocks_.free(seq);  // preempted; sequences without blocks may take a prefix again
      blocks_.take_prefix(seq);
      return;
    }
    for (const BlockCopy& copy : copies_)
      for (int i = 0; i < kBlockSize; ++i)
        slots_[static_cast<size_t>(copy.dst * kBlockSize + i)] =
            slots_[static_cast<size_t>(copy.src * kBlockSize + i)];
    for (int p = seq.num_computed; p < seq.num_tokens(); ++p) slot(seq, p) = contents(seq, p);
    seq.num_computed = seq.num_tokens();
    if (pick(4) > 0) blocks_.commit(seq);  // sometimes later
  }

  void start() {
    std::vector<int32_t> tokens;
    for (int i = 0, n = 1 + pick(14); i < n; ++i) tokens.push_back(pick(2));
    const char* salts[] = {"", "", "x", "y"};
    sequences_.push_back(make_sequence(tokens, salts[pick(4)]));
    blocks_.take_prefix(sequences_.back());
    compute_all(sequences_.back());
  }
  void extend(Sequence& seq) {
    for (int i = 0, n = 1 + pick(4); i < n; ++i) seq.tokens.push_back(pick(2));
    compute_all(seq);
  }
  void fork(Sequence& parent) {
    Sequence child = make_sequence(parent.tokens, parent.request->cache_salt);
    blocks_.fork(parent, child);
    sequences_.push_back(std::move(child));
  }

  void check() {
    std::vector<const Sequence*> holders;
    for (const Sequence& seq : sequences_) {
      holders.push_back(&seq);
      for (int p = 0; p < seq.num_computed; ++p) ASSERT_EQ(slot(seq, p), contents(seq, p));
    }
    ASSERT_NO_THROW(blocks_.check_invariants(holders));
  }

  std::mt19937 random_;
  BlockManager blocks_;
  std::vector<std::string> slots_;
  std::vector<Sequence> sequences_;
  std::vector<BlockCopy> copies_;
};

TEST(BlockManager, RandomUseNeverHandsOutWrongContents) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    RandomUse(seed, 12 + static_cast<int>(seed), default_block_hash).run(600);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
}

TEST(BlockManager, RandomUseWithCollidingHashes) {
  // Constant, and one of only three values.
  const BlockHash three = [](uint64_t parent, const int32_t* tokens, int count) {
    return default_block_hash(parent, tokens, count) % 3;
  };
  for (uint32_t seed = 0; seed < 10; ++seed) {
    RandomUse(seed, 20, constant_hash).run(600);
    RandomUse(seed, 20, three).run(600);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace ni
