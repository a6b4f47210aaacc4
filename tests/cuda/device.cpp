#include "cuda/device.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "core/test_env.h"

namespace relay::test {
namespace {

/// Bytes on either side of a buffer. A multiple of 256 keeps the alignment that cudaMalloc gives.
/// None in the compact runs under a memory checker, which sees the first byte beyond by itself.
size_t guard_bytes() { return scale() <= 0.1 ? 0 : 256; }

double timeout_seconds() {
  const char* text = std::getenv("RELAY_TEST_GPU_TIMEOUT");
  const double parsed = text ? std::atof(text) : 0;
  return parsed > 0 ? parsed : 30;
}

/// Copies and fills use the default stream, and the streams of tests do not wait for that.
void settle() { cuda_ok(cudaStreamSynchronize(nullptr)); }

}  // namespace

void cuda_ok(cudaError_t error, std::source_location where) {
  if (error == cudaSuccess) return;
  throw DeviceError(std::string("CUDA: ") + cudaGetErrorString(error) + " (" +
                    cudaGetErrorName(error) + "), " + where.file_name() + ":" +
                    std::to_string(where.line()));
}

bool have_gpu() {
  static const bool have = [] {
    int count = 0;
    const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
    cudaGetLastError();
    return found;
  }();
  return have;
}

int compute_capability() {
  static const int value = [] {
    int device = 0, major = 0, minor = 0;
    cuda_ok(cudaGetDevice(&device));
    cuda_ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cuda_ok(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return 10 * major + minor;
  }();
  return value;
}

std::mutex& gpu_mutex() {
  static std::mutex mutex;
  return mutex;
}

void DeviceStream::wait(const std::string& what) const {
  using Clock = std::chrono::steady_clock;
  static const double limit = timeout_seconds();
  cuda_ok(cudaGetLastError());  // left by whoever enqueued the work: the next caller would trip
  const auto begin = Clock::now();
  for (;;) {
    const cudaError_t state = cudaStreamQuery(stream_);
    if (state != cudaErrorNotReady) {
      cuda_ok(state);
      return;
    }
    cudaGetLastError();  // "not ready" is no error to be found by the next call
    if (std::chrono::duration<double>(Clock::now() - begin).count() > limit) {
      std::fprintf(stderr, "the GPU has not finished within %g seconds: %s\n", limit, what.c_str());
      std::fflush(nullptr);
      std::_Exit(1);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

DeviceBuffer::DeviceBuffer(size_t bytes, unsigned char fill_byte)
    : bytes_(bytes), guard_(guard_bytes()) {
  void* memory = nullptr;
  cuda_ok(cudaMalloc(&memory, std::max<size_t>(1, bytes + 2 * guard_)));
  memory_ = static_cast<unsigned char*>(memory);
  try {
    if (guard_ > 0) cuda_ok(cudaMemset(memory_, kGuardByte, bytes + 2 * guard_));
    fill(fill_byte);
  } catch (...) {
    cudaFree(memory_);
    throw;
  }
}

void DeviceBuffer::fill(unsigned char byte) {
  if (bytes_ > 0) cuda_ok(cudaMemset(data(), byte, bytes_));
  settle();
}

void DeviceBuffer::write(const void* from, size_t bytes, size_t byte_offset) {
  if (byte_offset + bytes > bytes_) throw DeviceError("upload beyond the end of a buffer");
  if (bytes == 0) return;
  cuda_ok(cudaMemcpy(as<unsigned char>() + byte_offset, from, bytes, cudaMemcpyHostToDevice));
  settle();
}

std::vector<unsigned char> DeviceBuffer::download() const {
  std::vector<unsigned char> host(bytes_);
  if (bytes_ > 0) cuda_ok(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost));
  return host;
}

std::string DeviceBuffer::broken_guards(const std::string& name) const {
  if (guard_ == 0) return "";
  std::vector<unsigned char> guard(guard_);
  for (const bool behind : {false, true}) {
    const unsigned char* from = behind ? as<unsigned char>() + bytes_ : memory_;
    cuda_ok(cudaMemcpy(guard.data(), from, guard_, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < guard_; ++i) {
      if (guard[i] == kGuardByte) continue;
      const std::string where = behind ? std::to_string(i) + " bytes behind its end"
                                       : std::to_string(guard_ - i) + " bytes before its beginning";
      return name + " written " + where + "; ";
    }
  }
  return "";
}

}  // namespace relay::test
