// Batches to plan in tests, and costs that are the same on any machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/plan/cost_model.h"
#include "relay/attention.h"
#include "relay/forest.h"

namespace relay {

enum class Batch { kShared, kApart, kPrefill };

struct Case {
  std::string name;
  PlanOptions options;
  Forest forest;
};

/// Requests behind one prefix, each with a context of its own (0: of many lengths); kPrefill: the
/// first of them brings 512 new tokens.
inline Case make_case(const std::string& shape_name, HeadShape shape, DType type, int64_t prefix,
                      int32_t batch, int64_t context, Batch kind,
                      KvLayout layout = KvLayout::kRows) {
  Case c;
  c.options = {.shape = shape, .k_type = type, .v_type = type, .layout = layout};
  c.name = shape_name + " " + to_string(type) + (layout == KvLayout::kTiles ? " in tiles" : "") +
           ", prefix " + std::to_string(prefix) + ", batch " + std::to_string(batch) +
           ", context " + std::to_string(context) +
           (kind == Batch::kShared  ? ""
            : kind == Batch::kApart ? ", sharing off"
                                    : ", one prefilling");
  std::vector<TreeNode> nodes = {{.parent = -1, .spans = {{0, 0, prefix}}}};
  std::vector<int32_t> leaf_of_row;
  std::vector<int64_t> positions;
  int64_t slot = prefix;
  for (int32_t request = 0; request < batch; ++request) {
    const bool prefills = kind == Batch::kPrefill && request == 0;
    const int64_t slots = prefills ? 512 : context > 0 ? context : 16 + request * 197 % 497;
    nodes.push_back({.parent = 0, .spans = {{slot, prefix, slots}}});
    slot += layout == KvLayout::kTiles ? (slots + kTileSlots - 1) / kTileSlots * kTileSlots : slots;
    for (int64_t row = prefills ? 0 : slots - 1; row < slots; ++row) {
      leaf_of_row.push_back(request + 1);
      positions.push_back(prefix + row);
    }
  }
  build_from_tree({.nodes = nodes, .leaf_of_row = leaf_of_row, .position_of_row = positions},
                  kind == Batch::kApart ? Sharing::kOff : Sharing::kOn, c.forest);
  return c;
}

/// The built-in costs of a machine that multiplies bf16 by pairs, whatever machine this is.
inline CostModel costs_of(const PlanOptions& options) {
  const bool pairs = options.k_type == DType::kBF16 && options.v_type == DType::kBF16;
  CostModel costs = make_cost_model(fixed_costs(options.k_type, options.v_type, pairs), options,
                                    guessed_read_bytes(options.threads));
  costs.cache_bytes = int64_t{1} << 20;
  costs.last_cache_bytes = int64_t{32} << 20;
  if (options.layout == KvLayout::kRows) costs.few_rows = 8;
  return costs;
}

}  // namespace relay
