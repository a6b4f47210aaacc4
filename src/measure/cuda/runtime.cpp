#include "measure/cuda/runtime.h"

#include <string>

#include "measure/format.h"
#include "relay/types.h"

namespace relay::measure {

void cuda_ok(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call would report it again
  throw Error(std::string(doing) + ": " + cudaGetErrorString(error));
}

DeviceBuffer::DeviceBuffer(size_t bytes) : bytes_(bytes) {
  const std::string doing =
      "allocating " + measure::bytes(static_cast<double>(bytes)) + " of GPU memory";
  cuda_ok(cudaMalloc(&data_, bytes), doing.c_str());
}

void DeviceBuffer::upload(const void* from, size_t bytes) {
  cuda_ok(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "copying to the GPU");
  // The copy is the default stream's, for which other streams do not wait.
  cuda_ok(cudaStreamSynchronize(nullptr), "copying to the GPU");
}

DeviceStream::DeviceStream() {
  cuda_ok(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
}

void DeviceStream::wait() const { cuda_ok(cudaStreamSynchronize(stream_), "running on the GPU"); }

DeviceEvent::DeviceEvent() { cuda_ok(cudaEventCreate(&event_), "making an event"); }

void DeviceEvent::record(const DeviceStream& stream) {
  cuda_ok(cudaEventRecord(event_, stream.get()), "recording an event");
}

double DeviceEvent::seconds_since(const DeviceEvent& start) const {
  cuda_ok(cudaEventSynchronize(event_), "running on the GPU");
  float milliseconds = 0;
  cuda_ok(cudaEventElapsedTime(&milliseconds, start.event_, event_), "reading the clock");
  return milliseconds * 1e-3;
}

}  // namespace relay::measure
