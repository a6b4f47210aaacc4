#include "engine/tokenizer.h"

#include <algorithm>

#include "common.h"
#include "engine/engine.h"
#include "engine/large_stack.h"
#include "llama.h"

namespace relay::engine {

namespace {

/// The sum of the squares of the lengths of the slow runs of a text: about a second's work.
constexpr double kMostSquares = 2e7;

TokenTexts texts_of(const llama_vocab* vocab) {
  std::vector<std::string> texts;
  std::vector<bool> ends;
  for (Token t = 0; t < llama_vocab_n_tokens(vocab); ++t) {
    texts.push_back(common_token_to_piece(vocab, t, true));
    ends.push_back(llama_vocab_is_eog(vocab, t));
  }
  return {std::move(texts), std::move(ends)};
}

/// Whether the tokens of a text make the whole text again.
bool leaves_nothing_out(const llama_vocab* vocab) {
  const auto type = llama_vocab_type(vocab);
  return type == LLAMA_VOCAB_TYPE_SPM || type == LLAMA_VOCAB_TYPE_BPE ||
         type == LLAMA_VOCAB_TYPE_RWKV;
}

bool is_digit(std::string_view text, size_t at) { return text[at] >= '0' && text[at] <= '9'; }

/// Spaces beyond ASCII begin with these bytes, and some other characters do.
bool is_space(std::string_view text, size_t at) {
  const auto byte = static_cast<unsigned char>(text[at]);
  return byte == ' ' || (byte >= '\t' && byte <= '\r') || byte == 0xC2 || byte == 0xE1 ||
         byte == 0xE2 || byte == 0xE3 || (byte & 0xC0) == 0x80;
}

}  // namespace

Tokenizer::Tokenizer(const llama_vocab* vocab, const std::string& pre_tokenizer)
    : vocab_(vocab),
      texts_(texts_of(vocab)),
      bound_(texts_),
      keeps_all_(leaves_nothing_out(vocab)),
      // \s+$ and (?=(\d{3})+(?!\d)) are tried at each place of a run, to its end.
      slow_(pre_tokenizer == "deepseek-llm" ? Slow::kSpaces
            : pre_tokenizer == "superbpe"   ? Slow::kDigits
                                            : Slow::kNothing) {
  // How deep it recurses is seen from runs of each kind of character.
  constexpr size_t kRun = 2048;
  constexpr size_t kOther = 128 * 1024;  // of stack, whatever the text
  for (const char* letter : {"a", "A", "1", ".", " ", "\n", "é", "字", "😀", "́", " a"}) {
    std::string text;
    while (text.size() < kRun) text += letter;
    const size_t used =
        run_on_large_stack([&] { common_tokenize(vocab_, text + "x", false, false); });
    if (used > kOther) stack_per_byte_ = std::max(stack_per_byte_, used / text.size() + 1);
  }
}

std::vector<Token> Tokenizer::tokenize(const std::string& text, bool add_special,
                                       bool parse_special, int64_t most_tokens) const {
  const auto refuse = [](const std::string& why) {
    throw EngineError(ErrorKind::kContextLengthExceeded, "The text is too long: " + why);
  };
  if (keeps_all_ && static_cast<int64_t>(text.size()) > most_tokens &&
      bound_.at_least(text, most_tokens) > most_tokens) {
    refuse("it has more tokens than this model's context of " + std::to_string(most_tokens) + ".");
  }
  // Half of the stack, as what was measured need not be the worst.
  const size_t longest = stack_per_byte_ > 0 ? kLargeStackBytes / 2 / stack_per_byte_ : SIZE_MAX;
  if (text.size() > longest) {
    refuse("this model's pre-tokeniser takes " + std::to_string(longest) + " bytes at most.");
  }
  if (slow_ != Slow::kNothing) {
    const auto is_slow = slow_ == Slow::kDigits ? is_digit : is_space;
    double squares = 0;
    for (size_t begin = 0; begin < text.size();) {
      size_t end = begin;
      while (end < text.size() && is_slow(text, end)) ++end;
      const auto run = static_cast<double>(end - begin);
      squares += run * run;
      begin = end + 1;
    }
    if (squares > kMostSquares) {
      refuse(std::string("this model's pre-tokeniser takes no long runs of ") +
             (slow_ == Slow::kDigits ? "digits." : "spaces."));
    }
  }
  return on_large_stack([&] { return common_tokenize(vocab_, text, add_special, parse_special); });
}

}  // namespace relay::engine
