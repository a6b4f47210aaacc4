// What a segment, or some of its rows, costs by the cost model before it is cut, and how much of it
// belongs into one item.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "cpu/plan/cost_model.h"

namespace relay {

class BlockCosts {
 public:
  BlockCosts(const CostModel& costs, const HeadShape& shape) : costs_(costs), shape_(shape) {
    const double state =
        4.0 * (kernels::padded_dim(shape.qk_dim) + kernels::padded_dim(shape.v_dim));
    const auto cache = static_cast<double>(costs.cache_bytes);
    rows_at_once_ =
        std::max<int64_t>(1, static_cast<int64_t>(cache * kStatesOfHead / state) / shape.group());
    states_together_ = static_cast<int64_t>(cache * kStatesOfItem / state);
    heads_together_ = static_cast<int64_t>(cache * kTileOfItem /
                                           static_cast<double>(costs.slot_bytes * kTileSlots));
  }

  int64_t query_rows(int64_t rows) const { return rows * shape_.group(); }
  bool few(int64_t rows) const { return query_rows(rows) <= costs_.few_rows; }
  /// Of one row tile: others are another item, which reads the KV again.
  int64_t rows_at_once() const { return rows_at_once_; }

  /// Into how many items the heads must go for their states to stay at hand.
  int64_t least_parts(int64_t rows) const {
    const int64_t together = std::clamp<int64_t>(
        std::min(states_together_ / query_rows(rows), heads_together_), 1, shape_.kv_heads);
    return (shape_.kv_heads + together - 1) / together;
  }

  /// Seconds of so many slots for all heads, `parts` items together.
  double kv_seconds(int64_t rows, int64_t parts, int64_t slots, int64_t row_slots) const {
    const auto items = static_cast<double>(parts);
    return items * costs_.kv_seconds(few(rows), shape_.kv_heads / items, slots,
                                     static_cast<double>(row_slots));
  }
  /// Seconds of a chunk whose results are partial, whatever its slots.
  double overhead(int64_t rows, int64_t parts) const {
    return static_cast<double>(parts) * costs_.item + states(rows) * (costs_.state + costs_.store);
  }
  /// Query rows of all KV heads.
  double states(int64_t rows) const {
    return shape_.kv_heads * static_cast<double>(query_rows(rows));
  }

 private:
  /// Queries and outputs of one KV head take this part of a core's cache while its KV streams by.
  static constexpr double kStatesOfHead = 1.0 / 2;
  /// Heads share an item while their queries and outputs together are this small: reading a slot's
  /// heads in one run gains less than a crowded cache costs (measured with a cache of 1 MiB: 96 KiB
  /// beats 192 to 512 by 10 to 40 % for 32 to 128 query rows).
  static constexpr double kStatesOfItem = 3.0 / 32;
  /// And while a tile of all of their KV is: the next one is fetched beside it.
  static constexpr double kTileOfItem = 1.0 / 4;

  const CostModel& costs_;
  const HeadShape shape_;
  int64_t rows_at_once_ = 0;
  int64_t states_together_ = 0;  ///< (query row, KV head) pairs of one item
  int64_t heads_together_ = 0;   ///< KV heads of one item
};

}  // namespace relay
