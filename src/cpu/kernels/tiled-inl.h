// KV that lies in memory as the products read it (KvLayout::kTiles): for any number of query rows
// nothing is transposed, and a tile is one contiguous read. A host that owns its KV layout can have
// it so; whoever writes a token scatters it once (src/cpu/execution/write_kv.cpp).

/// First byte of the tile's K and V.
inline const uint8_t* tile_k(const Tile& t) { return t.k[0] + t.k_offset; }
inline const uint8_t* tile_v(const Tile& t) { return t.v[0] + t.v_offset; }

/// A vector of bf16 pairs as the vectors of their first and second elements.
RELAY_INLINE void split_pairs(const uint8_t* p, Vec& first, Vec& second) {
  VecI pair;
  std::memcpy(&pair, p, sizeof(pair));
  first = (Vec)(pair << 16);
  second = (Vec)(pair & static_cast<int32_t>(0xffff0000u));
}

/// The tile's K and V in f32, as many_rows-inl.h unpacks them.
template <typename E>
inline void expand_tile(const Tile& t, float* keys, float* values) {
  for (int i = 0; i < t.qk_dim * kTileSlots; i += kLanes) store(keys + i, E::load(tile_k(t), i));
  for (int slot = 0; slot < t.slots; ++slot) {
    for (int i = 0; i < t.v_dim; i += kLanes) {
      store(values + unpacked_v_index(slot, i), E::load(tile_v(t), slot * t.v_dim + i));
    }
  }
}
inline void expand_tile_pairs(const Tile& t, float* keys, float* values) {
  for (int i = 0; i < t.qk_dim; i += 2) {
    for (int j = 0; j < kTileSlots; j += kLanes) {
      Vec even, odd;
      split_pairs(tile_k(t) + 2 * (i * kTileSlots + 2 * j), even, odd);
      store(keys + i * kTileSlots + j, even);
      store(keys + (i + 1) * kTileSlots + j, odd);
    }
  }
  for (int slot = 0; slot < t.slots; slot += 2) {
    for (int i = 0; i < t.v_dim; i += kLanes) {
      Vec even, odd;
      split_pairs(tile_v(t) + 2 * (slot * t.v_dim + 2 * i), even, odd);
      store(values + unpacked_v_index(slot, i), even);
      store(values + unpacked_v_index(slot + 1, i), odd);
    }
  }
}

inline void attend_tiled(const Tile& t) {
  const Scratch scratch(t);
  if (t.k_type == DType::kBF16) {
#ifdef RELAY_HAS_BF16_DOT
    const auto* pairs = reinterpret_cast<const uint32_t*>(tile_v(t));
    if (t.slots % 2 != 0) {
      // Of the last pair only half is there, and 0 times what lies in the other half may be NaN.
      auto* copy = reinterpret_cast<uint32_t*>(scratch.values);
      std::memcpy(copy, pairs, static_cast<size_t>(t.slots / 2 + 1) * t.v_dim * 4);
      for (int i = 0; i < t.v_dim; ++i) copy[t.slots / 2 * t.v_dim + i] &= 0xffffu;
      pairs = copy;
    }
    attend_operands<BF16Product>(
        t, {reinterpret_cast<const uint32_t*>(tile_k(t)), pairs, t.v_dim, kPanelColumns},
        scratch.scores);
    return;
#else
    expand_tile_pairs(t, scratch.keys, scratch.values);
#endif
  } else if (t.k_type == DType::kF16) {
    expand_tile<Elements<DType::kF16>>(t, scratch.keys, scratch.values);
  } else {
    attend_operands<F32Product>(t,
                                {reinterpret_cast<const float*>(tile_k(t)),
                                 reinterpret_cast<const float*>(tile_v(t)), t.v_dim, kPanelColumns},
                                scratch.scores);
    return;
  }
  attend_unpacked(t, scratch);
}
