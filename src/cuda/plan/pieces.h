// Where the results of jobs' pieces lie: attention writes them there, and list_pieces() finds them.
#pragma once

#include "cuda/plan/plan_data.h"

namespace relay::cuda {

/// Partial rows of the job whose end a portion has (`which` 0), or whose begin (1): behind those of
/// whole jobs, first for each portion of a worker's own, then for each of the tail, which are
/// shorter. `s` is PlanShape or what kernels are given.
template <typename Shape>
RELAY_HD inline int32_t cut_partial_row(const Shape& s, int32_t portion, int32_t which) {
  if (portion < s.workers) return s.partial_capacity + (which * s.workers + portion) * s.tile_rows;
  return s.partial_capacity + 2 * s.workers * s.tile_rows +
         (which * (s.max_portions - s.workers) + portion - s.workers) * kTailRows;
}
/// Behind them all.
template <typename Shape>
RELAY_HD inline int32_t all_partial_rows(const Shape& s) {
  return cut_partial_row(s, s.max_portions, 1);
}

/// The first partial row of a tile of query rows, for one piece of a job; -1: it is the whole job,
/// and its results go straight out. `first_row`: the tile's among the segment's rows x group.
template <typename Shape>
RELAY_HD inline int32_t partial_row(const Shape& s, int32_t segment_rows, int32_t partial_base,
                                    int32_t kv_head, int32_t first_row, int32_t portion,
                                    bool has_begin, bool has_end) {
  if (!has_begin) return cut_partial_row(s, portion, 0);
  if (partial_base >= 0) return partial_base + kv_head * segment_rows * s.group + first_row;
  return has_end ? -1 : cut_partial_row(s, portion, 1);
}

}  // namespace relay::cuda
