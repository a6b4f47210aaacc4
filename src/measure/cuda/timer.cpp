#include "measure/cuda/timer.h"

#include <algorithm>
#include <vector>

#include "measure/cuda/memory_kernels.h"
#include "relay/cuda.h"

namespace relay::measure {
namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cuda_ok(cudaGetDevice(&device), "choosing a GPU");
  cuda_ok(cudaDeviceGetAttribute(&value, name, device), "asking the GPU");
  return value;
}

/// Whole words of the reading kernel.
int64_t rounded(int64_t bytes) { return bytes / 256 * 256; }

}  // namespace

GpuTimer::GpuTimer()
    : sink_(sizeof(uint32_t)), multiprocessors_(attribute(cudaDevAttrMultiProcessorCount)) {
  limits_.gpu = cuda::device_name();
  limits_.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  limits_.flush_bytes = std::max<int64_t>(rounded(4 * limits_.l2_bytes), int64_t{256} << 20);
  flush_ = DeviceBuffer(limits_.flush_bytes);
  // Written once: what has never been written may be read faster than memory.
  cuda_ok(cudaMemsetAsync(flush_.data(), 1, flush_.bytes(), stream_.get()), "filling GPU memory");

  // So much that neither the cache nor a launch counts; less where others hold the memory.
  size_t free = 0, total = 0;
  cuda_ok(cudaMemGetInfo(&free, &total), "asking for free GPU memory");
  limits_.stream_bytes =
      rounded(std::min<int64_t>(int64_t{2} << 30, static_cast<int64_t>(free / 2)));
  if (limits_.stream_bytes < 4 * limits_.l2_bytes) {
    throw Error("too little free GPU memory to measure how fast it is read: " +
                std::to_string(free >> 20) + " MiB");
  }
  const DeviceBuffer streamed(limits_.stream_bytes);
  cuda_ok(cudaMemsetAsync(streamed.data(), 1, streamed.bytes(), stream_.get()),
          "filling GPU memory");
  read(streamed);  // clocks and code
  std::vector<double> seconds;
  for (int round = 0; round < 10; ++round) {
    seconds.push_back(cold_seconds([&] { read(streamed); }));
  }
  limits_.read_bytes = static_cast<double>(limits_.stream_bytes) / quantile(seconds, 0.5);
}

double GpuTimer::cold_seconds(const std::function<void()>& enqueue) {
  // While the GPU reads, the host enqueues what comes next: no gap is timed.
  read(flush_);
  start_.record(stream_);
  enqueue();
  end_.record(stream_);
  return end_.seconds_since(start_);
}

void GpuTimer::read(const DeviceBuffer& buffer) {
  cuda_ok(launch_read(buffer.data(), buffer.bytes(), sink_.as<uint32_t>(), multiprocessors_,
                      stream_.get()),
          "reading GPU memory");
}

}  // namespace relay::measure
