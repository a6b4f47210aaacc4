#include "engine/text_stream.h"

#include <algorithm>

#include "base/utf8.h"

namespace relay::engine {

namespace {

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
    const int length = utf8_length(bytes, at);
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
