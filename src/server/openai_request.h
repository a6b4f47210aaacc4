// Requests of the OpenAI API, read strictly: a wrong type or range names its `param`, null counts
// as absent, unknown fields are accepted, and a known field that asks for what this server cannot
// do is an error, never dropped in silence.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "server/json.h"

namespace relay::server {

class JsonFields;

inline constexpr size_t kMaxNameBytes = 256;  ///< of models, tools, calls, salts

/// What request fields are checked against.
struct RequestLimits {
  int32_t vocab_size = 0;
  int32_t max_choices = 128;     ///< n
  size_t max_prompts = 1024;     ///< of one /v1/completions request
  size_t max_tokens = SIZE_MAX;  ///< of a list to be written as text
  size_t max_messages = 16384;   ///< of one chat
  size_t max_tools = 256;
  size_t max_stop_strings = 32;
  size_t max_stop_bytes = 1024;  ///< of each
  size_t max_logit_bias = 4096;
  int64_t max_prompt_logprobs = 1'000'000;  ///< of all prompts of a request, alternatives included
  size_t max_schema_bytes = 256 * 1024;     ///< of a JSON schema or grammar
};

/// What chat and text completions have in common.
struct CommonRequest {
  std::string model;  ///< empty: not named
  bool stream = false;
  bool include_usage = false;           ///< stream_options
  bool continuous_usage_stats = false;  ///< stream_options
  bool logprobs = false;                ///< the choices carry logprobs
  std::string schema_param;             ///< the field a JSON schema came from, for errors
  std::string chat_param = "messages";  ///< where the chat stood
  engine::GenerateRequest generate;     ///< all but prompt, format and the final cache salt
};

struct ChatCompletionRequest {
  CommonRequest common;
  engine::ChatRequest chat;
};

/// One prompt of a text completion: text or tokens.
struct Prompt {
  std::string text;
  std::vector<engine::Token> tokens;
  bool is_text = true;
};

struct CompletionRequest {
  CommonRequest common;
  std::vector<Prompt> prompts;
  bool echo = false;               ///< the answer begins with the prompt, and so do its logprobs
  bool add_special_tokens = true;  ///< begin-of-text in front of a text prompt
};

/// POST /v1/cached_prompts.
struct CachedPromptRequest {
  std::string model;
  std::string name;
  engine::ChatRequest chat;
  std::string cache_salt;
  int64_t ttl_seconds = 0;
};

// All throw ApiError (400); the body is a JSON object.
ChatCompletionRequest parse_chat_completion(std::string_view body, const RequestLimits& limits);
/// The same of a body that has been read, or was made from another API's.
ChatCompletionRequest read_chat_completion(const Json& body, const RequestLimits& limits);
/// For APIs that become a chat: what engines have added to all of them goes from `body` into
/// `chat`, and is checked there. A field that would constrain a chat, and does nothing in that API,
/// is refused.
void take_extensions(const JsonFields& body, Json& chat);
CompletionRequest parse_completion(std::string_view body, const RequestLimits& limits);
CachedPromptRequest parse_cached_prompt(std::string_view body, const RequestLimits& limits);
/// PATCH /v1/cached_prompts/{id}: the new time to live in seconds, 0 for ever.
int64_t parse_cached_prompt_ttl(std::string_view body);

/// Token ids of this model, or ApiError that names `param`.
std::vector<engine::Token> parse_token_list(const Json& list, const std::string& param,
                                            const RequestLimits& limits);

/// The messages (an array of chat messages) of a pin file, checked like those of a request. Also
/// accepts an object {"messages": [...], "tools": [...]}.
engine::ChatRequest parse_prompt_file_json(std::string_view text, const RequestLimits& limits);

}  // namespace relay::server
