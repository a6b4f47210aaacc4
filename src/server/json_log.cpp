#include "server/json_log.h"

#include <spdlog/details/log_msg.h>
#include <spdlog/formatter.h>

#include <chrono>
#include <string>
#include <string_view>

namespace relay::server {

namespace {

/// Tells objects from text: no message begins so.
constexpr char kMark = '\x1e';

class JsonFormatter : public spdlog::formatter {
 public:
  void format(const spdlog::details::log_msg& msg, spdlog::memory_buf_t& out) override {
    const std::string_view text(msg.payload.data(), msg.payload.size());
    const auto milliseconds =
        std::chrono::time_point_cast<std::chrono::milliseconds>(msg.time).time_since_epoch();
    const std::string_view level = spdlog::level::to_string_view(msg.level).data();
    Json line{{"time", static_cast<double>(milliseconds.count()) / 1000}, {"level", level}};
    std::string written;
    if (!text.empty() && text.front() == kMark) {
      // Its members follow, as they were written: to parse them again would cost a busy server.
      written = dump_line(line);
      written.back() = ',';
      written += text.substr(2);
    } else {
      line["message"] = text;
      written = dump_line(line);
    }
    written += '\n';
    out.append(written.data(), written.data() + written.size());
  }
  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<JsonFormatter>();
  }
};

}  // namespace

std::unique_ptr<spdlog::formatter> make_json_formatter() {
  return std::make_unique<JsonFormatter>();
}

void log_json(spdlog::level::level_enum level, const Json& members) {
  spdlog::log(level, "{}{}", kMark, dump_line(members));
}

}  // namespace relay::server
