#include "server/json.h"

#include <algorithm>
#include <array>

#include "server/errors.h"

namespace relay::server {

namespace {

ApiError invalid_json(size_t offset, const std::string& why) {
  return invalid_request(
      "", "The body is not valid JSON: " + why + " at byte " + std::to_string(offset) + ".",
      "invalid_json");
}

}  // namespace

// The parser's own callback costs more than this scan and knows no offset.
std::optional<JsonCost> too_costly(std::string_view text) {
  int depth = 0;
  std::array<int64_t, kMaxJsonDepth + 1> members{};  // so far, of the objects that are open
  int64_t comparisons = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxJsonDepth) {
        return JsonCost{i, "nested deeper than " + std::to_string(kMaxJsonDepth) + " levels"};
      }
      members[static_cast<size_t>(depth)] = 0;
    } else if (c == ']' || c == '}') {
      depth = std::max(0, depth - 1);
    } else if (c == ':') {
      comparisons += members[static_cast<size_t>(depth)]++;
      if (comparisons > kMaxJsonComparisons) return JsonCost{i, "objects of too many members"};
    }
  }
  return std::nullopt;
}

Json parse_json(std::string_view text) {
  if (const auto cost = too_costly(text)) throw invalid_json(cost->offset, cost->why);
  // The library takes a zero byte for the end and would not look at what follows.
  const size_t zero = text.find('\0');
  if (zero != std::string_view::npos) throw invalid_json(zero, "unexpected character");
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& error) {
    // The library counts the bytes it has read: the last of them is the one at fault.
    const size_t offset = error.byte > 0 ? error.byte - 1 : 0;
    throw invalid_json(offset, offset >= text.size() ? "unexpected end" : "unexpected character");
  } catch (const Json::exception&) {
    throw invalid_request("", "The body is not valid JSON: a number is out of range.",
                          "invalid_json");
  }
}

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string dump_line(const Json& value) {
  return value.dump(-1, ' ', true, Json::error_handler_t::replace);
}

}  // namespace relay::server
