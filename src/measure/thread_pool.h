// Threads that stay: a benchmark's operator runs on them over and over, as in an engine.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace relay::measure {

/// All threads meet here; reusable. Spins for a while before it sleeps: operators are short.
class Barrier {
 public:
  explicit Barrier(int32_t threads) : threads_(threads) {}

  void wait() {
    const uint32_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.fetch_add(1, std::memory_order_release);
      turn_.notify_all();
      return;
    }
    for (int spin = 0; spin < 4000; ++spin) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
    }
    while (turn_.load(std::memory_order_acquire) == turn) turn_.wait(turn);
  }

 private:
  const int32_t threads_;
  std::atomic<int32_t> arrived_{0};
  std::atomic<uint32_t> turn_{0};
};

class ThreadPool {
 public:
  explicit ThreadPool(int32_t threads) : size_(threads), barrier_(threads) {
    for (int32_t thread = 1; thread < size_; ++thread) {
      workers_.emplace_back([this, thread] {
        for (;;) {
          barrier_.wait();
          if (stopping_) return;
          task_(thread);
          barrier_.wait();
        }
      });
    }
  }

  ~ThreadPool() {
    stopping_ = true;
    barrier_.wait();
    for (std::thread& worker : workers_) worker.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t size() const { return size_; }
  /// Meeting point inside a task.
  Barrier& barrier() { return barrier_; }

  /// Runs task(thread) on every thread, the caller's being thread 0; returns when all are done.
  /// Tasks must not throw.
  void run(const std::function<void(int32_t thread)>& task) {
    task_ = task;
    barrier_.wait();
    task_(0);
    barrier_.wait();
  }

 private:
  const int32_t size_;
  Barrier barrier_;
  bool stopping_ = false;
  std::function<void(int32_t)> task_;
  std::vector<std::thread> workers_;
};

}  // namespace relay::measure
