// Sampling under a grammar: the choice is free, and made again among the tokens that the grammar
// allows if it does not allow the first.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <regex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "engine/grammar.h"
#include "engine/random_sampler.h"
#include "engine/sampler.h"

namespace relay::engine {

/// When a grammar that waits (for a tool call, say) begins to bind.
class GrammarTrigger {
 public:
  std::unordered_set<Token> tokens;
  std::vector<std::string> words;
  /// Where a pattern has groups, the first that matched is where the grammar begins.
  struct Pattern {
    std::regex regex;
    bool whole = false;  ///< it must match all of the text so far
  };
  std::vector<Pattern> patterns;

  /// What the grammar has to read already, once it binds.
  using Backlog = std::vector<std::pair<Token, std::string>>;
  /// One more token. Looks at no more than the last kWindow bytes: std::regex recurses as deep as
  /// what it looks at is long.
  std::optional<Backlog> feed(Token token, const std::string& text);

  static constexpr size_t kWindow = 2048;

 private:
  std::optional<size_t> find(size_t added) const;

  std::string seen_;
  bool seen_all_ = true;  ///< nothing was dropped from its front
  Backlog recent_;        ///< its tokens
};

/// Whether a token is part of the model's thinking, in which no grammar wakes up.
class ThinkingWatch {
 public:
  virtual ~ThinkingWatch() = default;
  virtual bool thinking() const = 0;
  virtual void accept(Token token) = 0;
  /// The tokens that just ended the thinking, which may be a trigger.
  virtual std::vector<Token> end() const = 0;
};

class GrammarSampler : public Sampler {
 public:
  /// `matcher` and what it may cost are shared by the `choices` of a request. `trigger`: null where
  /// the grammar binds from the beginning. `thinking` may be null.
  GrammarSampler(std::shared_ptr<GrammarMatcher> matcher, const TokenTexts& texts, int32_t choices,
                 std::unique_ptr<RandomSampler> choice, std::optional<GrammarTrigger> trigger,
                 std::unique_ptr<ThinkingWatch> thinking);

  /// Goes past what is written already. Throws std::runtime_error where the grammar forbids it.
  void skip(const std::vector<Token>& written);

  /// Throws EngineError (kInvalidGrammar) if no token is allowed, or following the grammar takes
  /// more than a request's fair share.
  Token sample(Model& model, int32_t row) override;

 private:
  bool binds() const { return !trigger_ && (thinking_ == nullptr || !thinking_->thinking()); }
  Token choose(Model& model, int32_t row);
  void accept(Token token);
  void feed(Token token);
  void advance(Token token, const std::string& text);

  const std::shared_ptr<GrammarMatcher> matcher_;
  const TokenTexts& texts_;
  const int32_t choices_;
  const std::unique_ptr<RandomSampler> choice_;
  std::optional<GrammarTrigger> trigger_;  ///< while it waits
  const std::unique_ptr<ThinkingWatch> thinking_;
  const bool lazy_;
  GrammarMatcher::Position at_;
  std::vector<float> logits_;
};

}  // namespace relay::engine
