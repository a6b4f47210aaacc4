// Turns the bytes of generated tokens into text that may be sent: whole UTF-8 characters only, and
// nothing of a stop string, not even its first half.
#pragma once

#include <string>
#include <vector>

namespace relay::engine {

class TextStream {
 public:
  TextStream() = default;
  explicit TextStream(std::vector<std::string> stop_strings) : stops_(std::move(stop_strings)) {}

  /// Takes the bytes of the next token; returns the text that became certain. Once a stop string is
  /// complete, the rest is dropped and stopped() is true. Bytes that are no UTF-8 become U+FFFD.
  std::string push(const std::string& bytes);
  /// Nothing follows: what was held back.
  std::string finish();

  bool stopped() const { return stopped_; }
  /// The stop string that was met; empty while not stopped.
  const std::string& stop_string() const { return met_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;  // bytes not sent yet
  bool stopped_ = false;
  std::string met_;
};

/// Valid UTF-8: each byte that is part of no character becomes U+FFFD. If `rest` is given, a
/// character cut off at the end is moved there instead.
std::string sanitize_utf8(const std::string& bytes, std::string* rest = nullptr);

}  // namespace relay::engine
