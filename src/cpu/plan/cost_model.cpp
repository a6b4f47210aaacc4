#include "cpu/plan/cost_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "cpu/kernels/kernels.h"
#include "cpu/plan/cache_size.h"
#include "cpu/plan/calibrate.h"

namespace relay {
namespace {

/// Taking an item from the common counter, setting up, and delivering: a cache line that other
/// cores want, a few mispredicted branches.
constexpr double kItemSeconds = 0.4e-6;
/// Looking up where a slot lies.
constexpr double kLocateSeconds = 2e-9;

/// What beginning a run of adjacent bytes costs: prefetching works best along long runs.
constexpr double kRunBytes = 64;

/// A slot of KvLayout::kTiles, whatever its size: its share of what is done once per tile.
constexpr double kTileSlotSeconds = 1.5e-9;

/// Bytes of a KV vector. What a kCustom type reads is less than f32, but unpacking it takes about
/// as long as reading that.
int64_t vector_bytes(DType type, int64_t dim) {
  return type == DType::kCustom ? 4 * dim : row_bytes(type, dim);
}

/// Loading and unpacking an element, in seconds: in registers, and into a packed tile.
struct LoadCost {
  double few;
  double many;
};
LoadCost load_cost(DType type) {
  switch (type) {
    case DType::kF16:
    case DType::kBF16:
      return {0.017e-9, 0.080e-9};
    case DType::kQ8_0:
      return {0.039e-9, 0.105e-9};
    default:
      return {0.021e-9, 0.088e-9};
  }
}

/// Rows up to which going over a tile in memory once for each block of them takes less than
/// unpacking it once for all: few.slot * M / block + few.row * M < many.slot + many.row * M. Whole
/// blocks, at least one; at most three, beyond which nothing was gained from memory.
int32_t most_few_rows(const CostModel& m) {
  constexpr int32_t kMostBlocks = 3;
  if (m.few_block == 0) return 0;
  const double more = m.few.slot / m.few_block + m.few.row - m.many.row;
  const double blocks = more > 0 ? m.many.slot / more / m.few_block : kMostBlocks;
  return m.few_block * static_cast<int32_t>(std::clamp<double>(blocks, 1, kMostBlocks));
}

bool measuring() {
  static const bool measured = [] {
    const char* wish = std::getenv("RELAY_COST_MODEL");
    const std::string name = wish == nullptr || *wish == '\0' ? "measured" : wish;
    if (name != "measured" && name != "fixed") {
      throw Error("RELAY_COST_MODEL is measured or fixed, not '" + name + "'");
    }
    return name == "measured";
  }();
  return measured;
}

/// Costs of each kernel set and pair of types that has been asked for, measured once.
KernelCosts costs_once(const kernels::KernelSet& set, DType k_type, DType v_type) {
  static std::mutex mutex;
  static std::map<std::array<uintptr_t, 3>, KernelCosts> known;
  const std::array<uintptr_t, 3> key = {reinterpret_cast<uintptr_t>(&set),
                                        static_cast<uintptr_t>(k_type),
                                        static_cast<uintptr_t>(v_type)};
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known.emplace(key, measure_kernel_costs(set, k_type, v_type)).first->second;
}

}  // namespace

KernelCosts fixed_costs(DType k_type, DType v_type, bool bf16_pairs) {
  // Measured on one AVX-512 core of 3.7 GHz (measure_kernel_costs). Narrower vectors change the
  // ratios little, as all of the kernels run on them.
  const LoadCost k = load_cost(k_type);
  const LoadCost v = load_cost(v_type);
  KernelCosts c;
  c.few = {
      .slot = 3.1e-9, .slot_element = (k.few + v.few) / 2, .row = 0.6e-9, .row_element = 0.0163e-9};
  c.many = {.slot = 2.6e-9,
            .slot_element = (k.many + v.many) / 2,
            .row = 0.09e-9,
            .row_element = 0.018e-9};
  if (bf16_pairs) {
    c.few.slot_element -= 0.003e-9;
    c.few.row = 0.2e-9;
    c.few.row_element = 0.0092e-9;
    c.many.slot_element -= 0.025e-9;
    c.many.row_element = 0.0097e-9;
  }
  c.state_element = 0.085e-9;
  c.store_element = 0.28e-9;
  c.merge_element = 0.17e-9;
  return c;
}

CostModel make_cost_model(const KernelCosts& costs, const PlanOptions& options, double read_bytes) {
  const HeadShape& shape = options.shape;
  const double elements = shape.qk_dim + shape.v_dim;
  const auto path = [&](const KernelCosts::Path& p) {
    return CostModel::Path{.slot = p.slot + elements * p.slot_element,
                           .row = p.row + elements * p.row_element};
  };
  CostModel model;
  model.few = path(costs.few);
  model.many = path(costs.many);
  model.item = kItemSeconds;
  model.locate = kLocateSeconds;
  model.state = elements * costs.state_element;
  model.store = shape.v_dim * costs.store_element;
  model.merge = shape.v_dim * costs.merge_element;
  model.byte = options.threads / read_bytes;
  model.run_bytes = kRunBytes;
  model.slot_bytes =
      vector_bytes(options.k_type, shape.qk_dim) + vector_bytes(options.v_type, shape.v_dim);
  model.cache_bytes = core_cache_bytes();
  model.last_cache_bytes = last_level_cache_bytes();
  model.few_block = kernels::active().few_rows;
  if (options.layout == KvLayout::kTiles) {  // one kernel for any number of rows, nothing to unpack
    model.few_block = 0;
    model.many.slot = kTileSlotSeconds;
    model.run_bytes = 0;  // a head's tile is one run, whoever reads the next head's
  }
  model.few_rows = most_few_rows(model);
  return model;
}

double guessed_read_bytes(int32_t threads) {
  // One core reads some 12 GB/s; six of them fill the channels of a desktop; servers have more
  // channels with more cores.
  return 12e9 * std::min(threads, 6) + 4e9 * std::max(0, threads - 6);
}

CostModel coarse_cost_model(const CostModel& fixed, const CostModel& measured) {
  const double scale = measured.many.row / fixed.many.row;
  const auto corrected = [scale](double built_in, double found) {
    if (!(found > 0) || !(built_in > 0) || !(scale > 0)) return built_in;
    const double steps = std::round(std::log2(found / (built_in * scale)));
    return built_in * std::exp2(std::clamp(steps, -4.0, 4.0));
  };
  CostModel coarse = fixed;
  coarse.few.slot = corrected(fixed.few.slot, measured.few.slot);
  coarse.few.row = corrected(fixed.few.row, measured.few.row);
  coarse.many.slot = corrected(fixed.many.slot, measured.many.slot);
  coarse.state = corrected(fixed.state, measured.state);
  coarse.store = corrected(fixed.store, measured.store);
  coarse.merge = corrected(fixed.merge, measured.merge);
  coarse.byte = corrected(fixed.byte, measured.byte);
  coarse.few_rows = most_few_rows(coarse);
  return coarse;
}

CostModel planning_costs(const PlanOptions& options) {
  const kernels::KernelSet& set = kernels::active();
  const bool pairs = set.many_layout(options.k_type, options.v_type, options.shape.qk_dim,
                                     options.shape.v_dim) == kernels::QueryLayout::kBF16Pairs;
  const double read_bytes = guessed_read_bytes(options.threads);
  const CostModel fixed =
      make_cost_model(fixed_costs(options.k_type, options.v_type, pairs), options, read_bytes);
  if (!measuring()) return fixed;
  return coarse_cost_model(fixed, measured_costs(options, read_bytes));
}

CostModel measured_costs(const PlanOptions& options, double read_bytes) {
  return make_cost_model(costs_once(kernels::active(), options.k_type, options.v_type), options,
                         read_bytes);
}

}  // namespace relay
