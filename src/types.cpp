#include "relay/types.h"

namespace relay {

const char* to_string(DType type) {
  switch (type) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
    case DType::kQ8_0:
      return "q8_0";
    case DType::kCustom:
      return "custom";
    case DType::kF8E4M3:
      return "f8_e4m3";
  }
  return "?";
}

int64_t row_bytes(DType type, int64_t count) {
  switch (type) {
    case DType::kF32:
      return 4 * count;
    case DType::kF16:
    case DType::kBF16:
      return 2 * count;
    case DType::kQ8_0:
      if (count % 32 != 0) throw Error("q8_0 rows hold a multiple of 32 elements");
      return count / 32 * 34;
    case DType::kF8E4M3:
      return count;
    case DType::kCustom:
      break;
  }
  throw Error("the size of a custom row is known to its owner alone");
}

const char* obstacle_to_tiles(const HeadShape& shape, DType k_type, DType v_type) {
  if (k_type != v_type ||
      (k_type != DType::kF32 && k_type != DType::kF16 && k_type != DType::kBF16)) {
    return "tiled KV is f32, f16 or bf16, the same for K and V";
  }
  if (shape.qk_dim % 16 != 0 || shape.v_dim % 16 != 0) {
    return "tiled KV needs head sizes that are multiples of 16";
  }
  return nullptr;
}

const char* fault_of(const KvCache& cache) {
  if (cache.block_size < 1) return "the KV cache's block_size must be positive";
  if (cache.slots < 0) return "the KV cache's slots must not be negative";
  if (cache.layout == KvLayout::kTiles &&
      (cache.block_size % kTileSlots != 0 || cache.slots % kTileSlots != 0)) {
    return "tiled KV needs blocks of whole tiles, and a cache of them";
  }
  return nullptr;
}

}  // namespace relay
