// What tensors and caches must be like, for all that reads or writes them here.
#pragma once

#include "relay/types.h"

namespace relay {

inline bool is_float_type(DType type) {
  return type == DType::kF32 || type == DType::kF16 || type == DType::kBF16;
}

/// What is wrong with a cache for heads of this shape; null if nothing is.
inline const char* fault_of(const KvCache& cache, const HeadShape& shape) {
  if (const char* fault = fault_of(cache)) return fault;
  if (cache.layout != KvLayout::kTiles) return nullptr;
  if (const char* obstacle = obstacle_to_tiles(shape, cache.k.type, cache.v.type)) return obstacle;
  if (cache.k.slot_stride != row_bytes(cache.k.type, shape.qk_dim) ||
      cache.v.slot_stride != row_bytes(cache.v.type, shape.v_dim)) {
    return "tiled KV has slot strides of one vector";
  }
  return nullptr;
}

}  // namespace relay
