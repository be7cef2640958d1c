// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
// counter-based generator. The same (seed, choice, position) gives the same number on the CPU and
// on CUDA, whatever else runs.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace ni {

struct Philox4 {
  uint32_t v[4];
};

NI_HD inline Philox4 philox4x32(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A token is drawn in two steps, so that a product that makes logits can leave what is drawn of
// every 16 of them instead of the logits. The first is by the inverse CDF in the order of ids: the
// unit of 16 neighbours [16 i, 16 i + 16) at which the running sum of p exceeds philox_uniform()
// times the whole. The second is a tournament in this unit of four rounds: in round r tokens, then
// winners, meet whose ids differ in bit round_bit(r); the one with the bit 0 wins if
// philox_rounds().v[r] < its side's share of the p of all that have met.
inline constexpr int kUnitTokens = 16, kUnitRounds = 4;
NI_HD constexpr int round_bit(int round) {
  return round == 0 ? 3 : round - 1;
}

// Uniform in [0, 1) with 53 bits.
NI_HD inline double philox_uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  const Philox4 r = philox4x32(seed, position, choice, 0, 0);
  const uint64_t bits = (static_cast<uint64_t>(r.v[0]) << 32 | r.v[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

struct RoundDraws {
  float v[kUnitRounds];
};
// Uniform, the odd ones of 2^24 parts of [0, 1]: never 0, with which a side would win however
// little it has.
NI_HD inline RoundDraws philox_rounds(uint64_t seed, uint32_t choice, uint32_t position) {
  const Philox4 r = philox4x32(seed, position, choice, 1, 0);
  RoundDraws draws;
  for (int i = 0; i < kUnitRounds; ++i)
    draws.v[i] = static_cast<float>(r.v[i] >> 8 | 1) * 0x1.0p-24f;
  return draws;
}
// Of a side and the one it meets, whose p sums up to `both`.
NI_HD inline bool low_side_wins(float draw, float low, float both) {
  return draw * both < low;
}

}  // namespace ni
