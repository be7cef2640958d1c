// For which cards this library was built. Pure host code, so that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>

#include "core/check.h"

namespace ni::cuda {

// Whether machine code for `target` (80, 90a, 100f: digits of the compute capability) runs on a
// card: within one major version on the same or a later minor one; with an `a` on that card alone.
inline bool runs_on(std::string_view target, int major, int minor) {
  const int number = std::atoi(std::string(target).c_str());
  if (target.ends_with('a')) return number == 10 * major + minor;
  return number / 10 == major && number % 10 <= minor;
}

// Why a card cannot be used; empty: it can. targets: as 80,89,90a.
inline std::string why_not_usable(const std::string& card, int major, int minor,
                                  const std::string& targets) {
  const std::string has = concat(card, " has compute capability ", major, ".", minor);
  if (major < 8) return concat(has, "; the CUDA backend needs 8.0 or later");
  for (size_t begin = 0; begin <= targets.size();) {
    const size_t end = std::min(targets.find(',', begin), targets.size());
    if (runs_on(std::string_view(targets).substr(begin, end - begin), major, minor)) return {};
    begin = end + 1;
  }
  return concat(has, ", and this build is for ", targets,
                "; build again with -DNI_CUDA_ARCHITECTURES=", major, minor);
}

}  // namespace ni::cuda
