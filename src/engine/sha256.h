// SHA-256 (FIPS 180-4).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace relay::engine {

/// 64 lower-case hex digits.
std::string sha256_hex(std::span<const uint8_t> bytes);
inline std::string sha256_hex(std::string_view text) {
  return sha256_hex({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
}

}  // namespace relay::engine
