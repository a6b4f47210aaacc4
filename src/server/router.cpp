#include "server/router.h"

#include <array>
#include <optional>

#include "server/errors.h"
#include "server/json.h"

namespace relay::server {

namespace {

struct Entry {
  std::string_view method;
  std::string_view path;  ///< a trailing '*' takes one or more characters as the argument
  Endpoint endpoint;
  Access access;
  Work work;
  ErrorForm error_form = ErrorForm::kOpenAi;
};

constexpr std::array kTable = {
    Entry{"GET", "/", Endpoint::kPage, Access::kAnyone, Work::kHere},
    Entry{"GET", "/state", Endpoint::kState, Access::kOperator, Work::kWaiter},
    Entry{"GET", "/openapi.json", Endpoint::kOpenApi, Access::kAnyone, Work::kHere},
    Entry{"GET", "/health", Endpoint::kHealth, Access::kAnyone, Work::kHere},
    Entry{"GET", "/version", Endpoint::kVersion, Access::kKey, Work::kHere},
    Entry{"GET", "/v1/models", Endpoint::kModels, Access::kKey, Work::kHere},
    Entry{"GET", "/v1/models/*", Endpoint::kModel, Access::kKey, Work::kHere},
    Entry{"GET", "/metrics", Endpoint::kMetrics, Access::kKey, Work::kHere},
    Entry{"POST", "/v1/chat/completions", Endpoint::kChatCompletions, Access::kKey,
          Work::kGeneration},
    Entry{"POST", "/v1/completions", Endpoint::kCompletions, Access::kKey, Work::kGeneration},
    Entry{"POST", "/v1/responses", Endpoint::kResponses, Access::kKey, Work::kGeneration},
    Entry{"GET", "/v1/responses/*", Endpoint::kStoredResponse, Access::kKey, Work::kHere},
    Entry{"POST", "/v1/responses/*", Endpoint::kStoredResponse, Access::kKey, Work::kHere},
    Entry{"DELETE", "/v1/responses/*", Endpoint::kStoredResponse, Access::kKey, Work::kHere},
    Entry{"POST", "/v1/messages", Endpoint::kMessages, Access::kKey, Work::kGeneration,
          ErrorForm::kAnthropic},
    Entry{"POST", "/v1/messages/count_tokens", Endpoint::kCountTokens, Access::kKey, Work::kWorker,
          ErrorForm::kAnthropic},
    Entry{"POST", "/tokenize", Endpoint::kTokenize, Access::kKey, Work::kWorker},
    Entry{"POST", "/detokenize", Endpoint::kDetokenize, Access::kKey, Work::kWorker},
    Entry{"POST", "/apply-template", Endpoint::kApplyTemplate, Access::kKey, Work::kWorker},
    Entry{"POST", "/v1/embeddings", Endpoint::kEmbeddings, Access::kKey, Work::kHere},
    Entry{"GET", "/v1/cached_prompts", Endpoint::kListCachedPrompts, Access::kAdmin, Work::kWaiter},
    Entry{"POST", "/v1/cached_prompts", Endpoint::kCreateCachedPrompt, Access::kAdmin,
          Work::kPinner},
    Entry{"GET", "/v1/cached_prompts/*", Endpoint::kGetCachedPrompt, Access::kAdmin, Work::kWaiter},
    Entry{"PATCH", "/v1/cached_prompts/*", Endpoint::kUpdateCachedPrompt, Access::kAdmin,
          Work::kWaiter},
    Entry{"DELETE", "/v1/cached_prompts/*", Endpoint::kDeleteCachedPrompt, Access::kAdmin,
          Work::kWaiter},
};

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::string percent_decode(std::string_view text) {
  std::string decoded;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && hex_digit(text[i + 1]) >= 0 &&
        hex_digit(text[i + 2]) >= 0) {
      decoded += static_cast<char>(hex_digit(text[i + 1]) * 16 + hex_digit(text[i + 2]));
      i += 2;
    } else {
      decoded += text[i];
    }
  }
  return decoded;
}

/// The argument if `path` fits the entry, "" if the entry has none.
std::optional<std::string> match(const Entry& entry, std::string_view path) {
  if (entry.path.back() != '*') {
    return path == entry.path ? std::optional<std::string>("") : std::nullopt;
  }
  const std::string_view prefix = entry.path.substr(0, entry.path.size() - 1);
  if (path.size() <= prefix.size() || path.substr(0, prefix.size()) != prefix) return std::nullopt;
  return percent_decode(path.substr(prefix.size()));
}

}  // namespace

Route find_route(std::string_view method, std::string_view target) {
  if (target.empty() || target.front() != '/') {
    throw invalid_request("", "The request target must be an absolute path.", "invalid_target");
  }
  std::string_view path = target.substr(0, target.find_first_of("?#"));
  if (path.size() > 1 && path.back() == '/') path.remove_suffix(1);
  std::string allowed;
  for (const Entry& entry : kTable) {
    std::optional<std::string> argument = match(entry, path);
    if (!argument) continue;
    // HEAD asks what GET would answer; the body is left out when it is written.
    if (entry.method == (method == "HEAD" ? "GET" : method)) {
      const bool takes_body = entry.method == "POST" || entry.method == "PATCH";
      return Route{entry.endpoint, entry.access,     entry.work,
                   takes_body,     entry.error_form, std::move(*argument)};
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(entry.method);
  }
  const std::string shown(path.substr(0, 256));
  if (!allowed.empty()) {
    throw ApiError(405, "invalid_request_error", "method_not_allowed",
                   shown + " does not answer to this method, only to " + allowed + ".")
        .header("Allow", allowed);
  }
  throw ApiError(404, "invalid_request_error", "not_found", "There is nothing at " + shown + ".");
}

}  // namespace relay::server
