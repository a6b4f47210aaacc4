// OpenAI's Responses API without its memory: requests become chats, answers are written as items.
// What would need stored conversations is refused by name.
#pragma once

#include <memory>
#include <string_view>

#include "server/chat_writer.h"
#include "server/openai_request.h"

namespace relay::server {

struct ResponsesRequest {
  ChatCompletionRequest chat;
  Json echo;  ///< the fields of the request that the answer repeats
};

/// POST /v1/responses. Throws ApiError (400).
ResponsesRequest parse_responses(std::string_view body, const RequestLimits& limits);

std::unique_ptr<ChatWriter> make_responses_writer(const ResponseHead& head, Json echo);

}  // namespace relay::server
