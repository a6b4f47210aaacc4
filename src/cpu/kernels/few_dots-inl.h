// Few query rows over KV that the CPU multiplies in groups of 4 bytes: pairs of bf16, and the bytes
// of q8_0. As in few_rows-inl.h no unpacked K or V is stored, but a group is multiplied at once.
//
// In S = Q K^T lanes are slots: kLanes vectors of K are transposed in registers, so that one holds
// the same group of each slot, and a query row's group is broadcast. In O += P V slots go two by
// two, zipped: a lane holds the same element of both.

#ifdef RELAY_HAS_BF16_DOT

/// bf16: queries (QueryLayout::kBF16Pairs) and weights are rounded to bf16 too.
class BF16Few {
 public:
  static constexpr Weights kWeights = Weights::kBF16Pairs;
  static constexpr int kChunk = 2 * kLanes;  ///< elements of K in one register
  static constexpr int kUnit = kZipLanes;    ///< see weave()
  static constexpr int kReducedRows = 2;     ///< up to so many go by score_pairs
  static constexpr bool kTails = true;       ///< vectors may end within a chunk
  using Sum = Vec;

  explicit BF16Few(const Tile& t) : t_(t) {}

  /// Elements [i, i + kChunk) of a vector of K, zero beyond it (kTail: it ends among them).
  template <bool kTail>
  VecU load_keys(const uint8_t* row, int i) const {
    return load_pairs<kTail>(row, i, t_.qk_dim);
  }

  /// sums[r] += elements [i, i + kChunk) of R rows times those of kLanes slots: keys[group].
  template <int R, bool kTail>
  RELAY_INLINE void multiply_keys(const uint32_t* q, int i, int /*first_slot*/,
                                  const VecU (&keys)[kLanes], Vec (&sums)[R]) const {
    constexpr int kChains = R < 8 ? 8 / R : 1;  // enough sums under way to hide a product's latency
    // Queries end at a multiple of 16 elements, which may be the middle of these.
    const bool half = kTail && i + kChunk > padded_dim(t_.qk_dim);
    Vec part[R][kChains];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      part[r][0] = sums[r];
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) part[r][c] = splat(0.0f);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kLanes; ++k) {
      if (half && k == kLanes / 2) break;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        part[r][k % kChains] =
            dot_pairs(part[r][k % kChains], q[r * t_.q_stride + i / 2 + k], keys[k]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) part[r][0] += part[r][c];
      sums[r] = part[r][0];
    }
  }

  /// Weights of pairs of slots, at weight_index().
  const uint32_t* weights(const float* s, int /*rows*/) {
    return reinterpret_cast<const uint32_t*>(s);
  }
  static int weight_index(int r, int /*column*/) { return r * kTileSlots; }

  /// Elements [i, i + kChunk) of two vectors of V, zero beyond them, zipped.
  template <bool kTail>
  void zip_values(const uint8_t* a, const uint8_t* b, int i, VecU& low, VecU& high) const {
    zip_words(load_pairs<kTail>(a, i, t_.v_dim), load_pairs<kTail>(b, i, t_.v_dim), low, high);
  }
  static Vec multiply_add(uint32_t weight, VecU values, Vec sum) {
    return dot_pairs(sum, weight, values);
  }
  Vec finish(int /*r*/, int /*column*/, Vec sum) const { return sum; }

 private:
  template <bool kTail>
  static VecU load_pairs(const uint8_t* row, int i, int n) {
    return load_bf16_pairs(row + 2 * int64_t{i}, first_bf16(kTail ? n - i : kChunk));
  }

  const Tile& t_;
};

#ifdef RELAY_HAS_BYTE_DOT
/// q8_0: vectors are blocks of bytes with a scale. Queries (QueryLayout::kInt8) are blocks of bytes
/// too, as ggml has them.
class Q8Few {
 public:
  static constexpr Weights kWeights = Weights::kF32;
  static constexpr int kChunk = 4 * kLanes;
  static constexpr int kUnit = kLanes / 2;
  static constexpr int kReducedRows = 0;
  static constexpr bool kTails = false;
  static_assert(kChunk == 2 * kQ8Block);
  using Sum = VecI;

