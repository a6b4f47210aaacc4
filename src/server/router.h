// Which path and method lead where. Nothing else is served.
#pragma once

#include <string>
#include <string_view>

namespace relay::server {

enum class Endpoint {
  kHealth,
  kModels,
  kModel,
  kMetrics,
  kChatCompletions,
  kCompletions,
  kListCachedPrompts,
  kCreateCachedPrompt,
  kGetCachedPrompt,
  kUpdateCachedPrompt,
  kDeleteCachedPrompt,
};

enum class Access { kAnyone, kKey, kAdmin };

struct Route {
  Endpoint endpoint = Endpoint::kHealth;
  Access access = Access::kKey;
  bool takes_body = false;
  std::string argument;  ///< the path's variable part, percent-decoded
};

/// `target` is the request's path with its query, which is ignored. Throws ApiError: 404, 405 (with
/// Allow), 400 for a target that is not an absolute path.
Route find_route(std::string_view method, std::string_view target);

}  // namespace relay::server
