// What the tests of response formats begin with.
#pragma once

#include <string>

#include "server/chat_writer.h"

namespace relay::server {

inline ResponseHead head() {
  ResponseHead head;
  head.model = "m";
  return head;
}

inline engine::ChatDelta content(const std::string& text) {
  engine::ChatDelta delta;
  delta.content = text;
  return delta;
}

}  // namespace relay::server
