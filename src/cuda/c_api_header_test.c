/* The header is C: this file is compiled as C. */
#include "relay/relay_cuda.h"

size_t relay_cuda_size_in_c(int which) {
  switch (which) {
    case 0:
      return sizeof(relay_cuda_plan_options);
    case 1:
      return sizeof(relay_cuda_batch);
    case 2:
      return sizeof(relay_cuda_inputs);
    case 3:
      return sizeof(relay_cuda_kv_write);
    default:
      return sizeof(relay_cuda_summary);
  }
}
