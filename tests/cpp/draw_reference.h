// Whether a token is the one that core/philox.h says is drawn: told from the token back, in double.
#pragma once

#include <algorithm>
#include <vector>

#include "core/philox.h"
#include "core/step_inputs.h"

namespace ni::test {

// Whether the token wins its unit's tournament. Masses need not add up to 1; that of `ambiguous` is
// of tokens that rounding may cut or keep.
inline bool wins_its_unit(const std::vector<double>& mass, const SamplingRow& row, size_t token,
                          double tolerance, double ambiguous = 0) {
  const RoundDraws draws = philox_rounds(row.seed, row.choice, static_cast<uint32_t>(row.position));
  const size_t unit = token / 16 * 16;
  size_t same = 0;  // bits that all who are still in have as the token
  for (const int bit : {2, 1, 0, 3}) {
    const size_t b = size_t{1} << bit;
    double low = 0, high = 0;
    for (size_t id = unit; id < std::min(unit + 16, mass.size()); ++id)
      if (((id ^ token) & same) == 0) (id & b ? high : low) += mass[id];
    const double draw = static_cast<double>(draws.v[bit == 3 ? 0 : bit + 1]);
    const double share = low / (low + high), slack = tolerance + ambiguous / (low + high);
    if ((token & b) == 0 ? draw > share + slack : draw < share - slack) return false;
    same |= b;
  }
  return true;
}

inline bool is_drawn(const std::vector<double>& mass, const SamplingRow& row, size_t token,
                     double tolerance, double ambiguous = 0) {
  const double u = philox_uniform(row.seed, row.choice, static_cast<uint32_t>(row.position));
  double total = 0, below = 0, upto = 0;
  for (size_t id = 0; id < mass.size(); ++id) {
    total += mass[id];
    if (id / 16 < token / 16) below += mass[id];
    if (id / 16 <= token / 16) upto += mass[id];
  }
  const double slack = tolerance + ambiguous / total;
  return u >= below / total - slack && u <= upto / total + slack &&
         wins_its_unit(mass, row, token, tolerance, ambiguous);
}

}  // namespace ni::test
