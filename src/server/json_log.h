// Logs as JSON objects, one a line, for programs that gather them.
#pragma once

#include <spdlog/spdlog.h>

#include <memory>

#include "server/json.h"

namespace relay::server {

/// {"time", "level", ...} around what is logged: members of log_json(), or {"message"}.
std::unique_ptr<spdlog::formatter> make_json_formatter();

/// Logs an object, for make_json_formatter() to write.
void log_json(spdlog::level::level_enum level, const Json& members);

}  // namespace relay::server
