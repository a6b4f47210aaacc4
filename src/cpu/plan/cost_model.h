// What attention costs on one thread: the planner's idea of time, and that of `relay explain`.
//
// An item reads S slots of H KV heads for M query rows each (rows x head group):
//   arithmetic   H * (S * slot + S * M * row)   by the kernel for few or for many rows; query rows
//                                               that see nothing of a tile do not count
//   memory       S * (H * bytes of a slot + 2 * run_bytes) * byte   a run of K and one of V
//   states       H * M * state             packing queries, clearing and writing results
//   partials     H * M * store             where the result is not the row's only one
//   its own      item + S * locate         taking it, finding where its slots lie
//   time = item + S * locate + max(arithmetic, memory) + states + partials
// and merging a row's P partials takes H * group * (P - 1) * merge (schedule.h knows who does it).
// The maximum, since the kernels fetch the next tile while they work on this one.
#pragma once

#include <cstdint>

#include "relay/attention.h"

namespace relay {

/// Costs of one kernel set and KV type for any head size, in seconds. The arithmetic is bilinear in
/// the query rows M and the elements E = qk_dim + v_dim of a slot:
///   seconds per slot of one KV head = slot + E * slot_element + M * (row + E * row_element).
struct KernelCosts {
  struct Path {
    double slot = 0;
    double slot_element = 0;
    double row = 0;
    double row_element = 0;
  };
  Path few;
  Path many;
  double state_element = 0;  ///< per state and element of E
  double store_element = 0;  ///< per partial state and element of v_dim
  double merge_element = 0;  ///< likewise
};

/// Costs of one operator on one of `threads` threads that all work, in seconds.
struct CostModel {
  struct Path {
    double slot = 0;  ///< per slot of one KV head
    double row = 0;   ///< per such slot and query row
  };
  Path few;
  Path many;
  double item = 0;
  double locate = 0;             ///< per slot of an item
  double state = 0;              ///< per query row and KV head of an item
  double store = 0;              ///< likewise, where the result is not the row's only one
  double merge = 0;              ///< per partial state that is merged into another
  double byte = 0;               ///< per byte of KV read
  double run_bytes = 0;          ///< each run of adjacent bytes takes as long as so many more
  int64_t slot_bytes = 0;        ///< of one KV head's K and V
  int64_t cache_bytes = 0;       ///< a core's second-level cache
  int64_t last_cache_bytes = 0;  ///< the largest cache
  int32_t few_block = 0;  ///< query rows that the kernel for few takes at once; 0 without one
  int32_t few_rows = 0;   ///< up to so many query rows are few

  /// Seconds of reading `slots` slots of `heads` KV heads, with `row_slots` products of a slot and
  /// a query row that sees it for each head.
  double kv_seconds(bool few_path, double heads, int64_t slots, double row_slots) const {
    const Path& path = few_path ? few : many;
    const auto n = static_cast<double>(slots);
    const double arithmetic = heads * (n * path.slot + row_slots * path.row);
    const double memory = n * byte * (heads * static_cast<double>(slot_bytes) + 2 * run_bytes);
    return n * locate + (arithmetic > memory ? arithmetic : memory);
  }
};

/// The costs that are built in; `bf16_pairs`: the kernels multiply bf16 by pairs.
KernelCosts fixed_costs(DType k_type, DType v_type, bool bf16_pairs);

/// Puts costs together for one operator, with the active kernel set's few_rows and this machine's
/// caches. `read_bytes` is the memory bandwidth of all threads together in bytes per second.
CostModel make_cost_model(const KernelCosts& costs, const PlanOptions& options, double read_bytes);

/// A rough idea of the bandwidth of `threads` threads, where it has not been measured.
double guessed_read_bytes(int32_t threads);

/// `fixed`, with each cost's ratio to the arithmetic of many rows corrected by the power of two
/// that comes nearest to what was measured. A plan depends on ratios alone, and coarse ones do: so
/// plans, and with them the last bits of results, are the same in every run of a machine unless one
/// of its ratios lies near 2^(k + 1/2) of the built-in one.
CostModel coarse_cost_model(const CostModel& fixed, const CostModel& measured);

/// What plans are made with: coarse costs of the active kernel set, measured once per process and
/// set of types (some milliseconds with vector instructions), or, with RELAY_COST_MODEL=fixed,
/// the built-in ones. Throws Error for other values but "measured". Allocates on the first call for
/// a set of types only.
CostModel planning_costs(const PlanOptions& options);

/// The costs as measured, for predictions: never used to plan.
CostModel measured_costs(const PlanOptions& options, double read_bytes);

}  // namespace relay
