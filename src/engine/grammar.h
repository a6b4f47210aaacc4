// Grammars (GBNF): which tokens may come next. llama.cpp's own matcher follows each derivation of a
// token by itself. For some grammars of one line that takes time exponential in the token's length,
// and nothing can stop it. Here all derivations are followed together, as a set; results are
// remembered, and every step is counted against a budget.
//
// The language is llama.cpp's (its grammars/README.md).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/model.h"

namespace relay::engine {

/// The text of all tokens, in an order in which those that begin alike lie together. Immutable.
class TokenTexts {
 public:
  /// `texts`: of each token, control tokens included; empty: never allowed. `ends`: the tokens that
  /// end a generation.
  TokenTexts(std::vector<std::string> texts, std::vector<bool> ends);

  size_t size() const { return texts_.size(); }
  const std::string& text(Token token) const { return texts_[static_cast<size_t>(token)]; }
  bool is_end(Token token) const { return ends_[static_cast<size_t>(token)]; }
  /// The token with exactly this text, or -1.
  Token find(std::string_view text) const;

 private:
  friend class GrammarMatcher;
  struct Entry {
    Token token;
    uint32_t common;  ///< bytes in common with the entry before
  };
  std::vector<std::string> texts_;
  std::vector<bool> ends_;
  std::vector<Entry> sorted_;  // by text
  std::vector<Token> others_;  // those that end, and those without text
};

/// Thrown for a grammar that is too large or too ambiguous to be compiled or followed.
class GrammarTooCostly : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Thrown where all grammars together hold too much memory, and this one a good part of it.
class GrammarMemoryFull : public GrammarTooCostly {
 public:
  using GrammarTooCostly::GrammarTooCostly;
};

/// A share of the memory that the grammars of this process may hold: a line of text can become some
/// 10 MB, and hundreds of requests may wait with one each. Whoever holds kFree or less always gets
/// more.
class GrammarMemory {
 public:
  static constexpr int64_t kFree = int64_t{2} << 20;

  GrammarMemory() = default;
  ~GrammarMemory() { total_ -= bytes_; }
  GrammarMemory(const GrammarMemory&) = delete;
  GrammarMemory& operator=(const GrammarMemory&) = delete;

  /// Throws GrammarMemoryFull where it would grow; then the share is as it was.
  void resize(int64_t bytes);
  int64_t bytes() const { return bytes_; }

  static int64_t total() { return total_; }
  /// For tests; returns what it was.
  static int64_t set_limit(int64_t bytes) { return limit_.exchange(bytes); }

 private:
  static inline std::atomic<int64_t> total_ = 0;
  static inline std::atomic<int64_t> limit_ = int64_t{512} << 20;
  int64_t bytes_ = 0;
};

/// A compiled grammar. Immutable.
class Grammar {
 public:
  /// `tokens` finds tokens that the grammar names (<|name|>). Throws std::runtime_error that says
  /// what is wrong and at which byte, GrammarTooCostly for one that is too large, GrammarMemoryFull
  /// for one that is so beside all others.
  static std::shared_ptr<const Grammar> compile(std::string_view text, const TokenTexts& tokens);

 private:
  friend class GrammarParser;
  friend class GrammarMatcher;

  enum class Type : uint8_t { kEnd, kRule, kSet, kToken, kNotToken };
  /// One symbol of an alternative; kEnd behind its last.
  struct Element {
    Type type = Type::kEnd;
    uint32_t value = 0;  ///< rule, set or token
  };
  /// Characters.
  struct Set {
    bool negated = false;
    std::vector<std::pair<uint32_t, uint32_t>> ranges;
    bool has(uint32_t c) const;
    /// Any of low to high.
    bool meets(uint32_t low, uint32_t high) const;
  };

  /// Where the alternatives of a rule begin in elements_.
  std::span<const uint32_t> alternatives(uint32_t rule) const {
    return std::span(begins_).subspan(rules_[rule], rules_[rule + 1] - rules_[rule]);
  }

