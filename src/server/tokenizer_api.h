// /tokenize and /detokenize, in vLLM's form ("prompt" or "messages") and llama-server's
// ("content").
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/json.h"
#include "server/openai_request.h"

namespace relay::server {

struct TokenizeRequest {
  enum class Form { kPrompt, kMessages, kContent };
  Form form = Form::kPrompt;
  std::string model;
  std::string text;          ///< kPrompt, kContent
  engine::ChatRequest chat;  ///< kMessages
  bool add_special = true;   ///< begin-of-text in front of a text
  bool parse_special = true;
  bool pieces = false;  ///< the tokens' texts as well
};

struct DetokenizeRequest {
  std::string model;
  std::vector<engine::Token> tokens;
};

// Throw ApiError (400).
TokenizeRequest parse_tokenize(std::string_view body, const RequestLimits& limits);
DetokenizeRequest parse_detokenize(std::string_view body, const RequestLimits& limits);

/// The answer, in the form that was asked. Throws EngineError.
Json tokenize_json(const engine::Engine& engine, const TokenizeRequest& request);

}  // namespace relay::server
