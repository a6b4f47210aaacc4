// Which GPUs there are, and which of Relay's kernels serve them.
#pragma once

#include <string>
#include <vector>

#include "relay/types.h"

namespace relay::measure {

struct GpuPath {
  DType kv_type;
  std::string path;      ///< "wgmma" or "mma"; empty where none serves it
  std::string obstacle;  ///< and why
};

struct Gpu {
  std::string name;  ///< "NVIDIA H100 80GB HBM3 (9.0, 132 SMs)"
  std::vector<GpuPath> paths;
};

/// The GPUs of this machine, each tried with one request of one token. Throws Error where there is
/// none, and says why: a program without CUDA, no driver, an old one, no device.
std::vector<Gpu> find_gpus();
/// The same without trying them: throws Error where there is none.
void require_gpu();

/// A line for the GPU and one for each path, or for what it does not serve.
std::string to_text(const Gpu& gpu, int index);

}  // namespace relay::measure
