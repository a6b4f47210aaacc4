#include "engine/llama_sampler.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <stdexcept>

#include "common.h"
#include "engine/chat_templates.h"
#include "engine/json_schema.h"
#include "engine/random_sampler.h"
#include "sampling.h"

namespace relay::engine {

namespace {

/// A grammar of llama.cpp's, and our sampler as the end of its chain: it chooses freely, and again
/// among what the grammar allows if the grammar does not allow the first choice.
class GrammarSampler : public Sampler {
 public:
  GrammarSampler(const LlamaModel& model, common_params_sampling& params,
                 std::unique_ptr<RandomSampler> choice)
      : context_(model.context()), vocabulary_(static_cast<size_t>(model.vocab_size())) {
    choice_ = std::move(choice);
    params.no_perf = true;
    params.samplers.clear();
    sampler_.reset(common_sampler_init(model.model(), params));
    // llama.cpp ends each chain with a choice of its own.
    llama_sampler* chain = common_sampler_get(sampler_.get());
    llama_sampler_free(llama_sampler_chain_remove(chain, llama_sampler_chain_n(chain) - 1));
    llama_sampler_chain_add(chain, llama_sampler_init(&interface(), this));
  }
  GrammarSampler(const GrammarSampler&) = delete;
  GrammarSampler& operator=(const GrammarSampler&) = delete;

  /// The grammar of a chat begins with what the template has already written of the answer.
  void skip(const std::vector<Token>& written) {
    for (const Token t : written) common_sampler_accept(sampler_.get(), t, true);
    choice_->forget();  // penalties have not seen it
  }

  Token sample(Model& /*model*/, int32_t row) override {
    const Token token = common_sampler_sample(sampler_.get(), context_, row);
    common_sampler_accept(sampler_.get(), token, true);
    return token;
  }

 private:
  static GrammarSampler& self(const llama_sampler* s) {
    return *static_cast<GrammarSampler*>(s->ctx);
  }
  static llama_sampler_i& interface() {
    static llama_sampler_i calls = [] {
      llama_sampler_i i{};
      i.name = [](const llama_sampler*) { return "relay"; };
      i.accept = [](llama_sampler* s, llama_token token) { self(s).choice_->accept(token); };
      i.apply = [](llama_sampler* s, llama_token_data_array* candidates) {
        self(s).choose(*candidates);
      };
      return i;
    }();
    return calls;
  }

  void choose(llama_token_data_array& candidates) {
    logits_.assign(vocabulary_, -INFINITY);
    for (size_t i = 0; i < candidates.size; ++i) {
      logits_[static_cast<size_t>(candidates.data[i].id)] = candidates.data[i].logit;
    }
    const Token chosen = choice_->choose(logits_);
    // If nothing can be chosen, the first: llama.cpp wants one, and its grammar refuses it.
    candidates.selected = 0;
    for (size_t i = 0; i < candidates.size; ++i) {
      if (candidates.data[i].id == chosen) candidates.selected = static_cast<int64_t>(i);
    }
  }

  llama_context* context_;
  size_t vocabulary_;
  std::unique_ptr<RandomSampler> choice_;
  std::vector<float> logits_;
  common_sampler_ptr sampler_;
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

void add_grammar(const LlamaModel& model, const GenerateRequest& request,
                 common_params_sampling& params) {
  require(request.grammar.empty() || request.json_schema.empty(),
          "Only one of grammar and json_schema can be given.");
  if (!request.grammar.empty()) {
    params.grammar = {COMMON_GRAMMAR_TYPE_USER, request.grammar};
    return;
  }
  if (!request.json_schema.empty()) {
    params.grammar = {COMMON_GRAMMAR_TYPE_OUTPUT_FORMAT,
                      schema_to_grammar(request.json_schema, "json_schema")};
    return;
  }
  if (!request.format) return;
  const common_chat_params& chat = request.format->chat;
  if (chat.grammar.empty()) return;
  params.grammar = {COMMON_GRAMMAR_TYPE_TOOL_CALLS, chat.grammar};
  params.grammar_lazy = chat.grammar_lazy;
  params.preserved_tokens.insert(request.format->visible.begin(), request.format->visible.end());
  for (const common_grammar_trigger& trigger : chat.grammar_triggers) {
    common_grammar_trigger t = trigger;
    if (t.type == COMMON_GRAMMAR_TRIGGER_TYPE_WORD) {
      const auto ids = common_tokenize(model.vocab(), t.value, false, true);
      if (ids.size() == 1 && params.preserved_tokens.contains(ids.front())) {
        t.type = COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN;
        t.token = ids.front();
      }
    }
    params.grammar_triggers.push_back(t);
  }
  // While the model thinks, a lazy grammar must not wake up.
  if (chat.grammar_lazy && !chat.thinking_end_tags.empty()) {
    params.generation_prompt = chat.generation_prompt;
    params.reasoning_budget_start =
        common_tokenize(model.vocab(), chat.thinking_start_tag, false, true);
    for (const std::string& tag : chat.thinking_end_tags) {
      if (!tag.empty()) {
        params.reasoning_budget_end.push_back(common_tokenize(model.vocab(), tag, false, true));
      }
    }
    if (!params.reasoning_budget_end.empty()) {
      params.reasoning_budget_forced = params.reasoning_budget_end.front();
    }
  }
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
  common_params_sampling params;
  add_grammar(model, request, params);

  std::vector<std::unique_ptr<Sampler>> samplers;
  if (params.grammar.empty() && is_greedy(s)) {
    for (int32_t i = 0; i < request.n; ++i) {
      samplers.push_back(std::make_unique<GreedySampler>(model.excluded_tokens(s.ignore_eos)));
    }
    return samplers;
  }

  if (s.ignore_eos && !params.grammar.empty()) {
    throw EngineError(ErrorKind::kInvalidRequest,
                      "ignore_eos leaves nothing to choose once a grammar, a JSON schema or a tool "
                      "call is complete: use one without the other.",
                      "ignore_eos");
  }
  std::vector<Token> written;
  if (params.grammar.type == COMMON_GRAMMAR_TYPE_TOOL_CALLS && !params.grammar_lazy) {
    written = spell(model, request.format->chat.generation_prompt);
  }
  const uint32_t seed = s.seed ? *s.seed : std::random_device{}();
  for (int32_t i = 0; i < request.n; ++i) {
    auto choice = std::make_unique<RandomSampler>(
        s, seed + static_cast<uint32_t>(i), model.excluded_tokens(s.ignore_eos), request.prompt);
    if (params.grammar.empty()) {
      samplers.push_back(std::move(choice));
      continue;
    }
    try {
      auto sampler = std::make_unique<GrammarSampler>(model, params, std::move(choice));
      if (!written.empty()) sampler->skip(written);
      samplers.push_back(std::move(sampler));
    } catch (const std::exception& e) {
      throw EngineError(ErrorKind::kInvalidGrammar,
                        std::string("The grammar does not compile: ") + e.what() + ".",
                        field_of_grammar(request));
    }
  }
  return samplers;
}

}  // namespace relay::engine
