#include "server/tokenizer_api.h"

#include <algorithm>

#include "base/utf8.h"
#include "server/errors.h"
#include "server/json_fields.h"
#include "server/openai_response.h"

namespace relay::server {

TokenizeRequest parse_tokenize(std::string_view text, const RequestLimits& limits) {
  const Json json = parse_json(text);
  const JsonFields body(json, "");
  TokenizeRequest request;
  request.model = body.string("model", kMaxNameBytes).value_or("");
  if (const auto content = body.string("content", SIZE_MAX)) {
    request.form = TokenizeRequest::Form::kContent;
    request.text = *content;
    request.add_special = body.boolean("add_special", false);
    request.parse_special = body.boolean("parse_special", true);
    request.pieces = body.boolean("with_pieces", false);
    return request;
  }
  request.pieces = body.boolean("return_token_strs", false);
  if (body.find("messages") != nullptr) {
    request.form = TokenizeRequest::Form::kMessages;
    request.chat = read_chat_completion(json, limits).chat;
    return request;
  }
  if (body.find("prompt") == nullptr) {
    throw invalid_request("prompt", "One of 'prompt', 'messages' and 'content' is required.",
                          "missing_required_parameter");
  }
  request.text = body.require_string("prompt", SIZE_MAX);
  request.add_special = body.boolean("add_special_tokens", true);
  return request;
}

DetokenizeRequest parse_detokenize(std::string_view text, const RequestLimits& limits) {
  const Json json = parse_json(text);
  const JsonFields body(json, "");
  DetokenizeRequest request;
  request.model = body.string("model", kMaxNameBytes).value_or("");
  body.require("tokens");
  request.tokens = parse_token_list(*body.array("tokens", limits.max_tokens), "tokens", limits);
  return request;
}

Json tokenize_json(const engine::Engine& engine, const TokenizeRequest& request) {
  using Form = TokenizeRequest::Form;
  const std::vector<engine::Token> tokens =
      request.form == Form::kMessages
          ? engine.render_chat(request.chat).tokens
          : engine.tokenize(request.text, request.add_special, request.parse_special);
  const auto piece = [&](engine::Token token) {
    // Of two, the second: some vocabularies drop the space with which a text begins.
    const size_t alone = engine.detokenize({token}, /*special=*/true).size();
    const std::string twice = engine.detokenize({token, token}, /*special=*/true);
    return twice.substr(std::min(alone, twice.size()));
  };
  if (request.form == Form::kContent) {
    if (!request.pieces) return {{"tokens", tokens}};
    Json list = Json::array();
    for (const engine::Token token : tokens) {
      const std::string bytes = piece(token);
      // llama-server's way with parts of a character.
      list.push_back(
          {{"id", token}, {"piece", is_valid_utf8(bytes) ? Json(bytes) : byte_array(bytes)}});
    }
    return {{"tokens", std::move(list)}};
  }
  Json strings;
  if (request.pieces) {
    strings = Json::array();
    for (const engine::Token token : tokens) strings.push_back(piece(token));
  }
  return {{"count", tokens.size()},
          {"max_model_len", engine.info().context_length},
          {"tokens", tokens},
          {"token_strs", std::move(strings)}};
}

}  // namespace relay::server