  explicit Q8Few(const Tile& t)
      : t_(t),
        key_scales_(t.scratch),
        value_scales_(key_scales_ + t.qk_dim / kQ8Block * kTileSlots),
        units_(value_scales_ + t.v_dim / kQ8Block * kTileSlots),
        weights_(reinterpret_cast<uint32_t*>(units_ + kFewBlock * (t.v_dim / kQ8Block))) {
    q8_scales(t.k, t.k_offset, t.slots, t.qk_dim, key_scales_);
    q8_scales(t.v, t.v_offset, t.slots, t.v_dim, value_scales_);
  }

  /// Plus 128: the instruction wants one of its operands unsigned. kTail: one block, not two.
  template <bool kTail>
  VecU load_keys(const uint8_t* row, int i) const {
    const uint8_t* block = row + i / kQ8Block * kQ8BlockBytes + 2;
    return load_bytes(block, kTail ? nullptr : block + kQ8BlockBytes) ^ 0x80808080u;
  }

  template <int R, bool kTail>
  RELAY_INLINE void multiply_keys(const uint32_t* q, int i, int first_slot,
                                  const VecU (&keys)[kLanes], Vec (&sums)[R]) const {
    constexpr int kGroups = kQ8Block / 4;
#pragma GCC unroll 2
    for (int half = 0; half < (kTail ? 1 : 2); ++half) {
      const int block = i / kQ8Block + half;
      const uint32_t* row = q + block * kInt8Words;
      VecI part[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        part[r] = (VecI)splat_word(row[r * t_.q_stride + kGroups + 1]);
      }
#pragma GCC unroll 8
      for (int k = 0; k < kGroups; ++k) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          part[r] = dot_bytes(part[r], keys[half * kGroups + k], row[r * t_.q_stride + k]);
        }
      }
      const Vec scale = load(key_scales_ + block * kTileSlots + first_slot);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec factor = scale * (Vec)splat_word(row[r * t_.q_stride + kGroups]);
        sums[r] = fma(__builtin_convertvector(part[r], Vec), factor, sums[r]);
      }
    }
  }

  const uint32_t* weights(const float* s, int rows) {
    for (int i = 0; i < t_.v_dim; i += kQ8Block) {
      const int block = i / kQ8Block;
      q8_weights(value_scales_ + block * kTileSlots, t_.slots, s, rows,
                 weights_ + weight_index(0, i), units_ + block * kFewBlock);
    }
    return weights_;
  }
  static int weight_index(int r, int column) {
    return (column / kQ8Block * kFewBlock + r) * kPairs;
  }

  template <bool kTail>
  void zip_values(const uint8_t* a, const uint8_t* b, int i, VecU& low, VecU& high) const {
    static_assert(!kTail);
    const int64_t at = int64_t{i} / kQ8Block * kQ8BlockBytes + 2;
    zip_bytes(a + at, b + at, low, high);
  }
  static VecI multiply_add(uint32_t weight, VecU values, VecI sum) {
    return dot_words(sum, weight, values);
  }
  Vec finish(int r, int column, VecI sum) const {
    return __builtin_convertvector(sum, Vec) * splat(units_[column / kQ8Block * kFewBlock + r]);
  }

 private:
  const Tile& t_;
  float* key_scales_;    ///< [qk_dim / 32][kTileSlots]
  float* value_scales_;  ///< [v_dim / 32][kTileSlots]
  float* units_;         ///< [v_dim / 32][kFewBlock]
  uint32_t* weights_;    ///< [v_dim / 32][kFewBlock][kPairs]
};
#endif

/// Every so many vectors of K the kernels prefetch some of the next tile.
inline constexpr int kStepVectors = 4;

/// Calls f<kTail>(i) for the chunks of a vector of K.
template <typename Kv, typename F>
RELAY_INLINE void for_each_chunk(int dim, F f) {
  int i = 0;
  for (; i + Kv::kChunk <= dim; i += Kv::kChunk) f.template operator()<false>(i);
  if (i < dim) f.template operator()<true>(i);
}

