#include "openmp.h"

#include <atomic>
#include <string>

namespace {

relay_openmp runtime{};
thread_local std::string last_error;

/// Fewer elements than this are written by the calling thread alone: waking the others costs more.
constexpr int64_t kElementsWorthThreads = 16 * 1024;

relay_status fail(relay_status status, const char* what) {
  last_error = what;
  return status;
}

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
  if (given == nullptr || given->size != sizeof(relay_openmp)) {
    return fail(RELAY_INVALID, "relay_openmp.size is not its sizeof");
  }
  if (given->parallel == nullptr || given->max_threads == nullptr || given->thread_num == nullptr ||
      given->num_threads == nullptr) {
    return fail(RELAY_INVALID, "the OpenMP runtime lacks one of the entry points");
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
  std::atomic<relay_status> status{RELAY_OK};
  parallel(threads, [&](int thread, int granted) {
    for (int32_t share = thread; share < threads; share += granted) {
      const relay_status s = relay_attend(plan, inputs, workspace, share);
      if (s != RELAY_OK) status.store(s, std::memory_order_relaxed);
    }
  });
  if (status != RELAY_OK) return fail(status, "the workspace was not fitted to this plan");
  return RELAY_OK;
}

relay_status relay_openmp_write(const relay_kv_write* write) {
  if (write == nullptr) return fail(RELAY_INVALID, "null argument");
  const int64_t elements = write->tokens * write->kv_heads * (int64_t{write->k_dim} + write->v_dim);
  if (runtime.parallel == nullptr || elements < kElementsWorthThreads) {
    const relay_status status = relay_write_kv(write, 0, write->kv_heads);
    return status == RELAY_OK ? status : fail(status, relay_last_error());
  }
  std::atomic<relay_status> status{RELAY_OK};
  parallel(runtime.max_threads(), [&](int thread, int threads) {
    const relay_status s = relay_write_kv(write, write->kv_heads * thread / threads,
                                          write->kv_heads * (thread + 1) / threads);
    if (s != RELAY_OK) status.store(s, std::memory_order_relaxed);
  });
  if (status != RELAY_OK) return fail(status, "the new tokens do not fit the KV cache");
  return RELAY_OK;
}

}  // extern "C"
