// The CUDA runtime with owners and checks: memory with guards, streams and graphs of the GPU tests.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <source_location>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace relay::test {

/// An error of the CUDA runtime: a failed test, where a relay::Error may be what a test expects.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws DeviceError unless `error` is success.
void cuda_ok(cudaError_t error, std::source_location where = std::source_location::current());

/// Whether there is a GPU. Tests skip without one: RELAY_REQUIRE_GPU();
bool have_gpu();
/// Compute capability of the GPU, e.g. 90.
int compute_capability();
/// Held while a thread uses the GPU: capturing a graph forbids others to allocate meanwhile.
std::mutex& gpu_mutex();

#define RELAY_REQUIRE_GPU()                                                \
  do {                                                                     \
    if (!::relay::test::have_gpu()) GTEST_SKIP() << "needs an NVIDIA GPU"; \
  } while (false)

/// A stream that does not wait for the default one, so work enqueued elsewhere by mistake shows.
class DeviceStream {
 public:
  DeviceStream() { cuda_ok(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~DeviceStream() { cudaStreamDestroy(stream_); }
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;

  cudaStream_t get() const { return stream_; }
  /// Waits for all work. A kernel that never ends cannot be stopped: after RELAY_TEST_GPU_TIMEOUT
  /// seconds (default 30) the program says `what` hangs and exits.
  void wait(const std::string& what) const;

 private:
  cudaStream_t stream_ = nullptr;
};

/// Device memory between guards. Filling and copying complete before they return; whoever works in
/// a stream waits for it first.
class DeviceBuffer {
 public:
  static constexpr unsigned char kGuardByte = 0xa5;

  /// Holds `fill` in every byte.
  explicit DeviceBuffer(size_t bytes, unsigned char fill = 0xff);
  /// Holds a copy of `values`.
  template <typename T>
  static DeviceBuffer of(std::span<const T> values) {
    DeviceBuffer buffer(values.size_bytes());
    buffer.upload(values);
    return buffer;
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        bytes_(other.bytes_),
        guard_(other.guard_) {}
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;
  ~DeviceBuffer() { cudaFree(memory_); }

  void* data() const { return memory_ + guard_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data());
  }
  size_t bytes() const { return bytes_; }

  void fill(unsigned char byte);
  template <typename T>
  void upload(std::span<const T> values, size_t byte_offset = 0) {
    write(values.data(), values.size_bytes(), byte_offset);
  }
  std::vector<unsigned char> download() const;
  /// Empty, or which byte next to the buffer has been written.
  std::string broken_guards(const std::string& name) const;

 private:
  void write(const void* from, size_t bytes, size_t byte_offset);

  unsigned char* memory_ = nullptr;
  size_t bytes_;
  size_t guard_;
};

/// What `enqueue` puts into the stream, captured in the strictest mode: nothing in it may allocate,
/// synchronise or touch the default stream.
class DeviceGraph {
 public:
  template <typename Enqueue>
  DeviceGraph(const DeviceStream& stream, Enqueue&& enqueue) {
    cuda_ok(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
    cudaGraph_t graph = nullptr;
    try {
      enqueue();
    } catch (...) {
      cudaStreamEndCapture(stream.get(), &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();  // an invalidated capture is not the next call's error
      throw;
    }
    cuda_ok(cudaStreamEndCapture(stream.get(), &graph));
    const cudaError_t error = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    cuda_ok(error);
  }
  ~DeviceGraph() {
    if (graph_) cudaGraphExecDestroy(graph_);
  }
  DeviceGraph(const DeviceGraph&) = delete;
  DeviceGraph& operator=(const DeviceGraph&) = delete;

  void launch(const DeviceStream& stream) const { cuda_ok(cudaGraphLaunch(graph_, stream.get())); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace relay::test