/// Scores of R rows from q on against the tile: s[R][kTileSlots].
template <int R, typename Kv>
inline void score_dots(const Tile& t, const Kv& kv, const uint32_t* q, Prefetcher& prefetch,
                       float* s) {
  for (int first = 0; first < t.slots; first += kLanes) {
    const uint8_t* rows[kLanes];
    key_rows(t, first, rows);
    Vec sums[R];
    for (Vec& sum : sums) sum = splat(0.0f);
    for_each_chunk<Kv>(t.qk_dim, [&]<bool kTail>(int i) RELAY_INLINE_LAMBDA {
      VecU keys[kLanes];
#pragma GCC unroll 16
      for (int p = 0; p < kLanes; ++p) {
        if (p % kStepVectors == 0) prefetch.step();
        keys[p] = kv.template load_keys<kTail>(rows[p], i);
      }
      transpose(keys);
      kv.template multiply_keys<R, kTail>(q, i, first, keys, sums);
    });
    for (int r = 0; r < R; ++r) store(s + r * kTileSlots + first, sums[r]);
  }
}

/// As score_dots for one or two rows and bf16. For so few, transposing costs more than reducing
/// each row's and slot's sum, as few_rows-inl.h does.
template <int R>
inline void score_pairs(const Tile& t, const BF16Few& kv, const uint32_t* q, Prefetcher& prefetch,
                        float* s) {
  constexpr int kSlots = kLanes / R;
  for (int first = 0; first < t.slots; first += kSlots) {
    const uint8_t* rows[kSlots];
    key_rows(t, first, rows);
    Vec acc[kLanes];
    for (Vec& a : acc) a = splat(0.0f);
    for_each_chunk<BF16Few>(t.qk_dim, [&]<bool kTail>(int i) RELAY_INLINE_LAMBDA {
      VecU query[R];
      for (int r = 0; r < R; ++r) {
        query[r] = kv.load_keys<kTail>(reinterpret_cast<const uint8_t*>(q + r * t.q_stride), i);
      }
#pragma GCC unroll 16
      for (int p = 0; p < kSlots; ++p) {
        if (p % kStepVectors == 0) prefetch.step();
        const VecU key = kv.load_keys<kTail>(rows[p], i);
        for (int r = 0; r < R; ++r) {
          acc[r * kSlots + p] = dot_pairs(acc[r * kSlots + p], query[r], key);
        }
      }
    });
    reduce_scores<R>(acc, first, s);
  }
}

