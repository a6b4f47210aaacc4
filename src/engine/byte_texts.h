// A vocabulary for tests of grammars: token 0 ends, token 1 + b is the byte b.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "engine/grammar.h"

namespace relay::engine {

inline TokenTexts byte_texts(std::vector<std::string> longer = {}) {
  std::vector<std::string> texts = {"<end>"};
  for (int byte = 0; byte < 256; ++byte) texts.emplace_back(1, static_cast<char>(byte));
  for (std::string& text : longer) texts.push_back(std::move(text));
  std::vector<bool> ends(texts.size());
  ends[0] = true;
  return {std::move(texts), std::move(ends)};
}

/// Whether the grammar allows exactly this text, byte by byte.
inline bool grammar_allows(const std::string& grammar, const std::string& text) {
  static const TokenTexts texts = byte_texts();
  GrammarMatcher matcher(Grammar::compile(grammar, texts), texts);
  GrammarMatcher::Position at = matcher.start();
  for (const char c : text) {
    const auto token = static_cast<Token>(1 + static_cast<unsigned char>(c));
    if (!matcher.allows(at, token)) return false;
    at = matcher.advance(at, token);
  }
  return matcher.may_end(at);
}

}  // namespace relay::engine
