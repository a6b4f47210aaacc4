// A stranger's program: two requests share four KV slots; checks attention against a direct sum.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "relay/attention.h"
#include "relay/forest.h"

int main() {
  constexpr int kRows = 2, kSlots = 4, kDim = 32;
  std::vector<float> q(kRows * kDim), k(kSlots * kDim), v(kSlots * kDim), out(kRows * kDim);
  for (int i = 0; i < kRows * kDim; ++i) q[i] = std::sin(0.7f * static_cast<float>(i));
  for (int i = 0; i < kSlots * kDim; ++i) {
    k[i] = std::cos(0.3f * static_cast<float>(i));
    v[i] = std::sin(0.1f * static_cast<float>(i));
  }

  const std::vector<relay::TreeNode> nodes = {{-1, {{0, 0, kSlots}}}};
  const std::vector<int32_t> leaves(kRows, 0);
  relay::Forest forest;
  relay::build_from_tree({.nodes = nodes, .leaf_of_row = leaves, .position_of_row = {}},
                         relay::Sharing::kOn, forest);

  relay::PlanOptions options;
  options.shape = {.q_heads = 1, .kv_heads = 1, .qk_dim = kDim, .v_dim = kDim};
  options.k_type = options.v_type = relay::DType::kF32;
  constexpr int64_t kStride = kDim * sizeof(float);
  relay::AttentionInputs inputs;
  inputs.q = {relay::DType::kF32, q.data(), kStride, kStride};
  inputs.kv.k = {relay::DType::kF32, k.data(), 0, kStride, kStride};
  inputs.kv.v = {relay::DType::kF32, v.data(), 0, kStride, kStride};
  inputs.out = {relay::DType::kF32, out.data(), kStride, kStride};
  inputs.scale = 0.2f;
  relay::attend_forest(forest, options, inputs);

  double worst = 0;
  for (int r = 0; r < kRows; ++r) {
    double weights[kSlots], total = 0;
    for (int s = 0; s < kSlots; ++s) {
      double dot = 0;
      for (int d = 0; d < kDim; ++d) dot += double{q[r * kDim + d]} * double{k[s * kDim + d]};
      total += weights[s] = std::exp(0.2 * dot);
    }
    for (int d = 0; d < kDim; ++d) {
      double want = 0;
      for (int s = 0; s < kSlots; ++s) want += weights[s] / total * double{v[s * kDim + d]};
      worst = std::fmax(worst, std::fabs(want - double{out[r * kDim + d]}));
    }
  }
  std::printf("consumer: isa %s, worst difference %.2e\n", relay::current_isa().c_str(), worst);
  return worst < 1e-5 ? 0 : 1;
}
