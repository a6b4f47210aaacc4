// Stands in for gpu.cpp, operator.cpp and explain.cpp in a program without CUDA.
#include "measure/cuda/explain.h"
#include "measure/cuda/gpu.h"
#include "measure/cuda/operator.h"

namespace relay::measure {

void require_gpu() {
  throw Error(
      "this program was built without CUDA: build the preset cuda, or add -DRELAY_CUDA=ON to "
      "another (it needs nvcc, see docs/gpu.md)");
}

std::vector<Gpu> find_gpus() {
  require_gpu();
  return {};
}

GpuOpReport run_op_on_gpu(std::span<const OpProblem>, int,
                          const std::function<void(const std::string&)>&) {
  require_gpu();
  return {};
}

GpuExplanation explain_on_gpu(const ExplainProblem&, int) {
  require_gpu();
  return {};
}

}  // namespace relay::measure
