// Fuzzing of everything that reads a request before the engine sees it: JSON, the request parsers
// of each API, the router, and keys. The first byte chooses the parser, the rest is the input.
//
// Whatever the input, the parsers either accept it within their limits or throw an ApiError with a
// status of 4xx and a well-formed, bounded body. Anything else aborts.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/utf8.h"
#include "require.h"
#include "server/anthropic.h"
#include "server/auth.h"
#include "server/errors.h"
#include "server/json.h"
#include "server/openai_request.h"
#include "server/responses.h"
#include "server/router.h"
#include "server/tokenizer_api.h"

namespace {

using namespace relay::server;

void check_error(const ApiError& error) {
  require(error.status() >= 400 && error.status() < 500, "a refusal is the client's fault");
  require(std::string_view(error.what()).size() <= 1024, "messages are bounded");
  const Json body = Json::parse(error.body());
  require(body["error"]["code"].is_string() && !body["error"]["code"].empty(), "code is a string");
  const Json anthropic = Json::parse(error.anthropic_body());
  require(anthropic["error"]["message"].get_ref<const std::string&>().size() <= 1024,
          "bounded too");
  for (const auto& [name, value] : error.headers()) {
    require(value.find_first_of("\r\n") == std::string::npos, "headers hold one line");
  }
}

void check_common(const CommonRequest& request, const RequestLimits& limits) {
  const relay::engine::GenerateRequest& generate = request.generate;
  require(generate.n >= 1 && generate.n <= limits.max_choices, "n");
  require(generate.max_tokens >= -1, "max_tokens");
  require(generate.stop.size() <= limits.max_stop_strings, "stop");
  for (const std::string& stop : generate.stop) {
    require(!stop.empty() && stop.size() <= limits.max_stop_bytes, "stop string");
  }
  require(generate.sampling.temperature >= 0 && generate.sampling.temperature <= 2, "temperature");
  require(generate.sampling.top_p > 0 && generate.sampling.top_p <= 1, "top_p");
  require(generate.sampling.logprobs >= -1 && generate.sampling.logprobs <= 20, "logprobs");
  for (const auto& [token, bias] : generate.sampling.logit_bias) {
    require(token >= 0 && token < limits.vocab_size && bias >= -100 && bias <= 100, "logit_bias");
  }
  require(generate.json_schema.empty() || generate.grammar.empty(), "one constraint at most");
}

void check_chat(const relay::engine::ChatRequest& chat, const RequestLimits& limits) {
  const Json messages = Json::parse(chat.messages_json);
  require(messages.is_array() && !messages.empty(), "messages");
  require(messages.size() <= limits.max_messages, "number of messages");
  for (const Json& message : messages) require(message["role"].is_string(), "role");
  if (!chat.tools_json.empty()) {
    for (const Json& tool : Json::parse(chat.tools_json)) {
      require(tool["function"]["name"].is_string(), "a tool's name");
    }
  }
}

void run(uint8_t which, const std::string& input) {
  RequestLimits limits;
  limits.vocab_size = 1000;
  switch (which % 16) {
    case 0: {
      const ChatCompletionRequest request = parse_chat_completion(input, limits);
      check_common(request.common, limits);
      require(request.common.generate.max_tokens != 0, "a chat generates");
      check_chat(request.chat, limits);
      break;
    }
    case 1: {
      const CompletionRequest request = parse_completion(input, limits);
      check_common(request.common, limits);
      require(request.echo || request.common.generate.max_tokens != 0, "no tokens with echo alone");
      require(!request.prompts.empty() && request.prompts.size() <= limits.max_prompts, "prompts");
      for (const Prompt& prompt : request.prompts) {
        for (const relay::engine::Token token : prompt.tokens) {
          require(token >= 0 && token < limits.vocab_size, "a token of the vocabulary");
        }
      }
      break;
    }
    case 2:
      check_chat(parse_cached_prompt(input, limits).chat, limits);
      break;
    case 3:
      require(parse_cached_prompt_ttl(input) >= 0, "ttl");
      break;
    case 4:
      check_chat(parse_prompt_file_json(input, limits), limits);
      break;
    case 5: {
      const size_t space = std::min(input.find(' '), input.size());
      const std::string target = space < input.size() ? input.substr(space + 1) : "";
      const Route route = find_route(input.substr(0, space), target);
      require(route.argument.size() <= target.size(), "an argument is part of its target");
      break;
    }
    case 6: {
      const Caller caller = KeyRing({"key-one"}, {"key-two"}).identify(input, "");
      const bool knows =
          input.find("key-one") != std::string::npos || input.find("key-two") != std::string::npos;
      require(!caller.allowed || knows, "nobody gets in without a key");
      break;
    }
    case 8: {
      const MessagesRequest request = parse_messages(input, limits);
      check_common(request.chat.common, limits);
      check_chat(request.chat.chat, limits);
      break;
    }
    case 9:
      check_chat(parse_count_tokens(input, limits).chat, limits);
      break;
    case 10: {
      const ResponsesRequest request = parse_responses(input, limits);
      check_common(request.chat.common, limits);
      check_chat(request.chat.chat, limits);
      require(request.echo.is_object(), "what the answer repeats");
      break;
    }
    case 11: {
      const TokenizeRequest request = parse_tokenize(input, limits);
      if (request.form == TokenizeRequest::Form::kMessages) check_chat(request.chat, limits);
      break;
    }
    case 12:
      for (const relay::engine::Token token : parse_detokenize(input, limits).tokens) {
        require(token >= 0 && token < limits.vocab_size, "a token of the vocabulary");
      }
      break;
    default: {
      const Json value = parse_json(input);
      require(relay::is_valid_utf8(input), "what parses is UTF-8");
      require(parse_json(dump(value)) == value, "what is written reads the same");
      break;
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string input(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    run(data[0], input);
  } catch (const ApiError& error) {
    check_error(error);
  }
  return 0;
}
