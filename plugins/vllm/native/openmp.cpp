#include "openmp.h"

#include <atomic>
#include <cstring>
#include <string>

namespace {

relay_openmp runtime{};
thread_local std::string last_error;

/// Fewer bytes than this are written by the calling thread alone: waking the others costs more.
constexpr int64_t kBytesWorthThreads = 64 * 1024;

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

void write_vectors(const relay_kv_write& w, const relay_kv& cache, const void* vectors,
                   int64_t token_stride, int64_t head_stride, int32_t bytes, int64_t token) {
  const int64_t slot = w.slots[token];
  auto* to = static_cast<char*>(const_cast<void*>(cache.data)) +
             slot / w.block_size * cache.block_stride + slot % w.block_size * cache.slot_stride;
  const auto* from = static_cast<const char*>(vectors) + token * token_stride;
  for (int32_t h = 0; h < w.kv_heads; ++h) {
    std::memcpy(to + h * cache.head_stride, from + h * head_stride, static_cast<size_t>(bytes));
  }
}

void write_tokens(const relay_kv_write& w, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (w.slots[t] < 0) continue;
    write_vectors(w, w.k_cache, w.k, w.k_token_stride, w.k_head_stride, w.k_bytes, t);
    write_vectors(w, w.v_cache, w.v, w.v_token_stride, w.v_head_stride, w.v_bytes, t);
  }
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
  if (write == nullptr || write->size != sizeof(relay_kv_write)) {
    return fail(RELAY_INVALID, "relay_kv_write.size is not its sizeof");
  }
  const relay_kv_write& w = *write;
  const int64_t bytes = w.tokens * w.kv_heads * (int64_t{w.k_bytes} + w.v_bytes);
  if (runtime.parallel == nullptr || bytes < kBytesWorthThreads) {
    write_tokens(w, 0, w.tokens);
    return RELAY_OK;
  }
  parallel(runtime.max_threads(), [&](int thread, int threads) {
    write_tokens(w, w.tokens * thread / threads, w.tokens * (thread + 1) / threads);
  });
  return RELAY_OK;
}

}  // extern "C"
