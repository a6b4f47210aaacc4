// Answers of the OpenAI API: whole objects, stream chunks, and their framing as server-sent events.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "server/json.h"

namespace relay::server {

enum class Api { kChat, kCompletion };

/// What all chunks of an answer have in common.
struct ResponseHead {
  Api api = Api::kChat;
  std::string id;
  std::string model;
  std::string fingerprint;
  int64_t created = 0;  ///< Unix seconds
};

/// `prefix` followed by 32 random hex digits: unique, not secret.
std::string random_id(const std::string& prefix);

Json byte_array(const std::string& bytes);

Json usage_json(const engine::Usage& usage);

/// choices[].logprobs of a chat: {"content": [...], "refusal": null}.
Json chat_logprobs(const std::vector<engine::GeneratedToken>& tokens);
/// choices[].logprobs of a text completion. `text_offset`, in characters, is that of the first
/// token and is moved behind the last. top_logprobs is null unless `want_top`. Entries of a token
/// without a probability (NaN) are null.
Json completion_logprobs(const std::vector<engine::GeneratedToken>& tokens, bool want_top,
                         int64_t& text_offset);

/// The message of a finished chat choice.
Json message_json(const engine::ChatMessage& message);

/// A whole answer around finished choices.
std::string response_body(const ResponseHead& head, Json choices, const engine::Usage& usage);

/// One `data: {...}\n\n` frame. choice: null for `choices: []`. usage: absent unless the client
/// asked for usage; then JSON null in ordinary chunks.
std::string chunk_frame(const ResponseHead& head, const Json& choice,
                        const std::optional<Json>& usage);
/// `data: {"error": ...}`; `body` is ApiError::body().
std::string error_frame(const std::string& body);

inline constexpr const char* kDoneFrame = "data: [DONE]\n\n";
/// A comment, which clients skip: shows proxies and both ends that the connection lives.
inline constexpr const char* kKeepAliveFrame = ": waiting\n\n";

}  // namespace relay::server
