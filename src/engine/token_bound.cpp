#include "engine/token_bound.h"

#include <algorithm>

namespace relay::engine {

namespace {

size_t pair_of(char first, char second) {
  return static_cast<size_t>(static_cast<unsigned char>(first)) << 8 |
         static_cast<unsigned char>(second);
}

}  // namespace

TokenBound::TokenBound(const TokenTexts& texts) : longest_(size_t{1} << 16, 1) {
  for (size_t t = 0; t < texts.size(); ++t) {
    const std::string& text = texts.text(static_cast<Token>(t));
    if (text.size() < 2) continue;
    uint16_t& longest = longest_[pair_of(text[0], text[1])];
    longest = static_cast<uint16_t>(std::clamp<size_t>(text.size(), longest, UINT16_MAX));
  }
}

int64_t TokenBound::at_least(std::string_view text, int64_t most) const {
  // As if every beginning of a token were one, too: then the fewest come of always going as far as
  // any of the places within reach leads.
  int64_t tokens = 0;
  size_t covered = 0;  // by these tokens
  size_t reach = 0;    // with one more
  for (size_t i = 0; i < text.size(); ++i) {
    if (i + 1 < text.size()) {
      reach = std::max(reach, i + longest_[pair_of(text[i], text[i + 1])]);
    } else {
      reach = std::max(reach, i + 1);
    }
    if (i < covered) continue;
    ++tokens;
    covered = reach;
    if (tokens > most) break;
  }
  return tokens;
}

}  // namespace relay::engine
