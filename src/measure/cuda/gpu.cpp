#include "measure/cuda/gpu.h"

#include "measure/cuda/batch.h"
#include "measure/cuda/runtime.h"
#include "measure/format.h"
#include "relay/cuda.h"

namespace relay::measure {
namespace {

/// 13000 as "13.0".
std::string version(int number) { return format("%d.%d", number / 1000, number % 1000 / 10); }

int count_gpus() {
  int driver = 0;
  cuda_ok(cudaDriverGetVersion(&driver), "asking for the NVIDIA driver");
  if (driver == 0) throw Error("no NVIDIA driver is installed");
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    throw Error("the NVIDIA driver is too old: it serves CUDA " + version(driver) +
                ", this program needs " + version(CUDART_VERSION));
  }
  if (error == cudaErrorNoDevice) {
    cudaGetLastError();
    count = 0;
  } else {
    cuda_ok(error, "looking for GPUs");
  }
  if (count == 0) throw Error("the NVIDIA driver finds no GPU");
  return count;
}

/// Runs the smallest batch on the current GPU: a plan alone would not show that kernels for it have
/// been compiled in.
GpuPath try_kv_type(DType kv_type) {
  GpuPath result{.kv_type = kv_type, .path = "", .obstacle = ""};
  try {
    const OpProblem problem{.shape = {.q_heads = 1, .kv_heads = 1, .qk_dim = 128, .v_dim = 128},
                            .kv_type = kv_type,
                            .prefix = 0,
                            .context = 1,
                            .batch = 1};
    const DeviceStream stream;
    const DeviceBatch batch(problem);
    const DeviceBatch::Plan plan = batch.make_plan(Sharing::kOn, stream);
    const DeviceOperands operands(problem, batch, stream);
    batch.plan(plan, stream);
    cuda::attend(*plan.plan, operands.inputs(Sharing::kOn), stream.get());
    stream.wait();
    result.path = cuda::path_of(*plan.plan);
  } catch (const Error& error) {
    result.obstacle = error.what();
  }
  return result;
}

}  // namespace

void require_gpu() { count_gpus(); }

std::vector<Gpu> find_gpus() {
  std::vector<Gpu> gpus(count_gpus());
  for (size_t i = 0; i < gpus.size(); ++i) {
    cuda_ok(cudaSetDevice(static_cast<int>(i)), "choosing a GPU");
    gpus[i].name = cuda::device_name();
    for (DType type : {DType::kF16, DType::kBF16, DType::kF8E4M3}) {
      gpus[i].paths.push_back(try_kv_type(type));
    }
  }
  cuda_ok(cudaSetDevice(0), "choosing a GPU");
  return gpus;
}

}  // namespace relay::measure
