// Text to tokens by llama.cpp, within bounds: its pre-tokenisers are regular expressions, some of
// which recurse for each character of a run and some of which take the square of its length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/grammar.h"
#include "engine/token_bound.h"

struct llama_vocab;

namespace relay::engine {

/// Immutable, so any thread may use it.
class Tokenizer {
 public:
  /// `pre_tokenizer`: its name, "tokenizer.ggml.pre" of the model; may be empty.
  Tokenizer(const llama_vocab* vocab, const std::string& pre_tokenizer);

  /// Throws EngineError (kContextLengthExceeded) for a text that can have no fewer tokens than
  /// `most_tokens`, or that is too long for this pre-tokeniser.
  std::vector<Token> tokenize(const std::string& text, bool add_special, bool parse_special,
                              int64_t most_tokens) const;

  const TokenTexts& texts() const { return texts_; }

  /// Of stack, that pre-tokenising takes for each byte of text. 0: it does not depend on it.
  size_t stack_per_byte() const { return stack_per_byte_; }

 private:
  /// Runs of what take the square of their length.
  enum class Slow { kNothing, kDigits, kSpaces };

  const llama_vocab* vocab_;
  const TokenTexts texts_;
  const TokenBound bound_;
  const bool keeps_all_;
  const Slow slow_;
  size_t stack_per_byte_ = 0;
};

}  // namespace relay::engine
