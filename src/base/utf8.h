// Reading UTF-8, strictly: no overlong forms, no surrogates, nothing beyond U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace relay {

/// Bytes of the character that starts at text[at]; 0 if none does, -1 if the text ends within it.
/// (Unicode 15, table 3-7.)
inline int utf8_length(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(at);
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return 0;
  const int length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  // The second byte alone excludes what is overlong, a surrogate or too large.
  uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = at + 1; i < at + static_cast<size_t>(length); ++i) {
    if (i >= text.size()) return -1;
    if (byte(i) < low || byte(i) > high) return 0;
    low = 0x80;
    high = 0xBF;
  }
  return length;
}

inline bool is_valid_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const int length = utf8_length(text, at);
    if (length <= 0) return false;
    at += static_cast<size_t>(length);
  }
  return true;
}

/// The code point of the character of `length` bytes at text[at].
inline uint32_t utf8_code_point(std::string_view text, size_t at, int length) {
  const auto lead = static_cast<uint8_t>(text[at]);
  uint32_t code = length == 1 ? lead : lead & (0x7Fu >> length);
  for (int i = 1; i < length; ++i) {
    code = code << 6 | (static_cast<uint8_t>(text[at + static_cast<size_t>(i)]) & 0x3Fu);
  }
  return code;
}

/// Whether a byte continues a character that an earlier one began.
inline bool continues_utf8(char byte) { return (static_cast<uint8_t>(byte) & 0xC0) == 0x80; }

}  // namespace relay
