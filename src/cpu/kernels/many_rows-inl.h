// Many query rows: bound by arithmetic. The tile is unpacked once (K transposed, so that lanes are
// slots), then all rows go over it in register blocks.

/// Times that a register block calls Prefetcher::step() over all panels of a product.
inline int panel_steps(int vectors, int panel, int depth) {
  return (vectors + panel - 1) / panel * ((depth + kStepDepth - 1) / kStepDepth);
}
template <typename Product>
inline int score_steps(const Tile& t) {
  return panel_steps((t.slots + kLanes - 1) / kLanes, kPanel,
                     (t.qk_dim + Product::kDepth - 1) / Product::kDepth);
}
inline int row_blocks(int rows) { return (rows + kBlockRows - 1) / kBlockRows; }

/// Weights s[rows][kTileSlots] of the tile's query rows from `first` on. Returns how the products
/// of weights and values go into their o: kScaled by alpha[rows], or kYes.
template <typename Product, Weights kWeights>
inline Accumulate product_weights(const Tile& t, int first, int rows,
                                  const typename Product::Element* keys, float* s, float* alpha,
                                  Prefetcher& prefetch) {
  const auto scores = [&](const auto& finish) {
    product_scores<Product>(rows, (t.slots + kLanes - 1) / kLanes,
                            static_cast<const typename Product::Element*>(t.q) + first * t.q_stride,
                            t.q_stride, keys, (t.qk_dim + Product::kDepth - 1) / Product::kDepth, s,
                            finish, prefetch);
  };
  EarlyWeights<kWeights> early(t, first, rows);
  if (early.known()) {
    scores([&](int column) { return early.take(column, s); });
    if (early.commit()) return Accumulate::kYes;
  }
  scores([&](int column) { return StoreRows{s + column, kTileSlots}; });
  softmax<kWeights>(t, first, rows, s, alpha);
  return Accumulate::kScaled;
}

/// All query rows of a tile over its operands.
template <typename Product>
inline void attend_operands(const Tile& t, const Operands<Product>& operands, float* s) {
#ifdef RELAY_HAS_AMX
  if constexpr (Product::kWeights == Weights::kBF16Pairs) {
    if (suits_amx(t)) return AmxAttention<Product::kWeights>(t, operands, s).run();
  }
#endif
  alignas(64) float alpha[kScoreRows];
  const int value_vectors = (t.v_dim + kLanes - 1) / kLanes;
  const int value_depth = (t.slots + Product::kDepth - 1) / Product::kDepth;
  Prefetcher prefetch(t,
                      (score_steps<Product>(t) + panel_steps(value_vectors, kPanel, value_depth)) *
                          row_blocks(t.rows));
  for (int first = 0; first < t.rows; first += kScoreRows) {
    const int rows = t.rows - first < kScoreRows ? t.rows - first : kScoreRows;
    const Accumulate accumulate = product_weights<Product, Product::kWeights>(
        t, first, rows, operands.keys, s, alpha, prefetch);
    product_values<Product>(rows, value_vectors, s, operands, value_depth, t.o + first * t.o_stride,
                            t.o_stride, accumulate, alpha, prefetch);
  }
}

/// K of the tile, transposed: out[qk_dim][kTileSlots], zero beyond the tile's slots.
template <typename E>
inline void unpack_k(const Tile& t, float* out) {
  for (int first = 0; first < t.slots; first += kLanes) {
    for (int i = 0; i < t.qk_dim; i += kLanes) {
      Vec v[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        v[j] = first + j < t.slots ? load_padded<E>(t.k[first + j] + t.k_offset, i, t.qk_dim)
                                   : splat(0.0f);
      }
      transpose(v);
      for (int j = 0; j < kLanes; ++j) store(out + (i + j) * kTileSlots + first, v[j]);
    }
  }
}

/// V of the tile in panels, zero beyond v_dim.
template <typename E>
inline void unpack_v(const Tile& t, float* out) {
  for (int slot = 0; slot < t.slots; ++slot) {
    const uint8_t* row = t.v[slot] + t.v_offset;
    for (int i = 0; i < t.v_dim; i += kLanes) {
      store(out + unpacked_v_index(slot, i), load_padded<E>(row, i, t.v_dim));
    }
  }
}

#ifdef RELAY_HAS_BF16_DOT

