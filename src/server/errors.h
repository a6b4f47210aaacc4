// Errors in OpenAI's form, with the HTTP status that goes with them. The official clients retry
// 408, 409, 429 and 5xx, so a wrong status multiplies load.
#pragma once

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace relay::server {

/// One error answer. Thrown by parsing and by handlers; the session turns it into a response.
class ApiError : public std::exception {
 public:
  /// `message` is cut to 1 kB at a character boundary.
  ApiError(int status, std::string type, std::string code, const std::string& message,
           std::string param = "");

  const char* what() const noexcept override { return message_.c_str(); }
  int status() const { return status_; }
  const std::string& type() const { return type_; }
  const std::string& code() const { return code_; }
  const std::string& param() const { return param_; }
  /// Header fields the answer needs besides the usual ones.
  const std::vector<std::pair<std::string, std::string>>& headers() const { return headers_; }
  ApiError& header(const std::string& name, const std::string& value);
  ApiError& retry_after(int seconds) { return header("Retry-After", std::to_string(seconds)); }

  /// {"error":{"message","type","param","code"}}
  std::string body() const;
  /// Anthropic's: {"type":"error","error":{"type","message"}}; the message names the param.
  std::string anthropic_body() const;

 private:
  int status_;
  std::string type_;
  std::string code_;
  std::string message_;
  std::string param_;
  std::vector<std::pair<std::string, std::string>> headers_;
};

/// 400 invalid_request_error; `param` names the field as the client wrote it ("messages[0].role").
ApiError invalid_request(const std::string& param, const std::string& message,
                         const std::string& code = "invalid_value");
/// 400 for a field that is known and asks for something this server cannot do.
ApiError unsupported(const std::string& param, const std::string& message);
ApiError model_not_found(const std::string& model);
ApiError unavailable(const std::string& code, const std::string& message, int retry_after);
ApiError payload_too_large(size_t limit);

/// What the engine's refusals and failures are called on the wire. `param` may be empty.
ApiError from_engine(engine::ErrorKind kind, const std::string& message,
                     const std::string& param = "");
ApiError from_refusal(const engine::Refusal& refusal);

}  // namespace relay::server
