// SIGINT and SIGTERM for a program that ends in good order.
#pragma once

#include <condition_variable>
#include <csignal>
#include <mutex>

namespace relay::cli {

/// Taken by a thread of their own, which lives as long as the program. The first asks for a good
/// end; while nothing can be drained yet (loading) it ends the program. The second always does.
class Signals {
 public:
  /// Call before any other thread exists: threads inherit the blocked signals.
  Signals();
  /// From now on a first signal is for wait().
  void serving();
  void wait();

 private:
  void run();

  sigset_t set_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  int count_ = 0;
  bool serving_ = false;
};

}  // namespace relay::cli
