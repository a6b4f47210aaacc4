// The wall clock as the API shows it.
#pragma once

#include <chrono>
#include <cstdint>

namespace relay {

/// Seconds since 1970 (UTC).
inline int64_t unix_now() {
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace relay
