// What this machine can do at most, measured here and now: virtual machines differ from hour to
// hour, so a fraction of a roofline means something only against one of the same run.
#pragma once

#include <cstdint>
#include <string>

#include "measure/thread_pool.h"

namespace relay::measure {

struct Roofline {
  int32_t threads = 0;
  double f32_flops = 0;      ///< flop/s of fused multiply-adds on registers, widest vectors
  double bf16_flops = 0;     ///< flop/s of bf16 dot products (f32 sums); 0 where the CPU has none
  double read_bytes = 0;     ///< byte/s of a streaming read
  int64_t cache_bytes = 0;   ///< last-level cache, as the system tells
  int64_t buffer_bytes = 0;  ///< what was streamed

  /// Seconds that `flops` and `bytes` take at least.
  double time_floor(double flops, double bytes, bool bf16) const {
    const double peak = bf16 && bf16_flops > f32_flops ? bf16_flops : f32_flops;
    const double compute = flops / peak;
    const double read = bytes / read_bytes;
    return compute > read ? compute : read;
  }
};

/// Measures with all threads of the pool: about a second.
Roofline measure_roofline(ThreadPool& pool);
/// The same without memory.
Roofline measure_arithmetic(ThreadPool& pool);

std::string cpu_model();
/// Mean number of runnable threads over the last minute; negative where the system does not tell.
double load_average();

}  // namespace relay::measure