/// As unpack_k, in pairs along qk_dim: out[(qk_dim + 1) / 2][kTileSlots].
template <DType T>
inline void unpack_k_pairs(const Tile& t, uint32_t* out) {
  constexpr int kElements = 2 * kLanes;
  for (int first = 0; first < t.slots; first += kLanes) {
    for (int i = 0; i < t.qk_dim; i += kElements) {
      [[maybe_unused]] const auto which =
          first_bf16(t.qk_dim - i < kElements ? t.qk_dim - i : kElements);
      const auto pairs = [&](const uint8_t* row) {
        if constexpr (T == DType::kBF16) {
          return load_bf16_pairs(row + 2 * int64_t{i}, which);
        } else {
          return bf16_pairs(Elements<T>::load(row, i), Elements<T>::load(row, i + kLanes));
        }
      };
      VecU v[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        v[j] = first + j < t.slots ? pairs(t.k[first + j] + t.k_offset) : VecU{};
      }
      transpose(v);
      for (int j = 0; j < kLanes; ++j) store_words(out + (i / 2 + j) * kTileSlots + first, v[j]);
    }
  }
}

/// As unpack_v, in pairs of slots.
inline void unpack_v_pairs(const Tile& t, uint32_t* out) {
  for (int slot = 0; slot < t.slots; slot += 2) {
    for (int i = 0; i < t.v_dim; i += kLanes) {
      const int n = t.v_dim - i < kLanes ? t.v_dim - i : kLanes;
      auto halves = [&](int which) {
        return load_bf16_halves(t.v[which] + t.v_offset + 2 * int64_t{i}, n);
      };
      const VecU low = halves(slot);
      const VecU high = slot + 1 < t.slots ? halves(slot + 1) : VecU{};
      store_words(out + unpacked_v_index(slot / 2, i), low | high << 16);
    }
  }
}

#endif  // RELAY_HAS_BF16_DOT

#ifdef RELAY_HAS_BYTE_DOT

/// V of the tile as out[v_dim / 32][kPairs][32]: pairs of slots, as 16-bit integers.
inline void unpack_q8_values(const Tile& t, uint32_t* out) {
  for (int block = 0; block < t.v_dim / kQ8Block; ++block, out += kPairs * kQ8Block) {
    const int64_t at = t.v_offset + block * kQ8BlockBytes + 2;
    for (int slot = 0; slot < t.slots; slot += 2) {
      // The last of an odd number is paired with itself: that partner's weight is 0.
      const int partner = slot + 1 < t.slots ? slot + 1 : slot;
      VecU low, high;
      zip_bytes(t.v[slot] + at, t.v[partner] + at, low, high);
      uint32_t* row = out + slot / 2 * kQ8Block;
      store_words(row, weave<kLanes / 2, false>(low, high, AllLanes{}));
      store_words(row + kLanes, weave<kLanes / 2, true>(low, high, AllLanes{}));
    }
  }
}

/// o[MR][32] = o * alpha + the products of weights[MR][kPairs] and values[pairs][32].
template <int MR>
RELAY_NOINLINE void q8_product_block(const uint32_t* weights, const float* units,
                                     const uint32_t* values, int pairs, const float* alpha,
                                     float* o, int64_t o_stride, Prefetcher& prefetch) {
  static_assert(kQ8Block == 2 * kLanes);
  VecI acc[MR][2] = {};
  for (int k = 0; k < pairs; ++k) {
    if (k % kStepDepth == 0) prefetch.step();
    const VecU first = load_words(values + k * kQ8Block);
    const VecU second = load_words(values + k * kQ8Block + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      acc[i][0] = dot_words(acc[i][0], weights[i * kPairs + k], first);
      acc[i][1] = dot_words(acc[i][1], weights[i * kPairs + k], second);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* out = o + i * o_stride + j * kLanes;
      const Vec part = __builtin_convertvector(acc[i][j], Vec) * splat(units[i]);
      store(out, fma(load(out), splat(alpha[i]), part));
    }
  }
}

