#include "cli/serve_progress.h"

#include <spdlog/spdlog.h>
#include <unistd.h>

#include <cstdio>

namespace relay::cli {

namespace {

constexpr std::chrono::seconds kInterval{2};

}  // namespace

ServeProgress::ServeProgress(server::Service& service)
    : service_(service), terminal_(isatty(STDERR_FILENO) == 1) {}

void ServeProgress::operator()(double fraction, const std::string& what) {
  service_.set_progress(fraction, what);
  const int percent = static_cast<int>(fraction * 100);
  const Clock::time_point now = Clock::now();
  if (terminal_) {
    if (what != what_ || percent != percent_) {
      std::fprintf(stderr, "\r\033[K%s: %d %%%s", what.c_str(), percent, fraction >= 1 ? "\n" : "");
    }
  } else if (what != what_ || (percent != percent_ && now - shown_ > kInterval) ||
             (fraction >= 1 && percent_ < 100)) {
    spdlog::info("{}: {} %", what, percent);
    shown_ = now;
  }
  what_ = what;
  percent_ = percent;
}

}  // namespace relay::cli
