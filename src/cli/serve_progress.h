// How far loading and pinning are, for whoever waits at the terminal and for /health.
#pragma once

#include <chrono>
#include <string>

#include "server/service.h"

namespace relay::cli {

/// In place on a terminal, else a line now and then.
class ServeProgress {
 public:
  explicit ServeProgress(server::Service& service);

  void operator()(double fraction, const std::string& what);

 private:
  using Clock = std::chrono::steady_clock;

  server::Service& service_;
  const bool terminal_;
  std::string what_;
  int percent_ = -1;
  Clock::time_point shown_;
};

}  // namespace relay::cli