/// All query rows over a tile of q8_0: scores from K rounded to bf16 (as the query rows are), which
/// is closer to the truth than queries rounded to bytes; values by integers.
inline void attend_q8(const Tile& t, const Scratch& scratch) {
  auto* keys = reinterpret_cast<uint32_t*>(scratch.keys);
  auto* values = reinterpret_cast<uint32_t*>(scratch.values);
  unpack_k_pairs<DType::kQ8_0>(t, keys);
  unpack_q8_values(t, values);
  float* scales = scratch.values + int64_t{kPairs} * t.v_dim;  // [v_dim / 32][kTileSlots]
  q8_scales(t.v, t.v_offset, t.slots, t.v_dim, scales);
  float* units = scales + int64_t{t.v_dim} / kQ8Block * kTileSlots;  // [kScoreRows]
  auto* weights = reinterpret_cast<uint32_t*>(units + kScoreRows);   // [kScoreRows][kPairs]

  alignas(64) float alpha[kScoreRows];
  float* s = scratch.scores;
  const int pairs = (t.slots + 1) / 2;
  Prefetcher prefetch(t, (score_steps<BF16Product>(t) + panel_steps(t.v_dim / kLanes, 2, pairs)) *
                             row_blocks(t.rows));
  for (int first = 0; first < t.rows; first += kScoreRows) {
    const int rows = t.rows - first < kScoreRows ? t.rows - first : kScoreRows;
    const Accumulate accumulate =
        product_weights<BF16Product, Weights::kF32>(t, first, rows, keys, s, alpha, prefetch);
    if (accumulate == Accumulate::kYes) {
      for (int r = 0; r < rows; ++r) alpha[r] = 1.0f;
    }
    for (int i = 0; i < t.v_dim; i += kQ8Block) {
      q8_weights(scales + i / kQ8Block * kTileSlots, t.slots, s, rows, weights, units);
      for_each_row_block(rows, [&]<int MR>(int row) {
        q8_product_block<MR>(weights + row * kPairs, units + row, values + int64_t{i} * kPairs,
                             pairs, alpha + row, t.o + (first + row) * t.o_stride + i, t.o_stride,
                             prefetch);
      });
    }
  }
}
#endif  // RELAY_HAS_BYTE_DOT

/// K and V of types that differ are both unpacked to f32: one product serves the whole tile.
inline QueryLayout many_layout([[maybe_unused]] DType k_type, [[maybe_unused]] DType v_type,
                               [[maybe_unused]] int qk_dim, [[maybe_unused]] int v_dim) {
#ifdef RELAY_HAS_BF16_DOT
  if (k_type == DType::kBF16 && v_type == DType::kBF16) return QueryLayout::kBF16Pairs;
#endif
#ifdef RELAY_HAS_AMX
  // f16 is the sum of two bf16 exactly, and q8_0 to 2^-16 of a number: three products on AMX take
  // less time than one in f32.
  const auto halves = [](DType type) { return type == DType::kF16 || type == DType::kQ8_0; };
  if (halves(k_type) && halves(v_type) && suits_amx(qk_dim, v_dim)) return QueryLayout::kBF16Halves;
#endif
#ifdef RELAY_HAS_BYTE_DOT
  if (k_type == DType::kQ8_0 && v_type == DType::kQ8_0) return QueryLayout::kBF16Pairs;
#endif
  return QueryLayout::kF32;
}

/// A tile whose K and V lie unpacked in its scratch.
inline void attend_unpacked(const Tile& t, const Scratch& scratch) {
#ifdef RELAY_HAS_AMX
  if (many_layout(t.k_type, t.v_type, t.qk_dim, t.v_dim) == QueryLayout::kBF16Halves) {
    return attend_halves(t, scratch);
  }
#endif
  attend_operands<F32Product>(t, {scratch.keys, scratch.values, kPanelColumns, kPanelSize},
                              scratch.scores);
}

inline void attend_many(const Tile& t) {
  const Scratch scratch(t);
#ifdef RELAY_HAS_BF16_DOT
  if (many_layout(t.k_type, t.v_type, t.qk_dim, t.v_dim) == QueryLayout::kBF16Pairs) {
#ifdef RELAY_HAS_BYTE_DOT
    if (t.k_type == DType::kQ8_0) return attend_q8(t, scratch);
#endif
    auto* key_pairs = reinterpret_cast<uint32_t*>(scratch.keys);
    auto* value_pairs = reinterpret_cast<uint32_t*>(scratch.values);
    unpack_k_pairs<DType::kBF16>(t, key_pairs);
    unpack_v_pairs(t, value_pairs);
    return attend_operands<BF16Product>(t, {key_pairs, value_pairs, kPanelColumns, kPanelSize},
                                        scratch.scores);
  }
#endif
  with_elements(t.k_type, [&](auto e) { unpack_k<decltype(e)>(t, scratch.keys); });
  with_elements(t.v_type, [&](auto e) { unpack_v<decltype(e)>(t, scratch.values); });
  attend_unpacked(t, scratch);
}
