// Fuzzing of what a request may bind its answer to, as it goes into llama.cpp: JSON schemas, the
// schemas of tools, grammars, and whole chats through a chat template, with an answer that is read
// back. The first byte chooses: its lowest two bits what the input is, the next one whether
// grammars are followed with a real vocabulary or one of bytes.
//
// Whatever the input, it is taken or refused with an exception, within the budgets; and what a
// schema converts to is a grammar that compiles.
#include <chat.h>
#include <llama-cpp.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

#include "engine/byte_texts.h"
#include "engine/engine.h"
#include "engine/json_schema.h"
#include "engine/large_stack.h"
#include "engine/tokenizer.h"
#include "json.h"
#include "require.h"
#include "server/errors.h"
#include "server/openai_request.h"

namespace {

using namespace relay::engine;

const TokenTexts& byte_vocabulary() {
  static const TokenTexts kTexts =
      byte_texts({"true", "null", "{\"", "\":", "aaa", "  ", "<|end|>"});
  return kTexts;
}

/// That of a small model, with tokens of many bytes, of parts of characters, and <|end|>.
const TokenTexts& real_vocabulary() {
  static const llama_model_ptr kModel = [] {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    return llama_model_ptr(llama_model_load_from_file(RELAY_FUZZ_VOCABULARY, params));
  }();
  require(kModel != nullptr, "the vocabulary can be loaded");
  static const Tokenizer kTokenizer(llama_model_get_vocab(kModel.get()), "");
  return kTokenizer.texts();
}

/// Goes along the last token that is allowed, a few times.
void follow(const std::string& grammar, const TokenTexts& texts) {
  GrammarMatcher matcher(Grammar::compile(grammar, texts), texts);
  matcher.set_budget(2'000'000);
  try {
    GrammarMatcher::Position at = matcher.start();
    for (int step = 0; step < 8 && at.state >= 0; ++step) {
      const std::vector<uint64_t> allowed = matcher.allowed(at);
      const auto has = [&](size_t t) { return (allowed[t / 64] >> (t % 64) & 1) != 0; };
      Token next = -1;
      for (size_t t = 0; t < texts.size(); ++t) {
        const auto token = static_cast<Token>(t);
        if (texts.is_end(token)) {
          require(matcher.may_end(at) == has(t), "an end is in the mask");
        } else if (has(t)) {
          next = token;
        }
      }
      if (next < 0) return;
      require(matcher.allows(at, next), "what the mask has is allowed");
      at = matcher.advance(at, next);
      require(at.state >= 0, "what is allowed can be taken");
    }
  } catch (const GrammarTooCostly&) {
  }
}

/// A chat, and behind a zero byte what the model answers; without one the chat is the answer too.
void render(const std::string& input, const TokenTexts& texts) {
  static const common_chat_templates_ptr kTemplates = [] {
    std::ifstream file(RELAY_FUZZ_TEMPLATE);
    return common_chat_templates_init(nullptr, {std::istreambuf_iterator<char>(file), {}});
  }();
  const size_t end = std::min(input.find('\0'), input.size());
  const std::string body = input.substr(0, end);
  const std::string answer = end < input.size() ? input.substr(end + 1) : body;
  relay::server::RequestLimits limits;
  limits.vocab_size = 1000;
  const auto request = relay::server::parse_chat_completion(body, limits);
  common_chat_templates_inputs inputs;
  inputs.messages =
      common_chat_msgs_parse_oaicompat(common_json::parse(request.chat.messages_json));
  SchemaBudget budget;
  if (!request.chat.tools_json.empty()) {
    inputs.tools = common_chat_tools_parse_oaicompat(common_json::parse(request.chat.tools_json));
    for (common_chat_tool& tool : inputs.tools) {
      if (!tool.parameters.empty()) {
        tool.parameters = plain_tool_schema(tool.parameters, tool.name, "tools", false, budget);
      }
    }
  }
  inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(request.chat.tool_choice);
  if (!request.chat.json_schema.empty()) {
    inputs.json_schema = plain_schema(request.chat.json_schema, "json_schema");
  }
  const common_chat_params chat = common_chat_templates_apply(kTemplates.get(), inputs);
  common_chat_parser_params parser(chat);
  if (!chat.parser.empty()) parser.parser.load(chat.parser);
  for (const bool is_partial : {true, false}) {
    try {
      const common_chat_msg message = common_chat_parse(answer, is_partial, parser);
      require(message.tool_calls.size() <= answer.size(), "a call has some text");
    } catch (const std::exception& e) {
      require(std::string_view(e.what()).size() < 100'000, "messages are bounded");
    }
  }
  if (!chat.grammar.empty()) follow(chat.grammar, texts);
}

void run(uint8_t which, const std::string& input) {
  const TokenTexts& texts = (which & 4) != 0 ? real_vocabulary() : byte_vocabulary();
  switch (which % 4) {
    case 0: {
      const std::string grammar = schema_to_grammar(input, "schema");
      try {
        follow(grammar, texts);
      } catch (const GrammarTooCostly&) {
      } catch (const std::exception& e) {
        // A pattern is written into the grammar as it is, and may be none.
        if (input.find("pattern") != std::string::npos) break;
        std::fprintf(stderr, "%s\n%s\n", e.what(), grammar.c_str());
        require(false, "a schema converts to a grammar that compiles");
      }
      break;
    }
    case 1: {
      SchemaBudget budget;
      plain_tool_schema(input, "f", "tools", false, budget);
      break;
    }
    case 2:
      follow(input, texts);
      break;
    case 3:
      render(input, texts);
      break;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string input(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    run_on_large_stack([&] { run(data[0], input); });
  } catch (const std::exception& e) {
    require(std::string_view(e.what()).size() < 100'000, "messages are bounded");
  }
  return 0;
}
