#include "engine/grammar_sampler.h"

#include <algorithm>
#include <cmath>

namespace relay::engine {

namespace {

// Steps of a matcher, of which a million takes some 20 ms, for all choices of a request together.
// What was not used for one token may be for later ones, up to a bound: the engine thread waits for
// no request's grammar longer than a tenth of a second or so.
constexpr int64_t kMostSteps = 6'000'000;
constexpr int64_t kStepsPerToken = 1'000'000;

}  // namespace

// --- GrammarTrigger

std::optional<size_t> GrammarTrigger::find(size_t added) const {
  std::optional<size_t> first;
  const auto note = [&](size_t at) { first = std::min(first.value_or(at), at); };
  for (const std::string& word : words) {
    // One that ends in what was added.
    const size_t reach = added + word.size() - 1;
    const size_t begin = seen_.size() > reach ? seen_.size() - reach : 0;
    if (const size_t at = seen_.find(word, begin); at != std::string::npos) note(at);
  }
  for (const Pattern& pattern : patterns) {
    if (pattern.whole && !seen_all_) continue;
    std::smatch match;
    const bool found = pattern.whole ? std::regex_match(seen_, match, pattern.regex)
                                     : std::regex_search(seen_, match, pattern.regex);
    if (!found) continue;
    size_t group = 0;
    for (size_t i = 1; i < match.size() && group == 0; ++i) {
      if (match.length(i) > 0) group = i;
    }
    note(static_cast<size_t>(match.position(group)));
  }
  return first;
}

std::optional<GrammarTrigger::Backlog> GrammarTrigger::feed(Token token, const std::string& text) {
  if (tokens.contains(token)) return Backlog{{token, text}};
  seen_ += text;
  recent_.emplace_back(token, text);
  const std::optional<size_t> start = find(text.size());
  if (start) {
    Backlog backlog;
    size_t at = seen_.size();
    for (auto it = recent_.rbegin(); it != recent_.rend() && at > *start; ++it) {
      at -= it->second.size();
      const size_t skipped = *start > at ? *start - at : 0;
      backlog.emplace_back(it->first, it->second.substr(skipped));
    }
    std::reverse(backlog.begin(), backlog.end());
    return backlog;
  }
  size_t dropped = 0;
  size_t bytes = 0;
  while (seen_.size() - bytes > kWindow) bytes += recent_[dropped++].second.size();
  seen_all_ = seen_all_ && dropped == 0;
  seen_.erase(0, bytes);
  recent_.erase(recent_.begin(), recent_.begin() + static_cast<std::ptrdiff_t>(dropped));
  return std::nullopt;
}

// --- GrammarSampler

GrammarSampler::GrammarSampler(std::shared_ptr<GrammarMatcher> matcher, const TokenTexts& texts,
                               int32_t choices, std::unique_ptr<RandomSampler> choice,
                               std::optional<GrammarTrigger> trigger,
                               std::unique_ptr<ThinkingWatch> thinking)
    : matcher_(std::move(matcher)),
      texts_(texts),
      choices_(choices),
      choice_(std::move(choice)),
      trigger_(std::move(trigger)),
      thinking_(std::move(thinking)),
      lazy_(trigger_.has_value()) {
  matcher_->set_budget(kMostSteps);
  at_ = matcher_->start();
}

void GrammarSampler::skip(const std::vector<Token>& written) {
  for (const Token token : written) advance(token, texts_.text(token));
}

void GrammarSampler::advance(Token token, const std::string& text) {
  if (texts_.is_end(token) && matcher_->may_end(at_)) return;
  at_ = matcher_->advance(at_, token, text);
  if (at_.state < 0) throw std::runtime_error("the grammar does not allow what is written already");
}

void GrammarSampler::feed(Token token) {
  if (!trigger_) {
    advance(token, texts_.text(token));
    return;
  }
  const auto backlog = trigger_->feed(token, texts_.text(token));
  if (!backlog) return;
  trigger_.reset();
  for (const auto& [past, text] : *backlog) advance(past, text);
}

void GrammarSampler::accept(Token token) {
  const bool awake = thinking_ == nullptr || !thinking_->thinking();
  if (thinking_ != nullptr) {
    thinking_->accept(token);
    if (!awake && !thinking_->thinking()) {
      for (const Token one : thinking_->end()) feed(one);
    }
  }
  if (awake) feed(token);
  choice_->accept(token);
}

Token GrammarSampler::choose(Model& model, int32_t row) {
  const std::span<const float> logits = model.logits(row);
  const Token free = choice_->choose(logits);
  if (free < 0 || !binds() || matcher_->allows(at_, free)) return free;
  const std::vector<uint64_t>& allowed = matcher_->allowed(at_);
  logits_.assign(logits.begin(), logits.end());
  for (size_t t = 0; t < logits_.size(); ++t) {
    const bool may = t / 64 < allowed.size() && (allowed[t / 64] >> (t % 64) & 1) != 0;
    if (!may) logits_[t] = -INFINITY;
  }
  const Token chosen = choice_->choose(logits_);
  if (chosen < 0 || logits_[static_cast<size_t>(chosen)] == -INFINITY) {
    throw EngineError(ErrorKind::kInvalidGrammar,
                      "The grammar allows no token of this model to follow what was generated.");
  }
  return chosen;
}

Token GrammarSampler::sample(Model& model, int32_t row) {
  Token token = -1;
  try {
    token = choose(model, row);
    if (token >= 0) accept(token);
  } catch (const GrammarMemoryFull& e) {
    throw EngineError(ErrorKind::kQueueFull,
                      std::string("This request was ended: ") + e.what() + ".");
  } catch (const GrammarTooCostly& e) {
    throw EngineError(ErrorKind::kInvalidGrammar,
                      std::string("This request was ended: ") + e.what() + ".");
  }
  matcher_->set_budget(std::min(kMostSteps, matcher_->budget() + kStepsPerToken / choices_));
  return token;
}

}  // namespace relay::engine
