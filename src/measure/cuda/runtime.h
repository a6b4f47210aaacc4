// The CUDA runtime with owners and checks: memory, streams and events.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>
#include <utility>

namespace relay::measure {

/// Throws Error unless `error` is success: "<doing>: <what CUDA says>".
void cuda_ok(cudaError_t error, const char* doing);

/// Device memory.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes);
  /// Holds a copy of `values` when it returns.
  template <typename T>
  explicit DeviceBuffer(std::span<const T> values) : DeviceBuffer(values.size_bytes()) {
    upload(values.data(), values.size_bytes());
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void upload(const void* from, size_t bytes);

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

/// A stream that does not wait for the default one.
class DeviceStream {
 public:
  DeviceStream();
  ~DeviceStream() { cudaStreamDestroy(stream_); }
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;

  cudaStream_t get() const { return stream_; }
  void wait() const;

 private:
  cudaStream_t stream_ = nullptr;
};

/// A point of time in a stream.
class DeviceEvent {
 public:
  DeviceEvent();
  ~DeviceEvent() { cudaEventDestroy(event_); }
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;

  void record(const DeviceStream& stream);
  /// Waits for this event; seconds since `start`.
  double seconds_since(const DeviceEvent& start) const;

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace relay::measure
