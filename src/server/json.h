// JSON in and out: bounded parsing with byte offsets, serialisation that never throws.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace relay::server {

/// Keeps the order of fields, so that answers read as OpenAI documents them.
using Json = nlohmann::ordered_json;

/// Deepest nesting of a request body. Everything that walks the parsed value later recurses.
inline constexpr int kMaxJsonDepth = 64;

/// Parses a whole body. Throws ApiError 400 `invalid_json`, naming the byte offset, for malformed
/// JSON, invalid UTF-8, numbers out of range, and nesting deeper than kMaxJsonDepth.
Json parse_json(std::string_view text);

/// Compact text; invalid UTF-8 becomes U+FFFD.
std::string dump(const Json& value);

}  // namespace relay::server
