#include "measure/problem.h"

#include <vector>

#include "measure/format.h"

namespace relay::measure {

DType parse_kv_type(const std::string& name, Device device) {
  const std::vector<DType> types =
      device == Device::kCpu ? std::vector{DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0}
                             : std::vector{DType::kF16, DType::kBF16, DType::kF8E4M3};
  std::string names;
  for (DType type : types) {
    if (name == to_string(type)) return type;
    names += names.empty() ? "" : ", ";
    names += to_string(type);
  }
  throw Error("--kv-type is one of " + names + (device == Device::kCuda ? " on a GPU" : "") +
              ", not '" + name + "'");
}

void check_batch(const OpProblem& p) {
  if (p.batch < 1 || p.prefix < 0 || p.context < 0 || p.prefix + p.context < 1) {
    throw Error("needs a batch of at least 1 and at least one slot to attend");
  }
}

int64_t slot_bytes(const OpProblem& p) {
  return p.shape.kv_heads *
         (row_bytes(p.kv_type, p.shape.qk_dim) + row_bytes(p.kv_type, p.shape.v_dim));
}

double relay_speedup(const OpProblem& p) {
  const double batch = p.batch;
  const auto prefix = static_cast<double>(p.prefix);
  const auto context = static_cast<double>(p.context);
  return batch * (prefix + context) / (prefix + batch * context);
}

std::string to_string(const HeadShape& shape) {
  std::string text = format("%d/%d heads of %d", shape.q_heads, shape.kv_heads, shape.qk_dim);
  if (shape.v_dim != shape.qk_dim) text += format("/%d", shape.v_dim);
  return text;
}

std::string to_string(const OpProblem& p) {
  return format("%s, prefix %lld, context %lld, batch %d", to_string(p.kv_type),
                static_cast<long long>(p.prefix), static_cast<long long>(p.context), p.batch);
}

}  // namespace relay::measure
