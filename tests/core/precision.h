// In which form each kernel set multiplies, written down by hand. The tests' tolerances follow from
// this table and never from what the kernels say of themselves: a kernel that became coarser would
// otherwise widen its own bound. precision_test holds the kernels to the table.
#pragma once

#include <string>
#include <vector>

#include "relay/types.h"

namespace relay::test {

/// What is rounded before it is multiplied. tolerance.h derives what each form may lose.
enum class Form : uint8_t {
  kF32,       ///< nothing
  kBF16,      ///< queries and weights to bf16
  kBF16Sums,  ///< queries, weights and KV to sums of two bf16
  kBytes,     ///< q8_0: queries to bytes, weights to 16-bit integers
  kBF16Keys,  ///< q8_0: queries and K to bf16, weights to 16-bit integers
};

struct Precision {
  Form few = Form::kF32;   ///< where one pass is for few query rows
  Form many = Form::kF32;  ///< for many, and for KV in tiles
  bool operator==(const Precision&) const = default;
};

/// Of kernel set `isa` for these types and head sizes. Throws std::invalid_argument for a set that
/// the table does not know: a new set needs its lines there.
Precision precision_of(const std::string& isa, const HeadShape& shape, DType k_type, DType v_type);

/// The kernel sets of all machines, best first.
const std::vector<std::string>& all_isas();

}  // namespace relay::test
