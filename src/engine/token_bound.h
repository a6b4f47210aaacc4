// How few tokens a text can possibly have, found out without a tokenizer: so a text that can never
// fit is refused before minutes are spent on it.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "engine/grammar.h"

namespace relay::engine {

class TokenBound {
 public:
  explicit TokenBound(const TokenTexts& texts);

  /// A tokenizer that leaves nothing out makes no fewer tokens of the text than this. Counting ends
  /// above `most`.
  int64_t at_least(std::string_view text, int64_t most) const;

 private:
  /// Bytes of the longest token that begins with these two; of one byte alone, if there is none.
  std::vector<uint16_t> longest_;
};

}  // namespace relay::engine
