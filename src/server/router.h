// Which path and method lead where. Nothing else is served.
#pragma once

#include <string>
#include <string_view>

namespace relay::server {

enum class Endpoint {
  kPage,
  kHealth,
  kModels,
  kModel,
  kMetrics,
  kVersion,
  kOpenApi,
  kState,
  kChatCompletions,
  kCompletions,
  kResponses,
  kStoredResponse,
  kMessages,
  kCountTokens,
  kTokenize,
  kDetokenize,
  kApplyTemplate,
  kEmbeddings,
  kListCachedPrompts,
  kCreateCachedPrompt,
  kGetCachedPrompt,
  kUpdateCachedPrompt,
  kDeleteCachedPrompt,
};

/// kOperator: admin keys, and anyone where no keys are in use at all.
enum class Access { kAnyone, kKey, kAdmin, kOperator };

/// Where an answer is made.
enum class Work {
  kHere,        ///< at once, on the thread that moves bytes
  kWorker,      ///< milliseconds of computing: rendering, tokenising
  kWaiter,      ///< waits for a step of the engine
  kPinner,      ///< waits for a prompt to be computed
  kGeneration,  ///< a stream of tokens
};

/// Whose errors clients of a route understand.
enum class ErrorForm { kOpenAi, kAnthropic };

struct Route {
  Endpoint endpoint = Endpoint::kHealth;
  Access access = Access::kKey;
  Work work = Work::kHere;
  bool takes_body = false;
  ErrorForm error_form = ErrorForm::kOpenAi;
  std::string argument;  ///< the path's variable part, percent-decoded
};

/// `target` is the request's path with its query, which is ignored. Throws ApiError: 404, 405 (with
/// Allow), 400 for a target that is not an absolute path.
Route find_route(std::string_view method, std::string_view target);

}  // namespace relay::server
