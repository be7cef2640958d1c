// Checks that throw. Input errors carry only their message (a user reads it); broken invariants
// carry the source location (a developer reads it). Nothing aborts the process.
#pragma once

#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ni {

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// The caller gave something impossible: ValueError in Python.
template <typename... Args>
void check_arg(bool condition, const Args&... message) {
  if (!condition) [[unlikely]]
    throw std::invalid_argument(concat(message...));
}

// The machine or a file failed: RuntimeError in Python.
template <typename... Args>
void check_runtime(bool condition, const Args&... message) {
  if (!condition) [[unlikely]]
    throw std::runtime_error(concat(message...));
}

// We failed: a broken invariant.
inline void check_invariant(bool condition, const char* message,
                            std::source_location where = std::source_location::current()) {
  if (!condition) [[unlikely]]
    throw std::logic_error(concat(where.file_name(), ":", where.line(), ": ", message));
}

}  // namespace ni
