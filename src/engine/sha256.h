// SHA-256 (FIPS 180-4), for the public ids of pinned prompts.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace relay::engine {

/// 64 lower-case hex digits.
std::string sha256_hex(std::span<const uint8_t> bytes);

}  // namespace relay::engine
