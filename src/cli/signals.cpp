#include "cli/signals.h"

#include <pthread.h>
#include <unistd.h>

#include <cstdio>
#include <thread>

namespace relay::cli {

Signals::Signals() {
  sigemptyset(&set_);
  sigaddset(&set_, SIGINT);
  sigaddset(&set_, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &set_, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::thread([this] { run(); }).detach();
}

void Signals::serving() {
  const std::lock_guard lock(mutex_);
  serving_ = true;
}

void Signals::wait() {
  std::unique_lock lock(mutex_);
  arrived_.wait(lock, [this] { return count_ > 0; });
}

void Signals::run() {
  for (;;) {
    int signal = 0;
    if (sigwait(&set_, &signal) != 0) continue;
    const std::lock_guard lock(mutex_);
    ++count_;
    if (count_ > 1) {
      std::fputs("relay: second signal, ending at once\n", stderr);
      _exit(128 + signal);
    }
    if (!serving_) {
      std::fputs("\nrelay: ended before it was ready\n", stderr);
      _exit(0);
    }
    arrived_.notify_all();
  }
}

}  // namespace relay::cli
