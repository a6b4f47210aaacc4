// For tests: reads server-sent events back.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "server/json.h"

namespace relay::server {

/// The data of `event: type\ndata: {...}\n\n` frames, each of which must name its type twice.
inline std::vector<Json> read_events(const std::string& frames) {
  std::vector<Json> events;
  for (size_t at = 0; at < frames.size();) {
    const size_t line = frames.find('\n', at);
    const size_t end = frames.find("\n\n", at);
    if (end == std::string::npos || frames.compare(at, 7, "event: ") != 0 ||
        frames.compare(line + 1, 6, "data: ") != 0) {
      ADD_FAILURE() << "not an event: " << frames.substr(at);
      return events;
    }
    events.push_back(Json::parse(frames.substr(line + 7, end - line - 7)));
    EXPECT_EQ(events.back()["type"], frames.substr(at + 7, line - at - 7));
    at = end + 2;
  }
  return events;
}

inline std::vector<std::string> types_of(const std::vector<Json>& events) {
  std::vector<std::string> types;
  for (const Json& event : events) types.push_back(event["type"].get<std::string>());
  return types;
}

}  // namespace relay::server
