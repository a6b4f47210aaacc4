#include "engine/text_stream.h"

#include <algorithm>
#include <cstdint>

namespace relay::engine {

namespace {

// Length of the character that starts at s[at], 0 if no character does, -1 if it is cut off by the
// end but could still become one. (Unicode 15, table 3-7: no overlong forms, no surrogates.)
int character_length(const std::string& s, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(s[i]); };
  const uint8_t lead = byte(at);
  if (lead < 0x80) return 1;
  int length = 0;
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return 0;
  }
  for (int i = 1; i < length; ++i) {
    const size_t place = at + static_cast<size_t>(i);
    if (place >= s.size()) return -1;
    if (byte(place) < low || byte(place) > high) return 0;
    low = 0x80;
    high = 0xBF;
  }
  return length;
}

// Bytes at the end of `text` that are the beginning of a stop string.
size_t possible_stop(const std::string& text, const std::vector<std::string>& stops) {
  size_t longest = 0;
  for (const std::string& stop : stops) {
    for (size_t n = std::min(stop.size() - 1, text.size()); n > longest; --n) {
      if (text.compare(text.size() - n, n, stop, 0, n) == 0) longest = n;
    }
  }
  return longest;
}

}  // namespace

std::string sanitize_utf8(const std::string& bytes, std::string* rest) {
  std::string text;
  text.reserve(bytes.size());
  for (size_t at = 0; at < bytes.size();) {
    const int length = character_length(bytes, at);
    if (length > 0) {
      text.append(bytes, at, static_cast<size_t>(length));
      at += static_cast<size_t>(length);
    } else if (length < 0 && rest != nullptr) {
      *rest = bytes.substr(at);
      return text;
    } else {
      text += "\xEF\xBF\xBD";
      ++at;
    }
  }
  if (rest != nullptr) rest->clear();
  return text;
}

std::string TextStream::push(const std::string& bytes) {
  if (stopped_) return {};
  held_ += bytes;
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at < first) {
      first = at;
      met_ = stop;
    }
  }
  if (first != std::string::npos) {
    stopped_ = true;
    const std::string text = sanitize_utf8(held_.substr(0, first));
    held_.clear();
    return text;
  }
  const size_t hold = possible_stop(held_, stops_);
  std::string rest;
  const std::string text = sanitize_utf8(held_.substr(0, held_.size() - hold), &rest);
  held_ = rest + held_.substr(held_.size() - hold);
  return text;
}

std::string TextStream::finish() {
  const std::string text = sanitize_utf8(held_);
  held_.clear();
  return text;
}

}  // namespace relay::engine
