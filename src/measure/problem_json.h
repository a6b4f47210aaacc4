// A problem as the reports name it.
#pragma once

#include <nlohmann/json.hpp>

#include "measure/problem.h"

namespace relay::measure {

inline nlohmann::json json_of(const OpProblem& p) {
  return {{"heads", p.shape.q_heads},
          {"kv_heads", p.shape.kv_heads},
          {"head_dim", p.shape.qk_dim},
          {"v_head_dim", p.shape.v_dim},
          {"kv_type", to_string(p.kv_type)},
          {"prefix", p.prefix},
          {"context", p.context},
          {"batch", p.batch}};
}

}  // namespace relay::measure
