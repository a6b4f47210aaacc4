// Anthropic's Messages API: requests become chats in OpenAI's form, answers are written as blocks.
#pragma once

#include <memory>
#include <string_view>

#include "server/chat_writer.h"
#include "server/openai_request.h"

namespace relay::server {

struct MessagesRequest {
  ChatCompletionRequest chat;
  /// A cache_control stood somewhere: what of the prompt was computed counts as written to the
  /// cache. It is a hint and changes nothing else; every prompt is kept as long as there is room.
  bool caches = false;
};

/// POST /v1/messages. Throws ApiError (400).
MessagesRequest parse_messages(std::string_view body, const RequestLimits& limits);
/// POST /v1/messages/count_tokens. Throws ApiError (400).
ChatCompletionRequest parse_count_tokens(std::string_view body, const RequestLimits& limits);

std::unique_ptr<ChatWriter> make_messages_writer(const ResponseHead& head, bool caches);

}  // namespace relay::server
