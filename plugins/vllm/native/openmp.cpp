#include "openmp.h"

#include <mutex>
#include <string>
#include <utility>

namespace {

relay_openmp runtime{};
thread_local std::string last_error;

/// Fewer elements than this are written by the calling thread alone: waking the others costs more.
constexpr int64_t kElementsWorthThreads = 16 * 1024;

relay_status fail(relay_status status, std::string what) {
  last_error = std::move(what);
  return status;
}

/// The first failure of a region's threads. The reason is a thread's own (relay_last_error), so it
/// is taken down where it is known.
class Outcome {
 public:
  void note(relay_status status) {
    if (status == RELAY_OK) return;
    const std::lock_guard lock(mutex_);
    if (status_ != RELAY_OK) return;
    status_ = status;
    what_ = relay_last_error();
  }
  /// Once the region has ended.
  relay_status report() { return status_ == RELAY_OK ? RELAY_OK : fail(status_, what_); }

 private:
  std::mutex mutex_;
  relay_status status_ = RELAY_OK;
  std::string what_;
};

/// Calls body(thread, threads) on each thread of a region of (at most) `threads`.
template <typename Body>
void parallel(int32_t threads, Body body) {
  runtime.parallel(
      [](void* data) { (*static_cast<Body*>(data))(runtime.thread_num(), runtime.num_threads()); },
      &body, static_cast<unsigned>(threads), 0);
}

}  // namespace

extern "C" {

const char* relay_openmp_error(void) { return last_error.c_str(); }

relay_status relay_openmp_use(const relay_openmp* given) {
  if (given == nullptr) return fail(RELAY_INVALID, "relay_openmp is null");
  if (given->size != sizeof(relay_openmp)) {
    return fail(RELAY_INVALID, "relay_openmp.size is " + std::to_string(given->size) +
                                   ", this library's is " + std::to_string(sizeof(relay_openmp)));
  }
  const char* lacking = given->parallel == nullptr      ? "GOMP_parallel"
                        : given->max_threads == nullptr ? "omp_get_max_threads"
                        : given->thread_num == nullptr  ? "omp_get_thread_num"
                        : given->num_threads == nullptr ? "omp_get_num_threads"
                                                        : nullptr;
  if (lacking != nullptr) {
    return fail(RELAY_INVALID, std::string("the OpenMP runtime is given without ") + lacking);
  }
  runtime = *given;
  return RELAY_OK;
}

relay_status relay_openmp_threads(int32_t* threads) {
  if (runtime.parallel == nullptr) return fail(RELAY_INVALID, "call relay_openmp_use first");
  *threads = runtime.max_threads();
  return RELAY_OK;
}

relay_status relay_openmp_attend(const relay_plan* plan, const relay_inputs* inputs,
                                 relay_workspace* workspace, int32_t threads) {
  if (runtime.parallel == nullptr) return fail(RELAY_INVALID, "call relay_openmp_use first");
  if (const relay_status status = relay_check(plan, inputs); status != RELAY_OK) {
    return fail(status, relay_last_error());
  }
  int32_t planned = 0;
  if (const relay_status status = relay_plan_threads(plan, &planned); status != RELAY_OK) {
    return fail(status, relay_last_error());
  }
  if (threads != planned) {
    return fail(RELAY_INVALID, "the plan was made for " + std::to_string(planned) +
                                   " threads, and is to be run on " + std::to_string(threads));
  }
  Outcome outcome;
  parallel(threads, [&](int thread, int granted) {
    for (int32_t share = thread; share < threads; share += granted) {
      outcome.note(relay_attend(plan, inputs, workspace, share));
    }
  });
  return outcome.report();
}

relay_status relay_openmp_write(const relay_kv_write* write) {
  if (write == nullptr) return fail(RELAY_INVALID, "relay_kv_write is null");
  const int64_t elements = write->tokens * write->kv_heads * (int64_t{write->k_dim} + write->v_dim);
  if (runtime.parallel == nullptr || elements < kElementsWorthThreads) {
    const relay_status status = relay_write_kv(write, 0, write->kv_heads);
    return status == RELAY_OK ? status : fail(status, relay_last_error());
  }
  Outcome outcome;
  parallel(runtime.max_threads(), [&](int thread, int threads) {
    outcome.note(relay_write_kv(write, write->kv_heads * thread / threads,
                                write->kv_heads * (thread + 1) / threads));
  });
  return outcome.report();
}

}  // extern "C"
