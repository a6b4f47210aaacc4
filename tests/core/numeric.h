// Encoders of the element types, written apart from the library's own conversions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "relay/types.h"

namespace relay::test {

uint16_t to_f16(float value);   ///< nearest, ties to even; overflow to infinity
uint16_t to_bf16(float value);  ///< nearest, ties to even

/// An int8 format of the tests' own (DType::kCustom): one f32 scale, then the elements; unaligned.
int64_t custom_bytes(int64_t count);
void unpack_custom(const void* row, float* out, int64_t count);

/// Bytes of one vector of `type`, kCustom included.
int64_t vector_bytes(DType type, int64_t count);

/// The alignment that the elements of `type` need, in bytes.
int64_t element_alignment(DType type);

/// Writes `values` as one vector of `type`; quantized types pick a scale per block (or vector).
void encode(DType type, std::span<const float> values, void* to);

}  // namespace relay::test
