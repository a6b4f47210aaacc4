// The oracle: dense attention in double precision, a few plain loops, no sharing, no tiles.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "relay/inputs.h"

namespace relay {

/// What one row attends, listed slot by slot: independent of any forest.
struct AttendedSlot {
  int64_t slot = 0;
  int64_t column = 0;
};

/// Dense attention of row `row` over `slots` in double precision.
/// Visibility is the caller's: hidden slots are simply not listed (a bias of -inf also hides).
/// `position` is used by ALiBi only. Writes out[q_heads * v_dim], lse[q_heads] if not null.
void reference_row(const HeadShape& shape, const AttentionInputs& inputs, int64_t row,
                   int64_t position, std::span<const AttendedSlot> slots, double* out, double* lse);

/// Decodes element i of a vector of `type` to double (f32, f16, bf16, q8_0, f8_e4m3).
double decode_element(DType type, const void* vector, int64_t i);

}  // namespace relay
