// What `relay isa` says of a GPU.
#include <algorithm>

#include "measure/cuda/gpu.h"
#include "measure/format.h"

namespace relay::measure {

std::string to_text(const Gpu& gpu, int index) {
  std::string text = format("GPU %d: %s\n", index, gpu.name.c_str());
  std::vector<std::string> lines;
  for (const GpuPath& one : gpu.paths) {
    const std::string begin = "  " + (one.path.empty() ? "none" : one.path) + " for KV in ";
    const std::string end = one.path.empty() ? ": " + one.obstacle : "";
    const auto same = std::find_if(lines.begin(), lines.end(), [&](const std::string& line) {
      return !one.path.empty() && line.starts_with(begin);
    });
    if (same != lines.end()) {
      *same += std::string(", ") + to_string(one.kv_type);
    } else {
      lines.push_back(begin + to_string(one.kv_type) + end);
    }
  }
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

}  // namespace relay::measure
