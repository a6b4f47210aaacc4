#include <cstring>
#include <string>

#include "cpu/execution/operands.h"
#include "relay/kv_cache.h"

namespace relay {
namespace {

/// Where a slot's vector (or the tile that begins with it) is to be written.
uint8_t* place(const KvPlane& plane, int64_t block_size, int64_t slot, int32_t head) {
  return const_cast<uint8_t*>(plane.at(block_size, slot, head));
}

/// Scatters one vector into its tile: element i goes to tile[i / step * stride + i % step].
template <typename T>
void scatter(const void* from, int32_t dim, int32_t step, int64_t stride, T* tile) {
  const T* x = static_cast<const T*>(from);
  for (int32_t i = 0; i < dim; i += step) {
    for (int32_t j = 0; j < step; ++j) tile[i / step * stride + j] = x[i + j];
  }
}

/// One token's K and V of one head; `slot` counts from its tile's first slot.
template <typename T>
void write_tiled(bool pairs, const HeadShape& shape, const void* k, const void* v, int64_t slot,
                 void* k_tile, void* v_tile) {
  auto* k_out = static_cast<T*>(k_tile);
  auto* v_out = static_cast<T*>(v_tile);
  if (pairs) {
    scatter(k, shape.qk_dim, 2, int64_t{2} * kTileSlots, k_out + 2 * slot);
    scatter(v, shape.v_dim, 1, 2, v_out + slot / 2 * 2 * shape.v_dim + slot % 2);
  } else {
    scatter(k, shape.qk_dim, 1, int64_t{kTileSlots}, k_out + slot);
    scatter(v, shape.v_dim, 1, 1, v_out + slot * shape.v_dim);
  }
}

void check(const KvCache& cache, const HeadShape& shape, const ConstRows& k, const ConstRows& v,
           std::span<const int64_t> slots) {
  const auto fail = [](const std::string& what) { throw Error("write_kv: " + what); };
  if (cache.k.data == nullptr || cache.v.data == nullptr || k.data == nullptr ||
      v.data == nullptr) {
    fail("null data");
  }
  if (k.type != cache.k.type || v.type != cache.v.type) {
    fail("K and V must have the cache's types");
  }
  if (!is_float_type(k.type) || !is_float_type(v.type)) fail("K and V are f32, f16 or bf16");
  if (const char* fault = fault_of(cache, shape)) fail(fault);
  if (cache.slots == 0) return;
  for (const int64_t slot : slots) {
    if (slot >= cache.slots) {
      fail("a token is to go to slot " + std::to_string(slot) + ", the KV cache has " +
           std::to_string(cache.slots) + " slots");
    }
  }
}

}  // namespace

void write_kv(const KvCache& cache, const HeadShape& shape, const ConstRows& k, const ConstRows& v,
              std::span<const int64_t> slots, int32_t head_begin, int32_t head_end) {
  check(cache, shape, k, v, slots);
  const auto k_bytes = static_cast<size_t>(row_bytes(k.type, shape.qk_dim));
  const auto v_bytes = static_cast<size_t>(row_bytes(v.type, shape.v_dim));
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] < 0) continue;
    const auto row = static_cast<int64_t>(i);
    for (int32_t h = head_begin; h < head_end; ++h) {
      const void* from_k =
          static_cast<const char*>(k.data) + row * k.row_stride + h * k.head_stride;
      const void* from_v =
          static_cast<const char*>(v.data) + row * v.row_stride + h * v.head_stride;
      if (cache.layout == KvLayout::kRows) {
        std::memcpy(place(cache.k, cache.block_size, slots[i], h), from_k, k_bytes);
        std::memcpy(place(cache.v, cache.block_size, slots[i], h), from_v, v_bytes);
        continue;
      }
      const int64_t in_tile = slots[i] % kTileSlots;  // blocks are whole tiles
      uint8_t* k_tile = place(cache.k, cache.block_size, slots[i] - in_tile, h);
      uint8_t* v_tile = place(cache.v, cache.block_size, slots[i] - in_tile, h);
      if (k.type == DType::kF32) {
        write_tiled<uint32_t>(false, shape, from_k, from_v, in_tile, k_tile, v_tile);
      } else {
        write_tiled<uint16_t>(k.type == DType::kBF16, shape, from_k, from_v, in_tile, k_tile,
                              v_tile);
      }
    }
  }
}

}  // namespace relay
