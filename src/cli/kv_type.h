// --kv-type of several subcommands.
#pragma once

#include <string>

#include "relay/types.h"

namespace relay::cli {

inline DType parse_kv_type(const std::string& name) {
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0}) {
    if (name == to_string(type)) return type;
  }
  throw Error("--kv-type is one of f32, f16, bf16, q8_0, not '" + name + "'");
}

}  // namespace relay::cli
