// Whether an operator's inputs can be served with a plan.
#include <string>

#include "cpu/execution/operands.h"
#include "cpu/plan/plan.h"
#include "relay/attention.h"

namespace relay {

void validate(const Plan& plan, const AttentionInputs& in) {
  const auto fail = [](const std::string& what) { throw Error("attention: " + what); };
  if (plan.forest.rows > 0 && (in.q.data == nullptr || in.out.data == nullptr)) {
    fail("q or out is null");
  }
  if (!is_float_type(in.q.type) || !is_float_type(in.out.type)) {
    fail("q and out are f32, f16 or bf16");
  }
  if (in.kv.k.type != plan.options.k_type || in.kv.v.type != plan.options.v_type) {
    fail("K or V has another type than planned");
  }
  if (in.kv.layout != plan.options.layout) fail("K and V have another layout than planned");
  if (const char* fault = fault_of(in.kv, plan.options.shape)) fail(fault);
  if (in.kv.slots != 0 && plan.slots_end > in.kv.slots) {
    fail("the batch attends slot " + std::to_string(plan.slots_end - 1) + ", the KV cache has " +
         std::to_string(in.kv.slots) + " slots");
  }
  if (!plan.forest.segments.empty() && (in.kv.k.data == nullptr || in.kv.v.data == nullptr)) {
    fail("K or V is null");
  }
  if ((in.kv.k.type == DType::kCustom && in.kv.k.unpack == nullptr) ||
      (in.kv.v.type == DType::kCustom && in.kv.v.unpack == nullptr)) {
    fail("kCustom needs an unpack function");
  }
  if (in.q.rows_per_block < 1 || in.out.rows_per_block < 1 || in.bias.rows_per_block < 1) {
    fail("rows_per_block must be positive");
  }
  if (in.window < 0) fail("window must not be negative");
  if (!(in.softcap >= 0.0f)) fail("softcap must not be negative");
  if (in.scale != in.scale) fail("scale is NaN");
  bool biased = false;
  for (const Segment& s : plan.forest.segments) biased |= s.visibility == Visibility::kBias;
  if (biased && in.bias.data == nullptr) fail("the forest needs a bias matrix");
  if (in.bias.data != nullptr && in.bias.type != DType::kF16 && in.bias.type != DType::kF32) {
    fail("bias is f16 or f32");
  }
  if (in.slopes != nullptr && in.bias.data == nullptr && plan.forest.rows > 0 &&
      plan.forest.positions.empty()) {
    fail("ALiBi by distance needs the forest's positions");
  }
}

}  // namespace relay
