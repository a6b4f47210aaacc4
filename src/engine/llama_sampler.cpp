#include "engine/llama_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <regex>

#include "common.h"
#include "engine/chat_templates.h"
#include "engine/grammar_sampler.h"
#include "engine/json_schema.h"
#include "engine/random_sampler.h"
#include "llama-cpp.h"
#include "reasoning-budget.h"

namespace relay::engine {

namespace {

/// Thinking as llama.cpp's reasoning budget sees it, without a budget.
class ReasoningWatch : public ThinkingWatch {
 public:
  ReasoningWatch(const LlamaModel& model, const llama_tokens& start,
                 const std::vector<llama_tokens>& ends)
      : sampler_(common_reasoning_budget_init(model.vocab(), {start}, ends, ends.front(),
                                              std::numeric_limits<int32_t>::max())) {}

  bool thinking() const override {
    const auto state = common_reasoning_budget_get_state(sampler_.get());
    return state != REASONING_BUDGET_IDLE && state != REASONING_BUDGET_DONE;
  }
  void accept(Token token) override { llama_sampler_accept(sampler_.get(), token); }
  std::vector<Token> end() const override {
    if (common_reasoning_budget_get_state(sampler_.get()) != REASONING_BUDGET_DONE) return {};
    const llama_tokens* end = common_reasoning_budget_get_end_match(sampler_.get());
    return end == nullptr ? std::vector<Token>{} : *end;
  }

