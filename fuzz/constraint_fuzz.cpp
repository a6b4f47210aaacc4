// Fuzzing of what a request may bind its answer to, as it goes into llama.cpp: JSON schemas, the
// schemas of tools, grammars, and whole chats through a chat template. The first byte chooses.
//
// Whatever the input, it is taken or refused with an exception, within the budgets; and what a
// schema converts to is a grammar that compiles.
#include <chat.h>

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
#include "json.h"
#include "require.h"
#include "server/errors.h"
#include "server/openai_request.h"

namespace {

using namespace relay::engine;

const TokenTexts& texts() {
  static const TokenTexts kTexts =
      byte_texts({"true", "null", "{\"", "\":", "aaa", "  ", "<|end|>"});
  return kTexts;
}

/// Goes along the first token that is allowed, a few times.
void follow(const std::string& grammar) {
  GrammarMatcher matcher(Grammar::compile(grammar, texts()), texts());
  matcher.set_budget(2'000'000);
  try {
    GrammarMatcher::Position at = matcher.start();
    for (int step = 0; step < 8 && at.state >= 0; ++step) {
      const std::vector<uint64_t> allowed = matcher.allowed(at);
      Token next = -1;
      for (size_t t = texts().size(); t-- > 1 && next < 0;) {
        if ((allowed[t / 64] >> (t % 64) & 1) != 0) next = static_cast<Token>(t);
      }
      require(matcher.may_end(at) == ((allowed[0] & 1) != 0), "an end is in the mask");
      if (next < 0) return;
      require(matcher.allows(at, next), "what the mask has is allowed");
      at = matcher.advance(at, next);
      require(at.state >= 0, "what is allowed can be taken");
    }
  } catch (const GrammarTooCostly&) {
  }
}

void render(const std::string& body) {
  static const common_chat_templates_ptr kTemplates = [] {
    std::ifstream file(RELAY_FUZZ_TEMPLATE);
    return common_chat_templates_init(nullptr, {std::istreambuf_iterator<char>(file), {}});
  }();
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
        tool.parameters = plain_tool_schema(tool.parameters, "tools", false, budget);
      }
    }
  }
  inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(request.chat.tool_choice);
  if (!request.chat.json_schema.empty()) {
    inputs.json_schema = plain_schema(request.chat.json_schema, "json_schema");
  }
  const common_chat_params chat = common_chat_templates_apply(kTemplates.get(), inputs);
  if (!chat.grammar.empty()) follow(chat.grammar);
}

void run(uint8_t which, const std::string& input) {
  switch (which % 4) {
    case 0: {
      const std::string grammar = schema_to_grammar(input, "schema");
      try {
        follow(grammar);
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
      plain_tool_schema(input, "tools", false, budget);
      break;
    }
    case 2:
      follow(input);
      break;
    case 3:
      render(input);
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
