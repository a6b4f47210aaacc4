// The inner half of the oracle, for tests that derive error bounds from the logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "relay/reference.h"

namespace relay {

/// The logits of query head `head` of row `row` over `slots` (see relay/inputs.h), in double;
/// -inf where a bias hides the slot.
std::vector<double> reference_logits(const HeadShape& shape, const AttentionInputs& inputs,
                                     int64_t row, int64_t head, int64_t position,
                                     std::span<const AttendedSlot> slots);

}  // namespace relay
