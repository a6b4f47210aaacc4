// JSON in and out: bounded parsing with byte offsets, serialisation that never throws.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace relay::server {

/// Keeps the order of fields, so that answers read as OpenAI documents them.
using Json = nlohmann::ordered_json;

/// Deepest nesting of a request body. Everything that walks the parsed value later recurses.
inline constexpr int kMaxJsonDepth = 64;

/// A Json object looks through the members it has for each that is added. So many comparisons of
/// keys in a body take a fraction of a second: one object of 10,000 members, a thousand of 300.
inline constexpr int64_t kMaxJsonComparisons = 50'000'000;

/// Why a text would cost too much to parse, or to walk when it is parsed, and where that is seen.
/// Also for JSON that a body holds as text: llama.cpp parses it without a bound.
struct JsonCost {
  size_t offset = 0;
  std::string why;
};
std::optional<JsonCost> too_costly(std::string_view text);

/// Parses a whole body. Throws ApiError 400 `invalid_json`, naming the byte offset, for malformed
/// JSON, invalid UTF-8, numbers out of range, nesting deeper than kMaxJsonDepth, and objects that
/// take more than kMaxJsonComparisons.
Json parse_json(std::string_view text);

/// Compact text; invalid UTF-8 becomes U+FFFD.
std::string dump(const Json& value);
/// The same in ASCII, for files of lines: many readers end lines at characters like U+2028, too.
std::string dump_line(const Json& value);

}  // namespace relay::server
