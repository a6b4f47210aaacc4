// The batch that is measured: decode rows over one shared prefix, each with a context of its own.
#pragma once

#include <cstdint>
#include <string>

#include "relay/types.h"

namespace relay::measure {

struct OpProblem {
  HeadShape shape;
  DType kv_type = DType::kF16;
  int64_t prefix = 4096;  ///< shared slots
  int64_t context = 128;  ///< slots of each request's own
  int32_t batch = 32;     ///< requests, one row each
  KvLayout layout = KvLayout::kRows;
};

enum class Device : uint8_t { kCpu, kCuda };

/// The type of a --kv-type; throws Error for a name of none that the device's kernels serve.
DType parse_kv_type(const std::string& name, Device device = Device::kCpu);
/// Throws Error for a batch without a request or without a slot.
void check_batch(const OpProblem& problem);
/// Bytes of one slot's K and V, of all KV heads.
int64_t slot_bytes(const OpProblem& problem);
/// The paper's speed-up of b requests over s shared slots and c of their own:
/// b (s + c) / (s + b c).
double relay_speedup(const OpProblem& problem);
/// "32/8 heads of 128".
std::string to_string(const HeadShape& shape);
/// "f16, prefix 4096, context 128, batch 32".
std::string to_string(const OpProblem& problem);

}  // namespace relay::measure
