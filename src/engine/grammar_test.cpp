#include "engine/grammar.h"

#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "engine/byte_texts.h"
#include "engine/fake_model.h"
#include "engine/grammar_sampler.h"
#include "engine/token_bound.h"

namespace relay::engine {
namespace {

std::string error_of(const std::string& grammar) {
  static const TokenTexts texts = byte_texts({"<|call|>"});
  try {
    Grammar::compile(grammar, texts);
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

/// Whether the grammar allows exactly this text, byte by byte.
bool matches(const std::string& grammar, const std::string& text) {
  const TokenTexts texts = byte_texts();
  GrammarMatcher matcher(Grammar::compile(grammar, texts), texts);
  GrammarMatcher::Position at = matcher.start();
  for (const char c : text) {
    const auto token = static_cast<Token>(1 + static_cast<unsigned char>(c));
    const std::vector<uint64_t> mask = matcher.allowed(at);
    const bool in_mask = (mask[static_cast<size_t>(token) / 64] >> (token % 64) & 1) != 0;
    const bool allowed = matcher.allows(at, token);
    if (c != '\0') {
      EXPECT_EQ(in_mask, allowed) << grammar << " at " << token;
    }
    if (!allowed) return false;
    at = matcher.advance(at, token);
  }
  EXPECT_EQ((matcher.allowed(at)[0] & 1) != 0, matcher.may_end(at)) << grammar;
  return matcher.may_end(at);
}

TEST(Grammar, MatchesWhatItSays) {
  struct Case {
    const char* grammar;
    std::vector<const char*> yes;
    std::vector<const char*> no;
  };
  const std::vector<Case> cases = {
      {"root ::= \"yes\" | \"no\"", {"yes", "no"}, {"", "y", "yesno"}},
      {"root ::= [a-c]+", {"a", "abcabc"}, {"", "d", "abd"}},
      {"root ::= [^a-c]", {"d", "é", "😀", "\n"}, {"a", "dd", ""}},
      {"root ::= .", {"d", "é"}, {"", "éé"}},
      {"root ::= \"\\x41\\u00e9\\U0001F600\\n\\t\\\\\\\"\"", {"Aé😀\n\t\\\""}, {"A"}},
      {"root ::= [\\]\\-a]*", {"", "]-a]"}, {"b"}},
      {"root ::= [a-]+", {"a-a"}, {"b"}},
      {"root ::= \"ab\"{2}", {"abab"}, {"ab", "ababab", "aabb"}},
      {"root ::= \"a\"{2,}", {"aa", "aaaaa"}, {"a", ""}},
      {"root ::= \"a\"{0,3}", {"", "a", "aaa"}, {"aaaa"}},
      {"root ::= \"a\"{1,3} \"b\"", {"ab", "aaab"}, {"b", "aaaab"}},
      {"root ::= (\"a\" | \"b\" \"c\")* \"d\"?", {"", "abca", "bcd", "d"}, {"b", "dd"}},
      {"root ::= x y # words\nx ::= \"1\" |\n  \"2\"\n\n# more\ny ::= (\n\"3\"\n|\"4\")",
       {"13", "24"},
       {"1", "12"}},
      {"root ::= \"(\" root \")\" | \"\"", {"", "()", "((()))"}, {"(", "())"}},
      // Ways that end in the same place, and empty ones in a circle.
      {"root ::= ((\"a\"?)*)*", {"", "aaa"}, {"b"}},
      {"root ::= e e root | \"b\"\ne ::= \"a\"?\n", {"b", "aaab"}, {"", "a"}},
      {"root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"a\"",
       {"a", "aaabc", "aaacb"},
       {"b", "aabbb"}},
      {"root ::= \"\"*", {""}, {"a"}},
  };
  for (const Case& c : cases) {
    for (const char* text : c.yes)
      EXPECT_TRUE(matches(c.grammar, text)) << c.grammar << ": " << text;
    for (const char* text : c.no)
      EXPECT_FALSE(matches(c.grammar, text)) << c.grammar << ": " << text;
  }
}

TEST(Grammar, ErrorsSayWhatAndWhere) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"", "no rule named root"},
      {"other ::= \"a\"", "no rule named root"},
      {"root ::= thing", "thing is not defined"},
      {"root ::= (", ") is expected at byte 10"},
      {"root ::= \"a", "unexpected end"},
      {"root ::= [a", "unexpected end"},
      {"root ::= [a-", "unexpected end"},
      {"root = \"a\"", "::= is expected at byte 5"},
      {"root ::= *", "nothing to repeat"},
      {"root ::= \"a\"{5,2}", "a repetition ends below its beginning"},
      {"root ::= \"a\"{", "a number is expected"},
      {"root ::= \"a\"{2", "} is expected"},
      {"root ::= \"a\"{99999999999999999999}", "repetitions are not supported"},
      {"root ::= \"\\q\"", "unknown escape"},
      {"root ::= \"\\u12\"", "hexadecimal"},
      {"root ::= \"\x80\x80\"", "text that is not UTF-8"},
      {"root ::= \"\xE2\x82\"", "text that is not UTF-8"},
      {"root ::= <|none|>", "a token that the vocabulary does not have"},
      {"root ::= <[99999]>", "the number of a token"},
      {"root ::= root \"a\" | \"a\"", "the rule root begins with itself"},
      {"root ::= x\nx ::= y \"a\"\ny ::= z? x\nz ::= \"b\"", "begins with itself"},
      {"root ::= e root \"x\" | \"b\"\ne ::= \"a\"?", "begins with itself"},
      {"root ::= \"a\" )", "an unexpected character"},
      {"root ::= []", "an empty set"},
      {"root ::= [az-b]", "a range that ends below its beginning"},
  };
  for (const auto& [grammar, words] : cases) {
    EXPECT_NE(error_of(grammar).find(words), std::string::npos)
        << grammar << ": " << error_of(grammar);
  }
}

TEST(Grammar, WhatIsTooLargeIsRefusedAtOnce) {
  const auto begin = std::chrono::steady_clock::now();
  const std::string deep = "root ::= " + std::string(100'000, '(');
  EXPECT_NE(error_of(deep).find("nested deeper"), std::string::npos);
  EXPECT_EQ(error_of("root ::= (((\"x\"{0,1000}){0,1000}){0,1000})"), "");
  std::string literals = "root ::= ";
  for (int i = 0; i < 200; ++i) literals += "\"" + std::string(1000, 'x') + "\"{100000} ";
  EXPECT_NE(error_of(literals).find("too large"), std::string::npos);
  // Rules that refer to one another in 2^40 ways, and a chain of 20,000.
  const auto name = [](int i) { return std::string("a").append(std::to_string(i)); };
  std::string ways = "root ::= a0\n";
  for (int i = 0; i < 40; ++i) {
    ways.append(name(i)).append(" ::= ").append(name(i + 1));
    ways.append(" | ").append(name(i + 1)).append("\n");
  }
  EXPECT_EQ(error_of(ways + "a40 ::= \"x\"\n"), "");
  std::string chain = "root ::= a0\n";
  for (int i = 0; i < 20'000; ++i) {
    chain.append(name(i)).append(" ::= ").append(name(i + 1));
    chain.append(" ").append(name(i + 1)).append("\n");
  }
  EXPECT_EQ(error_of(chain + "a20000 ::= \"\"\n"), "");
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
}

TEST(Grammar, TokensAreNamed) {
  const TokenTexts texts = byte_texts({"<|call|>", "<|end|>", "ab"});
  const Token call = texts.find("<|call|>");
  const Token end = texts.find("<|end|>");
  GrammarMatcher matcher(
      Grammar::compile("root ::= <|call|> [a-z]* !<|call|> <[" + std::to_string(end) + "]>", texts),
      texts);
  auto at = matcher.start();
  EXPECT_TRUE(matcher.allows(at, call));
  EXPECT_FALSE(matcher.allows(at, 1 + '<'));
  at = matcher.advance(at, call);
  EXPECT_FALSE(matcher.allows(at, call));
  EXPECT_TRUE(matcher.allows(at, end));
  at = matcher.advance(at, texts.find("ab"));
  at = matcher.advance(at, texts.find("ab"));
  EXPECT_FALSE(matcher.may_end(at));
  at = matcher.advance(at, end);
  EXPECT_TRUE(matcher.may_end(at));
}

TEST(Grammar, CharactersMaySpanTokens) {
  const TokenTexts texts = byte_texts();
  GrammarMatcher matcher(Grammar::compile("root ::= [é-ü]+", texts), texts);
  auto at = matcher.start();
  EXPECT_FALSE(matcher.allows(at, 1 + 0xC2)) << "no character of the set begins so";
  ASSERT_TRUE(matcher.allows(at, 1 + 0xC3));
  at = matcher.advance(at, 1 + 0xC3);
  EXPECT_FALSE(matcher.may_end(at));
  EXPECT_FALSE(matcher.allows(at, 1 + 0xA8)) << "è";
  EXPECT_FALSE(matcher.allows(at, 1 + 'a'));
  at = matcher.advance(at, 1 + 0xA9);
  EXPECT_TRUE(matcher.may_end(at));
}

/// All words of one to ten letters, and each with something behind that no letter is.
TokenTexts wordy_texts() {
  std::vector<std::string> longer;
  std::string word;
  for (int i = 0; i < 30'000; ++i) {
    word.clear();
    for (unsigned seed = static_cast<unsigned>(i) * 2654435761u, n = 0; n < 1 + seed % 10; ++n) {
      word += static_cast<char>('a' + (seed >> n) % 26);
    }
    longer.push_back(word);
    longer.push_back(word + "(");
  }
  return byte_texts(std::move(longer));
}

TEST(Grammar, ManyWaysAtOnceAreFollowedTogether) {
  const TokenTexts texts = wordy_texts();
  std::string grammar = "root ::= ";
  for (int i = 0; i < 40; ++i) grammar += "[a-z]? ";
  GrammarMatcher matcher(Grammar::compile(grammar, texts), texts);
  matcher.set_budget(6'000'000);  // what a request has for its first token
  auto at = matcher.start();
  size_t allowed = 0;
  for (const uint64_t bits : matcher.allowed(at)) allowed += std::popcount(bits);
  EXPECT_GT(allowed, 30'000u);
  for (int i = 0; i < 40; ++i) at = matcher.advance(at, 1 + 'a');
  EXPECT_TRUE(matcher.may_end(at));
  EXPECT_FALSE(matcher.allows(at, 1 + 'a'));
}

TEST(Grammar, TheBudgetEnds) {
  const TokenTexts texts = byte_texts();
  // After n letters a, 2^n stacks.
  GrammarMatcher matcher(
      Grammar::compile("root ::= \"a\" root \"b\" | \"a\" root [bc] | \"a\"", texts), texts);
  auto at = matcher.start();
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_THROW(
      {
        for (int i = 0; i < 100; ++i) {
          matcher.set_budget(10'000'000);
          at = matcher.advance(at, 1 + 'a');
        }
      },
      GrammarTooCostly);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
}

/// For a while all grammars together may hold no more than this, beyond what they hold already.
class MemoryLimit {
 public:
  explicit MemoryLimit(int64_t bytes)
      : before_(GrammarMemory::set_limit(GrammarMemory::total() + bytes)) {}
  ~MemoryLimit() { GrammarMemory::set_limit(before_); }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;

 private:
  const int64_t before_;
};

TEST(Grammar, AllGrammarsTogetherHoldABoundedMemory) {
  const TokenTexts texts = byte_texts();
  const int64_t before = GrammarMemory::total();
  const MemoryLimit limit(int64_t{64} << 20);
  const char* large = "root ::= [a]{0,100000} [b]{0,100000}";
  std::vector<std::shared_ptr<const Grammar>> held;
  EXPECT_THROW(
      {
        while (held.size() < 100) held.push_back(Grammar::compile(large, texts));
      },
      GrammarMemoryFull);
  EXPECT_GE(held.size(), 4u);
  EXPECT_LE(GrammarMemory::total() - before, int64_t{64} << 20);
  // Others are served; once one of the large is gone, the next is.
  EXPECT_NO_THROW(Grammar::compile("root ::= [a]{0,10000}", texts));
  held.pop_back();
  EXPECT_NO_THROW(Grammar::compile(large, texts));
  held.clear();
  EXPECT_EQ(GrammarMemory::total(), before);
}

TEST(Grammar, WhatAMatcherRemembersCounts) {
  const TokenTexts texts = byte_texts();
  const int64_t before = GrammarMemory::total();
  const MemoryLimit limit(int64_t{8} << 20);
  {
    const auto grammar = Grammar::compile("root ::= ([a-z]? [a-z]?){0,5000}", texts);
    std::vector<std::unique_ptr<GrammarMatcher>> matchers;
    const auto follow = [&] {
      for (int i = 0; i < 20; ++i) {
        matchers.push_back(std::make_unique<GrammarMatcher>(grammar, texts));
        GrammarMatcher& matcher = *matchers.back();
        auto at = matcher.start();
        for (int step = 0; step < 40; ++step) at = matcher.advance(at, 1 + 'a');
      }
    };
    EXPECT_THROW(follow(), GrammarMemoryFull);
    EXPECT_LE(GrammarMemory::total() - before, int64_t{8} << 20);
    GrammarMatcher small(Grammar::compile("root ::= [a-z]+", texts), texts);
    EXPECT_TRUE(small.allows(small.start(), 1 + 'a'));
  }
  EXPECT_EQ(GrammarMemory::total(), before);
}

/// In UTF-8; of two bytes or more.
std::string utf8(uint32_t c) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

TEST(Grammar, WhatAMatcherCanFindAgainCountsToo) {
  const TokenTexts texts = byte_texts(std::vector<std::string>(60'000, "longer"));
  const auto grammar = Grammar::compile("root ::= [a\u0430]{8000}", texts);
  /// Bytes that a matcher takes for 4000 steps.
  const auto taken = [&](const std::string& character, bool masks) {
    const int64_t before = GrammarMemory::total();
    GrammarMatcher matcher(grammar, texts);
    auto at = matcher.start();
    for (int step = 0; step < 4000; ++step) {
      if (masks && step % 10 == 0) matcher.allowed(at);
      at = matcher.advance(at, 1, character);
    }
    EXPECT_GE(at.state, 0);
    return GrammarMemory::total() - before;
  };
  const int64_t others = taken(utf8(0x430), false);
  EXPECT_GE(taken("a", false) - others, 4000 * 400) << "a row of 128 places each";
  EXPECT_GE(taken(utf8(0x430), true) - others, 400 * 60'000 / 8) << "a bit for each token";
  const int64_t before = GrammarMemory::total();
  GrammarMatcher matcher(Grammar::compile("root ::= [\u0800-\uFFFF]+", texts), texts);
  auto at = matcher.start();
  for (uint32_t c = 0x800; c < 0xD800; ++c) at = matcher.advance(at, 1, utf8(c));
  EXPECT_GE(GrammarMemory::total() - before, 40 * (0xD800 - 0x800)) << "a place for each character";
}

TEST(Grammar, WhereMemoryIsFullAMatcherForgetsWhatItCanFindAgain) {
  const TokenTexts texts = byte_texts();
  const int64_t before = GrammarMemory::total();
  constexpr int64_t kLimit = int64_t{4} << 20;
  const MemoryLimit limit(kLimit);
  {
    GrammarMatcher matcher(Grammar::compile("root ::= [a\u0800-\U0001FFFF]+", texts), texts);
    const auto start = matcher.start();
    auto at = matcher.advance(start, 1, "a");
    const auto loop = at;
    for (uint32_t c = 0x800; c < 0x20000; ++c) {  // would take 6 MB
      if (c >= 0xD800 && c < 0xE000) continue;
      at = matcher.advance(at, 1, utf8(c));
      ASSERT_EQ(at, loop) << c;
      ASSERT_LE(GrammarMemory::total() - before, kLimit);
    }
    EXPECT_EQ(matcher.advance(at, 1, "b").state, -1);
    EXPECT_TRUE(matcher.allows(at, 1 + 'a'));
    EXPECT_TRUE(matcher.may_end(at));
    // To find it again may be too much: that is for want of memory, and may be asked for later.
    matcher.set_budget(2);
    EXPECT_THROW(matcher.advance(at, 1, utf8(0x800)), GrammarMemoryFull);
  }
  EXPECT_EQ(GrammarMemory::total(), before);
}

/// Logits that are the same for every row; token 1 + 'z' is the likeliest.
class FixedLogits : public FakeModel {
 public:
  explicit FixedLogits(size_t vocab) : FakeModel(8), logits_(vocab) { logits_[1 + 'z'] = 1; }
  std::span<const float> logits(int32_t /*row*/) override { return logits_; }

 private:
  std::vector<float> logits_;
};

std::unique_ptr<GrammarSampler> make_sampler(const std::shared_ptr<GrammarMatcher>& matcher,
                                             const TokenTexts& texts, int32_t choices) {
  SamplingParams greedy;
  greedy.temperature = 0;
  auto choice =
      std::make_unique<RandomSampler>(greedy, 1, std::vector<Token>{}, std::vector<Token>{});
  return std::make_unique<GrammarSampler>(matcher, texts, choices, std::move(choice), std::nullopt,
                                          nullptr);
}

TEST(GrammarSampler, ChoosesWhatTheGrammarAllows) {
  const TokenTexts texts = byte_texts();
  FixedLogits model(texts.size());
  const auto matcher = std::make_shared<GrammarMatcher>(
      Grammar::compile("root ::= \"a\" [x-z] \"b\"", texts), texts);
  const auto sampler = make_sampler(matcher, texts, 1);
  for (const char c : {'a', 'z', 'b'}) EXPECT_EQ(sampler->sample(model, 0), 1 + c);
  EXPECT_EQ(sampler->sample(model, 0), 0) << "the end";
  EXPECT_THROW(make_sampler(matcher, texts, 1)->skip({1 + 'b'}), std::runtime_error);
}

TEST(GrammarSampler, TheChoicesOfARequestShareItsBudget) {
  const TokenTexts texts = byte_texts();
  FixedLogits model(texts.size());
  for (const int32_t choices : {1, 4}) {
    const auto matcher =
        std::make_shared<GrammarMatcher>(Grammar::compile("root ::= [a-z]*", texts), texts);
    std::vector<std::unique_ptr<GrammarSampler>> samplers;
    for (int32_t i = 0; i < choices; ++i) samplers.push_back(make_sampler(matcher, texts, choices));
    const auto step = [&] {
      for (const auto& sampler : samplers) sampler->sample(model, 0);
    };
    step();  // what there is to remember is remembered
    matcher->set_budget(1'000'000);
    step();
    // All of them together get what one would, less the little that they have used.
    EXPECT_GT(matcher->budget(), 1'990'000) << choices;
    EXPECT_LE(matcher->budget(), 2'000'000) << choices;
    for (int i = 0; i < 20; ++i) step();
    EXPECT_LE(matcher->budget(), 6'000'000) << "it is bounded";
    EXPECT_GT(matcher->budget(), 5'900'000);
    matcher->set_budget(1);
    EXPECT_THROW(step(), EngineError);
  }
}

TEST(GrammarTrigger, WordsBeginWhereTheyBegin) {
  GrammarTrigger trigger;
  trigger.words = {"<tool>", "[CALL]"};
  EXPECT_FALSE(trigger.feed(1, "some text <to"));
  const auto backlog = trigger.feed(2, "ol> and");
  ASSERT_TRUE(backlog);
  EXPECT_EQ(*backlog, (GrammarTrigger::Backlog{{1, "<to"}, {2, "ol> and"}}));
}

TEST(GrammarTrigger, LongTextsAreNotLookedAtAgain) {
  GrammarTrigger trigger;
  trigger.words = {"<tool>"};
  trigger.patterns.push_back({std::regex("call(x+)"), false});
  trigger.patterns.push_back({std::regex("^a+$"), true});
  const auto begin = std::chrono::steady_clock::now();
  ASSERT_FALSE(trigger.feed(1, "b"));
  for (int i = 0; i < 3000; ++i) ASSERT_FALSE(trigger.feed(2, std::string(30, 'a')));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
  const auto backlog = trigger.feed(3, "callxx");
  ASSERT_TRUE(backlog);
  EXPECT_EQ(*backlog, (GrammarTrigger::Backlog{{3, "xx"}}));
}

TEST(GrammarTrigger, TokensAndWholeTexts) {
  GrammarTrigger trigger;
  trigger.tokens = {7};
  trigger.patterns.push_back({std::regex("^ +to$"), true});
  GrammarTrigger other = trigger;
  EXPECT_EQ(trigger.feed(7, "<call>"), (GrammarTrigger::Backlog{{7, "<call>"}}));
  EXPECT_FALSE(other.feed(1, " "));
  EXPECT_EQ(other.feed(2, " to"), (GrammarTrigger::Backlog{{1, " "}, {2, " to"}}));
}

TEST(TokenBound, IsNeverAboveWhatATokenizerMakes) {
  const TokenTexts texts = byte_texts({"aa", "aaaaaaaa", "ab", "the ", "é"});
  const TokenBound bound(texts);
  EXPECT_EQ(bound.at_least("", 10), 0);
  EXPECT_EQ(bound.at_least("x", 10), 1);
  EXPECT_EQ(bound.at_least(std::string(80, 'a'), 100), 10);
  EXPECT_LE(bound.at_least("the the abab", 100), 4);
  EXPECT_GT(bound.at_least(std::string(1000, 'x'), 100), 100);
  EXPECT_EQ(bound.at_least(std::string(1000, 'x'), 2000), 1000);
}

}  // namespace
}  // namespace relay::engine
