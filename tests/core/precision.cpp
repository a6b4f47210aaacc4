#include "core/precision.h"

#include <algorithm>
#include <stdexcept>

namespace relay::test {
namespace {

constexpr DType kF16 = DType::kF16;
constexpr DType kBF16 = DType::kBF16;
constexpr DType kQ8 = DType::kQ8_0;

struct Line {
  const char* isa;
  DType k_type;
  DType v_type;
  int multiple;  ///< both head sizes have to be multiples of it
  Precision precision;
};

/// Whatever has no line here multiplies in f32.
constexpr Line kLines[] = {
    {"amx", kBF16, kBF16, 1, {.few = Form::kF32, .many = Form::kBF16}},
    {"amx", kF16, kF16, 32, {.few = Form::kF32, .many = Form::kBF16Sums}},
    {"amx", kF16, kQ8, 32, {.few = Form::kF32, .many = Form::kBF16Sums}},
    {"amx", kQ8, kF16, 32, {.few = Form::kF32, .many = Form::kBF16Sums}},
    {"amx", kQ8, kQ8, 32, {.few = Form::kBytes, .many = Form::kBF16Sums}},
    {"avx512bf16", kBF16, kBF16, 1, {.few = Form::kBF16, .many = Form::kBF16}},
    {"avx512bf16", kQ8, kQ8, 32, {.few = Form::kBytes, .many = Form::kBF16Keys}},
    {"sve256", kBF16, kBF16, 1, {.few = Form::kBF16, .many = Form::kBF16}},
    {"neonbf16", kBF16, kBF16, 1, {.few = Form::kBF16, .many = Form::kBF16}},
};

}  // namespace

Precision precision_of(const std::string& isa, const HeadShape& shape, DType k_type, DType v_type) {
  if (std::ranges::find(all_isas(), isa) == all_isas().end()) {
    throw std::invalid_argument("tests/core/precision.cpp knows no kernel set '" + isa + "'");
  }
  for (const Line& line : kLines) {
    if (isa == line.isa && k_type == line.k_type && v_type == line.v_type &&
        shape.qk_dim % line.multiple == 0 && shape.v_dim % line.multiple == 0) {
      return line.precision;
    }
  }
  return {};
}

const std::vector<std::string>& all_isas() {
  static const std::vector<std::string> names = {"amx",    "avx512bf16", "avx512", "avx2",
                                                 "sve256", "neonbf16",   "neon",   "plain"};
  return names;
}

}  // namespace relay::test
