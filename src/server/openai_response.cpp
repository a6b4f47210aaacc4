#include "server/openai_response.h"

#include <cmath>
#include <random>

#include "base/utf8.h"

namespace relay::server {

namespace {

/// JSON has no infinities; clients expect a number.
double finite(float logprob) { return std::isfinite(logprob) ? logprob : -9999.0; }

Json chat_token(const engine::TokenLogprob& token) {
  return Json{{"token", token.bytes},
              {"logprob", finite(token.logprob)},
              {"bytes", byte_array(token.bytes)}};
}

/// A token as a JSON string; parts of characters are written as OpenAI writes them, "bytes:\xe2".
std::string printable(const std::string& bytes) {
  if (is_valid_utf8(bytes)) return bytes;
  std::string text = "bytes:";
  constexpr const char* kHex = "0123456789abcdef";
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    text += "\\x";
    text += kHex[byte >> 4];
    text += kHex[byte & 15];
  }
  return text;
}

int64_t characters(const std::string& bytes) {
  int64_t count = 0;
  for (const char c : bytes) count += !continues_utf8(c);
  return count;
}

Json head_json(const ResponseHead& head, bool chunk) {
  Json json;
  json["id"] = head.id;
  if (head.api == Api::kChat) {
    json["object"] = chunk ? "chat.completion.chunk" : "chat.completion";
  } else {
    json["object"] = "text_completion";
  }
  json["created"] = head.created;
  json["model"] = head.model;
  json["system_fingerprint"] = head.fingerprint;
  return json;
}

}  // namespace

std::string random_id(const std::string& prefix) {
  thread_local std::mt19937_64 generator{(static_cast<uint64_t>(std::random_device{}()) << 32) ^
                                         std::random_device{}()};
  std::string id = prefix;
  constexpr const char* kHex = "0123456789abcdef";
  for (int word = 0; word < 2; ++word) {
    uint64_t bits = generator();
    for (int digit = 0; digit < 16; ++digit, bits >>= 4) id += kHex[bits & 15];
  }
  return id;
}

Json byte_array(const std::string& bytes) {
  Json array = Json::array();
  for (const char byte : bytes) array.push_back(static_cast<unsigned char>(byte));
  return array;
}

Json usage_json(const engine::Usage& usage) {
  return Json{
      {"prompt_tokens", usage.prompt_tokens},
      {"completion_tokens", usage.completion_tokens},
      {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
      {"prompt_tokens_details",
       {{"cached_tokens", usage.cached_tokens}, {"cache_write_tokens", usage.cache_write_tokens}}}};
}

Json chat_logprobs(const std::vector<engine::GeneratedToken>& tokens) {
  Json content = Json::array();
  for (const engine::GeneratedToken& token : tokens) {
    Json entry = chat_token(token.self);
    Json top = Json::array();
    for (const engine::TokenLogprob& other : token.top) top.push_back(chat_token(other));
    entry["top_logprobs"] = std::move(top);
    content.push_back(std::move(entry));
  }
  return Json{{"content", std::move(content)}, {"refusal", nullptr}};
}

Json completion_logprobs(const std::vector<engine::GeneratedToken>& tokens, bool want_top,
                         int64_t& text_offset) {
  Json offsets = Json::array();
  Json logprobs = Json::array();
  Json texts = Json::array();
  Json tops = Json::array();
  for (const engine::GeneratedToken& token : tokens) {
    offsets.push_back(text_offset);
    text_offset += characters(token.self.bytes);
    texts.push_back(printable(token.self.bytes));
    if (std::isnan(token.self.logprob)) {  // the first of a prompt
      logprobs.push_back(nullptr);
      tops.push_back(nullptr);
      continue;
    }
    logprobs.push_back(finite(token.self.logprob));
    Json top = Json::object();
    for (const engine::TokenLogprob& other : token.top) {
      top[printable(other.bytes)] = finite(other.logprob);
    }
    top[printable(token.self.bytes)] = finite(token.self.logprob);
    tops.push_back(std::move(top));
  }
  return Json{{"text_offset", std::move(offsets)},
              {"token_logprobs", std::move(logprobs)},
              {"tokens", std::move(texts)},
              {"top_logprobs", want_top ? std::move(tops) : Json(nullptr)}};
}

Json message_json(const engine::ChatMessage& message) {
  Json json;
  json["role"] = "assistant";
  const bool only_calls = message.content.empty() && !message.tool_calls.empty();
  json["content"] = only_calls ? Json(nullptr) : Json(message.content);
  json["refusal"] = nullptr;
  if (!message.reasoning.empty()) json["reasoning_content"] = message.reasoning;
  if (!message.tool_calls.empty()) {
    Json calls = Json::array();
    for (const engine::ToolCall& call : message.tool_calls) {
      calls.push_back(Json{{"id", call.id},
                           {"type", "function"},
                           {"function", {{"name", call.name}, {"arguments", call.arguments}}}});
    }
    json["tool_calls"] = std::move(calls);
  }
  return json;
}

std::string response_body(const ResponseHead& head, Json choices, const engine::Usage& usage) {
  Json json = head_json(head, /*chunk=*/false);
  json["choices"] = std::move(choices);
  json["usage"] = usage_json(usage);
  return dump(json);
}

std::string chunk_frame(const ResponseHead& head, const Json& choice,
                        const std::optional<Json>& usage) {
  Json json = head_json(head, /*chunk=*/true);
  json["choices"] = Json::array();
  if (!choice.is_null()) json["choices"].push_back(choice);
  if (usage) json["usage"] = *usage;
  return "data: " + dump(json) + "\n\n";
}

std::string error_frame(const std::string& body) { return "data: " + body + "\n\n"; }

}  // namespace relay::server