/// o[R][columns] = o * alpha + weights V for C vectors (an even number) of columns from `column`
/// on, as far as they exist; for the block's rows from `row` on.
template <int R, int C, bool kTail = false, typename Kv>
inline void value_dots(const Tile& t, const Kv& kv, const uint32_t* weights, int row, int column,
                       const float* alpha, Prefetcher& prefetch, float* o) {
  using Sum = typename Kv::Sum;
  Sum acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = Sum{};
  }
  for (int slot = 0; slot < t.slots; slot += 2) {
    const uint8_t* a = t.v[slot] + t.v_offset;
    // The last of an odd number is paired with itself: that partner's weight is 0.
    const uint8_t* b = slot + 1 < t.slots ? t.v[slot + 1] + t.v_offset : a;
#pragma GCC unroll 4
    for (int c = 0; c < C; c += 2) {
      if (c % kStepVectors == 0) prefetch.step();
      VecU low, high;
      kv.template zip_values<kTail>(a, b, column + c * kLanes, low, high);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        uint32_t weight;
        std::memcpy(&weight, weights + Kv::weight_index(row + r, column + c * kLanes) + slot / 2,
                    sizeof(weight));
        acc[r][c] = Kv::multiply_add(weight, low, acc[r][c]);
        acc[r][c + 1] = Kv::multiply_add(weight, high, acc[r][c + 1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* out = o + r * t.o_stride + column;
#pragma GCC unroll 4
    for (int c = 0; c < C; c += 2) {
      const Sum first = weave<Kv::kUnit, false>(acc[r][c], acc[r][c + 1], AllLanes{});
      const Sum second = weave<Kv::kUnit, true>(acc[r][c], acc[r][c + 1], AllLanes{});
      const int at = c * kLanes;
      store(out + at, fma(load(out + at), splat(alpha[r]), kv.finish(row + r, column + at, first)));
      if (!kTail || column + at + kLanes < t.v_dim) {
        store(out + at + kLanes, fma(load(out + at + kLanes), splat(alpha[r]),
                                     kv.finish(row + r, column + at, second)));
      }
    }
  }
}

/// All columns from `column` on, C vectors at a time and then fewer.
template <int R, int C, typename Kv>
inline void value_dots_from(const Tile& t, const Kv& kv, const uint32_t* weights, int row,
                            int column, const float* alpha, Prefetcher& prefetch, float* o) {
  for (; column + C * kLanes <= t.v_dim; column += C * kLanes) {
    value_dots<R, C>(t, kv, weights, row, column, alpha, prefetch, o);
  }
  if constexpr (C > 2) {
    value_dots_from<R, C / 2>(t, kv, weights, row, column, alpha, prefetch, o);
  } else if constexpr (Kv::kTails) {
    if (column < t.v_dim) value_dots<R, 2, true>(t, kv, weights, row, column, alpha, prefetch, o);
  }
}

/// Times that a block of R rows calls Prefetcher::step(), about.
template <int R, typename Kv>
inline int dot_steps(const Tile& t) {
  const int vectors = t.slots * ((t.qk_dim + Kv::kChunk - 1) / Kv::kChunk);
  constexpr int kWidth = kStepVectors * kLanes;
  const int panels = (t.v_dim + kWidth - 1) / kWidth * (R / ValueBlock<R>::kRows);
  return (vectors + kStepVectors - 1) / kStepVectors + (t.slots + 1) / 2 * panels;
}

template <int R, typename Kv>
inline void dot_block(const Tile& t, Kv& kv, int first, Prefetcher& prefetch) {
  constexpr int kValueRows = ValueBlock<R>::kRows;
  alignas(64) float s[R * kTileSlots];
  float alpha[R];
  const uint32_t* q = static_cast<const uint32_t*>(t.q) + first * t.q_stride;
  if constexpr (R <= Kv::kReducedRows) {
    score_pairs<R>(t, kv, q, prefetch, s);
  } else {
    score_dots<R>(t, kv, q, prefetch, s);
  }
  softmax<Kv::kWeights, (R < kLanes ? R : kLanes)>(t, first, R, s, alpha);
  const uint32_t* weights = kv.weights(s, R);
  for (int r = 0; r < R; r += kValueRows) {
    value_dots_from<kValueRows, ValueBlock<R>::kColumns>(t, kv, weights, r, 0, alpha + r, prefetch,
                                                         t.o + (first + r) * t.o_stride);
  }
}

template <typename Kv>
inline void attend_few_dots(const Tile& t) {
  Kv kv(t);
  int steps = 0;
  for_each_few_block(t.rows, [&]<int R>(int) { steps += dot_steps<R, Kv>(t); });
  Prefetcher prefetch(t, steps);
  for_each_few_block(t.rows, [&]<int R>(int first) { dot_block<R>(t, kv, first, prefetch); });
}

#endif  // RELAY_HAS_BF16_DOT

// Processors with AMX multiply pairs of bf16 outside of it no faster than f32.
#if defined(RELAY_HAS_BF16_DOT) && !defined(RELAY_HAS_AMX)
#define RELAY_FEW_PAIRS 1
#endif

inline QueryLayout few_layout([[maybe_unused]] DType k_type, [[maybe_unused]] DType v_type) {
#ifdef RELAY_FEW_PAIRS
  if (k_type == DType::kBF16 && v_type == DType::kBF16) return QueryLayout::kBF16Pairs;
#endif
#ifdef RELAY_HAS_BYTE_DOT
  if (k_type == DType::kQ8_0 && v_type == DType::kQ8_0) return QueryLayout::kInt8;
#endif
  return QueryLayout::kF32;
}

inline void attend_few(const Tile& t) {
#ifdef RELAY_FEW_PAIRS
  if (few_layout(t.k_type, t.v_type) == QueryLayout::kBF16Pairs) return attend_few_dots<BF16Few>(t);
#endif
#ifdef RELAY_HAS_BYTE_DOT
  if (few_layout(t.k_type, t.v_type) == QueryLayout::kInt8) return attend_few_dots<Q8Few>(t);
#endif
  attend_few_f32(t);
}
