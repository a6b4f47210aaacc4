// Stands in for model_shape.cpp in a program without llama.cpp.
#include <stdexcept>

#include "cli/model_shape.h"

namespace relay::cli {
namespace {

[[noreturn]] void fail(const char* option) {
  throw std::runtime_error(std::string(option) +
                           " needs llama.cpp, and this program was built without it "
                           "(RELAY_BUILD_LLAMA=OFF): build the preset release, or name --heads, "
                           "--kv-heads, --head-dim and --layers");
}

}  // namespace

ModelShape read_model_shape(const std::string&) { fail("--model"); }
ModelShape find_model_shape(const std::string&) { fail("--shape"); }

}  // namespace relay::cli