  std::vector<Element> elements_;
  std::vector<Set> sets_;
  std::vector<uint32_t> begins_;  ///< of all alternatives, rule by rule
  std::vector<uint32_t> rules_;   ///< where those of each begin in begins_, and where the last end
  uint32_t root_ = 0;
  GrammarMemory memory_;
};

/// Follows texts through a grammar and remembers what it finds: shared by the choices of a request,
/// and used by one thread at a time.
class GrammarMatcher {
 public:
  /// Where a text stands; made by start() and advance().
  struct Position {
    int32_t state = -1;
    // A character of which some bytes are still to come.
    uint32_t partial = 0;
    uint8_t missing = 0;
    uint8_t length = 0;
    bool operator==(const Position&) const = default;
  };

  /// Both outlive the matcher.
  GrammarMatcher(std::shared_ptr<const Grammar> grammar, const TokenTexts& tokens);

  // All of these count what they do, and throw GrammarTooCostly when the budget is used up.

  Position start();
  /// `state` is -1 where the grammar does not allow it.
  Position advance(const Position& from, Token token) { return advance(from, token, text(token)); }
  /// With another text than the token's own (the end of it, say).
  Position advance(const Position& from, Token token, std::string_view text);
  bool allows(const Position& at, Token token);
  /// A bit for each token, by 64.
  const std::vector<uint64_t>& allowed(const Position& at);
  /// Whether the text may end here.
  bool may_end(const Position& at) const;

  /// From now on so many steps may be taken; one takes some nanoseconds.
  void set_budget(int64_t steps) { budget_ = steps; }
  int64_t budget() const { return budget_; }

 private:
  /// A stack of what is still to come: an element and what follows its alternative. Equal stacks
  /// are one node. Node 0 is the empty one: all has come.
  struct Node {
    uint32_t element = 0;
    int32_t below = 0;
  };
  /// A set of stacks whose tops are characters or tokens, or that are empty.
  struct State {
    std::vector<int32_t> nodes;  ///< sorted
    int32_t ascii = -1;          ///< its row in ascii_
    int32_t mask = -1;           ///< in masks_
    bool has_tokens = false;     ///< a top is a token
  };

  static constexpr int32_t kDead = -1;
  static constexpr int32_t kUnknown = -2;
  struct AsciiRow {
    int32_t next[128];
  };

  const std::string& text(Token token) const { return tokens_.text(token); }
  void spend(int64_t steps) {
    budget_ -= steps;
    if (budget_ < 0) throw_too_costly();
  }
  [[noreturn]] void throw_too_costly() const;
  int64_t bytes() const;
  /// Where there is no memory left, forgets first what can be found again.
  void count_memory();
  void forget();
  int32_t push(uint32_t element, int32_t below);
  /// Adds the nodes of a state that `node` leads to.
  void expand(int32_t node, std::vector<int32_t>& out);
  int32_t intern(std::vector<int32_t> nodes);
  int32_t next(int32_t state, uint32_t character);
  int32_t find_next(int32_t state, uint32_t character);
  bool meets(int32_t state, uint32_t low, uint32_t high);
  /// One byte; false: not allowed.
  bool step(Position& at, uint8_t byte);
  void fill(const Position& from, std::vector<uint64_t>& mask);

  const std::shared_ptr<const Grammar> grammar_;
  const TokenTexts& tokens_;
  int64_t budget_ = INT64_MAX;
  std::vector<Node> nodes_;
  std::vector<std::vector<int32_t>> expanded_;  ///< of each node; empty: not known yet
  std::unordered_map<uint64_t, int32_t> node_ids_;
  std::vector<State> states_;
  std::unordered_multimap<uint64_t, int32_t> state_ids_;  ///< by hash
  size_t state_entries_ = 0;
  GrammarMemory memory_;  ///< of all this and what follows
  bool forgot_ = false;   ///< and may have to find much again
  std::vector<AsciiRow> ascii_;
  std::unordered_map<uint64_t, int32_t> others_;  ///< state and character -> state
  std::vector<std::vector<uint64_t>> masks_;
  std::vector<uint64_t> scratch_;
  int32_t start_ = kUnknown;
};

}  // namespace relay::engine
