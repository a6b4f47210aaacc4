#include "server/errors.h"

#include "base/utf8.h"
#include "server/json.h"

namespace relay::server {

namespace {

constexpr size_t kMaxMessageBytes = 1024;
constexpr const char* kInvalidRequest = "invalid_request_error";

std::string cut(const std::string& text) {
  if (text.size() <= kMaxMessageBytes) return text;
  constexpr const char* kEllipsis = "...";
  size_t end = kMaxMessageBytes - 3;
  while (end > 0 && continues_utf8(text[end])) --end;
  return text.substr(0, end) + kEllipsis;
}

const char* anthropic_type(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 413:
      return "request_too_large";
    case 429:
      return "rate_limit_error";
    case 503:
      return "overloaded_error";
    default:
      return status < 500 ? "invalid_request_error" : "api_error";
  }
}

}  // namespace

ApiError::ApiError(int status, std::string type, std::string code, const std::string& message,
                   std::string param)
    : status_(status),
      type_(std::move(type)),
      code_(std::move(code)),
      message_(cut(message)),
      param_(std::move(param)) {}

ApiError& ApiError::header(const std::string& name, const std::string& value) {
  for (auto& [existing, old_value] : headers_) {
    if (existing == name) {
      old_value = value;
      return *this;
    }
  }
  headers_.emplace_back(name, value);
  return *this;
}

std::string ApiError::body() const {
  Json error;
  error["message"] = message_;
  error["type"] = type_;
  error["param"] = param_.empty() ? Json(nullptr) : Json(param_);
  error["code"] = code_;
  return dump(Json{{"error", std::move(error)}});
}

std::string ApiError::anthropic_body() const {
  const bool named = param_.empty() || message_.find(param_) != std::string::npos;
  Json error{{"type", anthropic_type(status_)},
             {"message", named ? message_ : cut(param_ + ": " + message_)}};
  return dump(Json{{"type", "error"}, {"error", std::move(error)}});
}

ApiError invalid_request(const std::string& param, const std::string& message,
                         const std::string& code) {
  return ApiError(400, kInvalidRequest, code, message, param);
}

ApiError unsupported(const std::string& param, const std::string& message) {
  return ApiError(400, kInvalidRequest, "unsupported_parameter", message, param);
}

ApiError model_not_found(const std::string& model) {
  return ApiError(404, kInvalidRequest, "model_not_found",
                  "The model '" + model + "' does not exist; GET /v1/models lists those served.",
                  "model");
}

ApiError unavailable(const std::string& code, const std::string& message, int retry_after) {
  return ApiError(503, "service_unavailable_error", code, message).retry_after(retry_after);
}

ApiError payload_too_large(size_t limit) {
  return ApiError(413, kInvalidRequest, "payload_too_large",
                  "The request body is larger than " + std::to_string(limit) + " bytes.");
}

ApiError from_engine(engine::ErrorKind kind, const std::string& message, const std::string& param) {
  using engine::ErrorKind;
  switch (kind) {
    case ErrorKind::kInvalidRequest:
      return invalid_request(param, message);
    case ErrorKind::kContextLengthExceeded:
      return invalid_request(param, message, "context_length_exceeded");
    case ErrorKind::kInvalidGrammar:
      return invalid_request(param, message, "invalid_grammar");
    case ErrorKind::kInvalidTemplate:
      return invalid_request(param, message, "invalid_chat_template");
    case ErrorKind::kQueueFull:
      return ApiError(429, "rate_limit_error", "rate_limit_exceeded", message).retry_after(1);
    case ErrorKind::kShuttingDown:
      return unavailable("shutting_down", message, 10);
    case ErrorKind::kPinBudgetExceeded:
      return ApiError(409, kInvalidRequest, "pin_budget_exceeded", message, param);
    case ErrorKind::kNotFound:
      return ApiError(404, kInvalidRequest, "not_found", message, param);
    case ErrorKind::kModel:
    case ErrorKind::kBackend:
    case ErrorKind::kInternal:
      break;
  }
  return ApiError(500, "server_error", "internal_error", message, param);
}

ApiError from_refusal(const engine::Refusal& refusal) {
  ApiError error = from_engine(refusal.kind, refusal.message, refusal.param);
  if (refusal.retry_after_seconds > 0) error.retry_after(refusal.retry_after_seconds);
  return error;
}

}  // namespace relay::server
