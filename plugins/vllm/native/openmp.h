/* Runs Relay on the OpenMP threads that the host process already has.
 *
 * vLLM binds the threads of one OpenMP runtime to its cores. A second runtime, or threads of our
 * own, would fight over the same cores, so this library links none: it is handed the entry points
 * of the one that is loaded. `GOMP_parallel` is the entry that GCC's compiled code calls; libgomp,
 * libomp and libiomp5 all have it. */
#ifndef RELAY_PLUGINS_VLLM_OPENMP_H_
#define RELAY_PLUGINS_VLLM_OPENMP_H_

#include "relay/relay.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  size_t size;
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*max_threads)(void);
  int (*thread_num)(void);
  int (*num_threads)(void);
} relay_openmp;

/* What to change after one of these functions has failed, for this thread. */
const char* relay_openmp_error(void);

/* Sets the runtime for the whole process; the pointers are copied. */
relay_status relay_openmp_use(const relay_openmp* runtime);

/* Threads of a parallel region started by the calling thread: what a plan is to be made for. */
relay_status relay_openmp_threads(int32_t* threads);

/* relay_check, and then relay_attend on the `threads` that the plan was made for; returns when the
 * output is complete. Where the runtime grants fewer, those there do the others' shares. */
relay_status relay_openmp_attend(const relay_plan* plan, const relay_inputs* inputs,
                                 relay_workspace* workspace, int32_t threads);

/* relay_write_kv of all heads, shared by the threads where there is enough to write. */
relay_status relay_openmp_write(const relay_kv_write* write);

#ifdef __cplusplus
}
#endif

#endif /* RELAY_PLUGINS_VLLM_OPENMP_H_ */
