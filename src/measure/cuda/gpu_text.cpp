// What `relay isa` says of a GPU.
#include <functional>
#include <map>
#include <string>

#include "measure/cuda/gpu.h"
#include "measure/format.h"

namespace relay::measure {

std::string to_text(const Gpu& gpu, int index) {
  std::map<std::string, std::string, std::greater<>> types_of;  // wgmma before mma
  std::string obstacles;
  for (const GpuPath& one : gpu.paths) {
    const char* type = to_string(one.kv_type);
    if (one.path.empty()) {
      obstacles += format("  none for KV in %s: %s\n", type, one.obstacle.c_str());
    } else {
      std::string& types = types_of[one.path];
      if (!types.empty()) types += ", ";
      types += type;
    }
  }
  std::string text = format("GPU %d: %s\n", index, gpu.name.c_str());
  for (const auto& [path, types] : types_of) {
    text += format("  %s for KV in %s\n", path.c_str(), types.c_str());
  }
  return text + obstacles;
}

}  // namespace relay::measure