 private:
  llama_sampler_ptr sampler_;
};

void require(bool ok, const std::string& message) {
  if (!ok) throw EngineError(ErrorKind::kInvalidRequest, message);
}

void check(const SamplingParams& s, int32_t vocab_size) {
  // Written so that NaN fails.
  require(s.temperature >= 0.0f && s.temperature <= 100.0f, "temperature must be 0 to 100.");
  require(s.top_p > 0.0f && s.top_p <= 1.0f, "top_p must be above 0 and at most 1.");
  require(s.min_p >= 0.0f && s.min_p <= 1.0f, "min_p must be 0 to 1.");
  require(std::abs(s.presence_penalty) <= 2.0f, "presence_penalty must be -2 to 2.");
  require(std::abs(s.frequency_penalty) <= 2.0f, "frequency_penalty must be -2 to 2.");
  require(s.repetition_penalty > 0.0f && s.repetition_penalty <= 100.0f,
          "repetition_penalty must be above 0 and at most 100.");
  require(s.logprobs <= 20, "at most 20 log probabilities can be had per token.");
  for (const auto& [token, bias] : s.logit_bias) {
    require(token >= 0 && token < vocab_size, "logit_bias names token " + std::to_string(token) +
                                                  ", which is not in the vocabulary.");
    require(!std::isnan(bias), "logit_bias must be numbers.");
  }
}

/// Whether the most probable token is all that is asked for.
bool is_greedy(const SamplingParams& s) {
  return s.temperature <= 0.0f && s.presence_penalty == 0.0f && s.frequency_penalty == 0.0f &&
         s.repetition_penalty == 1.0f && s.logit_bias.empty();
}

/// Tokens that spell exactly this text. The tokenizer alone may not: some put a space in front.
std::vector<Token> spell(const LlamaModel& model, const std::string& text) {
  if (text.empty()) return {};
  for (const char* before : {"", "\n", "a\n"}) {
    const std::vector<Token> tokens = model.tokenize(before + text, false, true);
    std::string tail;
    for (size_t i = tokens.size(); i-- > 0 && tail.size() < text.size();) {
      tail.insert(0, model.piece(tokens[i], true));
      if (tail == text) return {tokens.begin() + static_cast<std::ptrdiff_t>(i), tokens.end()};
    }
  }
  throw EngineError(ErrorKind::kInvalidGrammar,
                    "The tokenizer of this model cannot spell the beginning of the answer, so its "
                    "grammar cannot be used.");
}

/// The grammar that binds the request; empty: none.
std::string grammar_of(const GenerateRequest& request) {
  require(request.grammar.empty() || request.json_schema.empty(),
          "Only one of grammar and json_schema can be given.");
  if (!request.grammar.empty()) return request.grammar;
  if (!request.json_schema.empty()) return schema_to_grammar(request.json_schema, "json_schema");
  return request.format ? request.format->chat.grammar : "";
}

/// Whether it is that of the chat's template.
bool is_of_template(const GenerateRequest& request) {
  return request.grammar.empty() && request.json_schema.empty() && request.format;
}

std::optional<GrammarTrigger> trigger_of(const LlamaModel& model, const OutputFormat& format) {
  if (!format.chat.grammar_lazy) return std::nullopt;
  GrammarTrigger result;
  for (const common_grammar_trigger& trigger : format.chat.grammar_triggers) {
    switch (trigger.type) {
      case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:
        result.tokens.insert(trigger.token);
        break;
      case COMMON_GRAMMAR_TRIGGER_TYPE_WORD: {
        const auto ids = common_tokenize(model.vocab(), trigger.value, false, true);
        if (ids.size() == 1 && format.visible.contains(ids.front())) {
          result.tokens.insert(ids.front());
        } else if (!trigger.value.empty()) {
          result.words.push_back(trigger.value);
        }
        break;
      }
      case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN:
      case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL: {
        const std::string& pattern = trigger.value;
        const bool anchored = pattern.starts_with('^') && pattern.ends_with('$');
        const bool full = trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL;
        result.patterns.push_back({std::regex(pattern), anchored || full});
        break;
      }
    }
  }
  return result;
}

/// While the model thinks, a lazy grammar must not wake up.
std::unique_ptr<ThinkingWatch> thinking_of(const LlamaModel& model, const OutputFormat& format) {
  const common_chat_params& chat = format.chat;
  if (!chat.grammar_lazy || chat.thinking_end_tags.empty()) return nullptr;
  const auto start = common_tokenize(model.vocab(), chat.thinking_start_tag, false, true);
  std::vector<llama_tokens> ends;
  for (const std::string& tag : chat.thinking_end_tags) {
    if (!tag.empty()) ends.push_back(common_tokenize(model.vocab(), tag, false, true));
  }
  if (start.empty() || ends.empty()) return nullptr;
  auto watch = std::make_unique<ReasoningWatch>(model, start, ends);
  for (const Token token : common_tokenize(model.vocab(), chat.generation_prompt, false, true)) {
    watch->accept(token);
  }
  return watch;
}

/// The field to blame.
std::string field_of_grammar(const GenerateRequest& request) {
  if (!request.grammar.empty()) return "grammar";
  return request.json_schema.empty() ? request.format->constrained_by : "json_schema";
}

}  // namespace

std::vector<std::unique_ptr<Sampler>> make_samplers(const LlamaModel& model,
                                                    const GenerateRequest& request) {
  const SamplingParams& s = request.sampling;
  check(s, model.vocab_size());
  const std::string text = grammar_of(request);

  std::vector<std::unique_ptr<Sampler>> samplers;
  if (text.empty() && is_greedy(s)) {
    for (int32_t i = 0; i < request.n; ++i) {
      samplers.push_back(std::make_unique<GreedySampler>(model.excluded_tokens(s.ignore_eos)));
    }
    return samplers;
  }

  if (s.ignore_eos && !text.empty()) {
    throw EngineError(ErrorKind::kInvalidRequest,
                      "ignore_eos leaves nothing to choose once a grammar, a JSON schema or a tool "
                      "call is complete: use one without the other.",
                      "ignore_eos");
  }
  const uint32_t seed = s.seed ? *s.seed : std::random_device{}();
  const auto make_choice = [&](int32_t i) {
    return std::make_unique<RandomSampler>(s, seed + static_cast<uint32_t>(i),
                                           model.excluded_tokens(s.ignore_eos), request.prompt);
  };
  if (text.empty()) {
    for (int32_t i = 0; i < request.n; ++i) samplers.push_back(make_choice(i));
    return samplers;
  }
  try {
    const TokenTexts& texts = model.token_texts();
    const auto matcher = std::make_shared<GrammarMatcher>(Grammar::compile(text, texts), texts);
    const bool of_template = is_of_template(request);
    for (int32_t i = 0; i < request.n; ++i) {
      auto sampler = std::make_unique<GrammarSampler>(
          matcher, texts, request.n, make_choice(i),
          of_template ? trigger_of(model, *request.format) : std::nullopt,
          of_template ? thinking_of(model, *request.format) : nullptr);
      // The grammar of a chat begins with what the template has already written of the answer.
      if (of_template && !request.format->chat.grammar_lazy) {
        sampler->skip(spell(model, request.format->chat.generation_prompt));
      }
      samplers.push_back(std::move(sampler));
    }
  } catch (const EngineError&) {
    throw;
  } catch (const GrammarMemoryFull& e) {
    throw EngineError(ErrorKind::kQueueFull, std::string("Try again later: ") + e.what() + ".");
  } catch (const std::exception& e) {
    throw EngineError(ErrorKind::kInvalidGrammar,
                      std::string("The grammar does not compile: ") + e.what() + ".",
                      field_of_grammar(request));
  }
  return samplers;
}

}  // namespace relay::engine
