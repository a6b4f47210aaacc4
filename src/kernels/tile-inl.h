// The kernels, written once over the vector primitives of simd_*.h; included once per kernel set.
//
// Traffic and work of one tile of T slots for M query rows of one KV head (dk, dv head sizes):
//   read from memory   T * (dk + dv) * element size, once, whatever M is
//   arithmetic         2 * M * T * (dk + dv) flops, and M * T exponentials
// attend_few (M small: decode of one request) is bound by that read. It converts K and V in
// registers as they stream by and keeps nothing; S = Q K^T runs along dk, and a transposing
// reduction turns a register of partial sums per (row, slot) into one register of scores.
// attend_many (M large) is bound by arithmetic. It unpacks the tile once (K transposed, so that
// lanes are slots) and runs two register-blocked matrix products, S = Q K^T and O = O*alpha + P V,
// with the online softmax (Milakov and Gimelshein, 2018) between them.

// --- Elements --------------------------------------------------------------------------------

template <DType T>
struct Elements;
template <>
struct Elements<DType::kF32> {
  static constexpr int kBytes = 4;  // of one element; 0 where elements have no address
  static Vec load(const uint8_t* row, int i) { return load_f32(row + 4 * int64_t{i}); }
  static Vec tail(const uint8_t* row, int i, int n) {
    return load_f32_tail(row + 4 * int64_t{i}, n);
  }
};
template <>
struct Elements<DType::kF16> {
  static constexpr int kBytes = 2;
  static Vec load(const uint8_t* row, int i) { return load_f16(row + 2 * int64_t{i}); }
  static Vec tail(const uint8_t* row, int i, int n) {
    return load_f16_tail(row + 2 * int64_t{i}, n);
  }
};
template <>
struct Elements<DType::kBF16> {
  static constexpr int kBytes = 2;
  static Vec load(const uint8_t* row, int i) { return load_bf16(row + 2 * int64_t{i}); }
  static Vec tail(const uint8_t* row, int i, int n) {
    return load_bf16_tail(row + 2 * int64_t{i}, n);
  }
};
template <>
struct Elements<DType::kQ8_0> {
  static constexpr int kBytes = 0;
  static Vec load(const uint8_t* row, int i) {
    const uint8_t* block = row + (i / 32) * 34;
    uint16_t scale;
    std::memcpy(&scale, block, sizeof(scale));
    return load_i8(block + 2 + i % 32) * splat(f16_to_f32(scale));
  }
  // Head sizes of q8_0 are multiples of 32, so there is no tail.
  static Vec tail(const uint8_t* row, int i, int) { return load(row, i); }
};

/// Calls f with the Elements of `type`. kCustom never comes here: the caller unpacks it to f32.
template <typename F>
inline void with_elements(DType type, F f) {
  switch (type) {
    case DType::kF16:
      f(Elements<DType::kF16>{});
      break;
    case DType::kBF16:
      f(Elements<DType::kBF16>{});
      break;
    case DType::kQ8_0:
      f(Elements<DType::kQ8_0>{});
      break;
    default:
      f(Elements<DType::kF32>{});
      break;
  }
}

/// Vector i/kLanes of a row of n elements, zero beyond n.
template <typename E>
inline Vec load_padded(const uint8_t* row, int i, int n) {
  return i + kLanes <= n ? E::load(row, i) : E::tail(row, i, n - i);
}

// --- Arithmetic ------------------------------------------------------------------------------

inline constexpr float kInf = __builtin_inff();

/// 2^x for x <= 126, relative error below 2e-7 (minimax polynomial of degree 6 on [-0.5, 0.5],
/// 1.9e-9, plus rounding); 0 below -126, where the result would be subnormal. 2^0 is exactly 1.
inline Vec exp2(Vec x) {
  const Vec clamped = max(x, splat(-200.0f));
  const Vec n = round(clamped);
  const Vec f = clamped - n;
  Vec p = splat(0.0001534581242594868f);
  p = fma(p, f, splat(0.0013399930903688073f));
  p = fma(p, f, splat(0.009618489071726799f));
  p = fma(p, f, splat(0.05550328642129898f));
  p = fma(p, f, splat(0.24022646248340607f));
  p = fma(p, f, splat(0.6931471824645996f));
  p = fma(p, f, splat(1.0f));
  return times_power_of_two(p, n);
}

inline float exp2_scalar(float x) { return exp2(splat(x))[0]; }

/// tanh(x) = 1 - 2 / (1 + e^2x), absolute error below 3e-7.
inline Vec tanh(Vec x) {
  const Vec bound = splat(43.0f);  // e^86 is still finite, tanh(43) is 1 in f32
  const Vec limited = splat(0.0f) - max(splat(0.0f) - x, splat(0.0f) - bound);
  const Vec e = exp2(limited * splat(2.0f * kLog2e));
  return splat(1.0f) - splat(2.0f) / (splat(1.0f) + e);
}

// Recursion, not loops, over the stages: the compiler then keeps the vectors in registers.

template <int kHalf>
inline void fold_lanes(Vec (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    v[i] = RELAY_INTERLEAVE_LO(v[i], v[i + kHalf]) + RELAY_INTERLEAVE_HI(v[i], v[i + kHalf]);
  }
  if constexpr (kHalf > 1) fold_lanes<kHalf / 2>(v);
}
/// Lane i of the result is the sum of the lanes of v[i]. Overwrites v.
inline Vec transposing_sum(Vec (&v)[kLanes]) {
  fold_lanes<kLanes / 2>(v);
  return v[0];
}

/// Transposes a kLanes x kLanes block: log2(kLanes) perfect shuffles.
template <int kStage = 1, typename V>
inline void transpose(V (&v)[kLanes]) {
  V w[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / 2; ++i) {
    w[2 * i] = RELAY_INTERLEAVE_LO(v[i], v[i + kLanes / 2]);
    w[2 * i + 1] = RELAY_INTERLEAVE_HI(v[i], v[i + kLanes / 2]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = w[i];
  if constexpr (2 * kStage < kLanes) transpose<2 * kStage>(v);
}

// --- Prefetch --------------------------------------------------------------------------------

// A tile's vectors lie a whole slot apart, too far for the hardware's prefetchers, so the kernels
// ask for what comes next themselves, spread evenly over the work on this tile.
class Prefetcher {
 public:
  Prefetcher(const Tile& tile, int steps)
      : tile_(tile),
        lines_per_step_(
            (tile.next_slots * (lines(tile.next_k_bytes) + lines(tile.next_v_bytes)) + steps - 1) /
            steps) {}

  void step() {
    for (int n = lines_per_step_; n > 0 && slot_ < tile_.next_slots;) {
      const uint8_t* p = values_ ? tile_.next_v[slot_] + tile_.next_v_offset
                                 : tile_.next_k[slot_] + tile_.next_k_offset;
      const int bytes = values_ ? tile_.next_v_bytes : tile_.next_k_bytes;
      for (; n > 0 && at_ < bytes; --n, at_ += 64) __builtin_prefetch(p + at_, 0, 2);
      if (at_ < bytes) return;
      at_ = 0;
      slot_ += values_;
      values_ = !values_;
    }
  }

 private:
  static int lines(int bytes) { return (bytes + 63) / 64; }

  const Tile& tile_;
  const int lines_per_step_;
  int slot_ = 0;
  bool values_ = false;
  int at_ = 0;
};

// --- Softmax ---------------------------------------------------------------------------------

/// Online softmax of `rows` rows of raw scores s[rows][kTileSlots], in place: s becomes
/// 2^(x - max), alpha[row] the factor by which the row's earlier o shrinks. `first` is the first
/// row's index in the tile.
inline void softmax(const Tile& t, int first, int rows, float* s, float* alpha) {
  Vec iota;
  for (int i = 0; i < kLanes; ++i) iota[i] = static_cast<float>(i);
  const int vectors = (t.slots + kLanes - 1) / kLanes;
  const Vec scale = splat(t.scale);
  for (int r = 0; r < rows; ++r) {
    float* row = s + r * kTileSlots;
    const int q = first + r;
    Vec x[kTileSlots / kLanes];
    for (int j = 0; j < vectors; ++j) x[j] = load(row + j * kLanes) * scale;
    if (t.softcap != 0.0f) {
      for (int j = 0; j < vectors; ++j) x[j] = tanh(x[j]) * splat(t.softcap);
    }
    if (t.bias != nullptr) {
      const float* bias = t.bias + static_cast<int64_t>(q / t.group) * kTileSlots;
      const Vec slope = splat(t.bias_scale[q % t.group]);
      for (int j = 0; j < vectors; ++j) {
        const Vec b = load(bias + j * kLanes);
        // By comparison, not by arithmetic: a slope of 0 must not turn -inf into NaN.
        x[j] = select_below(b, splat(-3.4e38f), splat(-kInf), fma(b, slope, x[j]));
      }
    }
    if (t.slots % kLanes != 0) {
      const Vec end = splat(static_cast<float>(t.slots % kLanes));
      x[vectors - 1] = select_below(iota, end, x[vectors - 1], splat(-kInf));
    }
    Vec top = x[0];
    for (int j = 1; j < vectors; ++j) top = max(top, x[j]);
    const float old_max = t.max[q];
    const float tile_max = reduce_max(top);
    const float new_max = tile_max > old_max ? tile_max : old_max;
    alpha[r] = 1.0f;
    if (new_max == -kInf) {  // nothing visible so far
      for (int j = 0; j < vectors; ++j) store(row + j * kLanes, splat(0.0f));
      continue;
    }
    if (new_max != old_max) alpha[r] = old_max == -kInf ? 0.0f : exp2_scalar(old_max - new_max);
    Vec total = splat(0.0f);
    for (int j = 0; j < vectors; ++j) {
      const Vec p = exp2(x[j] - splat(new_max));
      total += p;
      store(row + j * kLanes, p);
    }
    t.max[q] = new_max;
    t.sum[q] = t.sum[q] * alpha[r] + reduce_add(total);
  }
}

// --- Few query rows --------------------------------------------------------------------------

/// Scores of R rows against the tile: s[R][kTileSlots].
template <typename E, int R>
inline void score_few(const Tile& t, const float* q, Prefetcher& prefetch, float* s) {
  constexpr int kSlots = kLanes / R;  // slots at once: kLanes accumulators
  const int full = t.qk_dim / kLanes * kLanes;
  for (int first = 0; first < t.slots; first += kSlots) {
    const uint8_t* k[kSlots];
    for (int p = 0; p < kSlots; ++p) {
      const int slot = first + p < t.slots ? first + p : t.slots - 1;  // surplus is masked later
      k[p] = t.k[slot] + t.k_offset;
    }
    prefetch.step();
    Vec acc[kLanes];
    for (int i = 0; i < kLanes; ++i) acc[i] = splat(0.0f);
    auto accumulate = [&](int i, auto load_k) {
      Vec query[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) query[r] = load(q + r * t.q_stride + i);
#pragma GCC unroll 16
      for (int p = 0; p < kSlots; ++p) {
        const Vec key = load_k(k[p]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          acc[r * kSlots + p] = fma(key, query[r], acc[r * kSlots + p]);
        }
      }
    };
    for (int i = 0; i < full; i += kLanes) {
      accumulate(i, [i](const uint8_t* row) { return E::load(row, i); });
    }
    if (full < t.qk_dim) {
      const int n = t.qk_dim - full;
      accumulate(full, [full, n](const uint8_t* row) { return E::tail(row, full, n); });
    }
    alignas(64) float scores[kLanes];
    store(scores, transposing_sum(acc));
    for (int r = 0; r < R; ++r) {
      std::memcpy(s + r * kTileSlots + first, scores + r * kSlots, kSlots * sizeof(float));
    }
  }
}

/// o[R][columns] = o * alpha + p[R][slots] V for C vectors of columns from `column` on; kTail: only
/// the first `tail` columns exist.
template <typename E, int R, int C, bool kTail = false>
inline void value_panel(const Tile& t, const float* p, const float* alpha, Prefetcher& prefetch,
                        int column, float* o, [[maybe_unused]] int tail = 0) {
  const int64_t base = t.v_offset + int64_t{column} * E::kBytes;
  const int start = E::kBytes == 0 ? column : 0;
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      acc[r][c] = load(o + r * t.o_stride + c * kLanes) * splat(alpha[r]);
    }
  }
  for (int slot = 0; slot < t.slots; ++slot) {
    const uint8_t* row = t.v[slot] + base;
    prefetch.step();
    Vec value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      value[c] = kTail ? E::tail(row, start, tail) : E::load(row, start + c * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec weight = splat(p[r * kTileSlots + slot]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = fma(value[c], weight, acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(o + r * t.o_stride + c * kLanes, acc[r][c]);
  }
}

/// The whole panels of R rows from `column` on, C vectors wide and then narrower; returns the first
/// column that is left.
template <typename E, int R, int C>
inline int value_panels(const Tile& t, const float* p, const float* alpha, Prefetcher& prefetch,
                        float* o, int column) {
  for (; column + C * kLanes <= t.v_dim; column += C * kLanes) {
    value_panel<E, R, C>(t, p, alpha, prefetch, column, o + column);
  }
  if constexpr (C > 1) return value_panels<E, R, C / 2>(t, p, alpha, prefetch, o, column);
  return column;
}

template <int R>
inline void few_block(const Tile& t, int first, Prefetcher& prefetch) {
  constexpr int kColumns = kFewAccumulators / R > 8 ? 8 : kFewAccumulators / R;
  alignas(64) float s[R * kTileSlots];
  float alpha[R];
  const float* q = static_cast<const float*>(t.q) + first * t.q_stride;
  float* o = t.o + first * t.o_stride;
  with_elements(t.k_type, [&](auto e) { score_few<decltype(e), R>(t, q, prefetch, s); });
  softmax(t, first, R, s, alpha);
  with_elements(t.v_type, [&](auto e) {
    using E = decltype(e);
    const int column = value_panels<E, R, kColumns>(t, s, alpha, prefetch, o, 0);
    if (column < t.v_dim) {
      value_panel<E, R, 1, true>(t, s, alpha, prefetch, column, o + column, t.v_dim - column);
    }
  });
}

inline void attend_few(const Tile& t) {
  // A step for each slot's values; the keys' steps come before, so the fetching ends early.
  Prefetcher prefetch(t, t.slots);
  int first = 0;
  if constexpr (kFewBlock == 8) {
    for (; first + 8 <= t.rows; first += 8) few_block<8>(t, first, prefetch);
  }
  for (; first + 4 <= t.rows; first += 4) few_block<4>(t, first, prefetch);
  if (first + 2 <= t.rows) {
    few_block<2>(t, first, prefetch);
    first += 2;
  }
  if (first < t.rows) few_block<1>(t, first, prefetch);
}

// --- Many query rows -------------------------------------------------------------------------

/// How a matrix product's operands lie: one f32, or (below) a pair of bf16, per element.
struct F32Product {
  using Element = float;
  static Vec load(const float* p) { return load_f32(reinterpret_cast<const uint8_t*>(p)); }
  static Vec multiply_add(float a, Vec b, Vec c) { return fma(splat(a), b, c); }
};

/// What becomes of the former contents of a product's result.
enum class Former { kDropped, kScaled, kKept };

/// c[MR][NV vectors] = former + a[MR][depth] b[depth][NV vectors], where former is 0, c * alpha (by
/// row) or c.
template <typename Product, int MR, int NV>
void product_block(const typename Product::Element* a, int64_t a_stride,
                   const typename Product::Element* b, int64_t b_stride, float* c, int64_t c_stride,
                   int depth, Former former, const float* alpha) {
  using B = decltype(Product::load(b));
  Vec acc[MR][NV];
  if (former == Former::kDropped) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = splat(0.0f);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vec factor = splat(former == Former::kScaled ? alpha[i] : 1.0f);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = load(c + i * c_stride + j * kLanes) * factor;
    }
  }
  for (int k = 0; k < depth; ++k) {
    B column[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) column[j] = Product::load(b + k * b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const typename Product::Element x = a[i * a_stride + k];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = Product::multiply_add(x, column[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(c + i * c_stride + j * kLanes, acc[i][j]);
  }
}

template <typename Product, int NV>
inline void product_rows(int rows, const typename Product::Element* a, int64_t a_stride,
                         const typename Product::Element* b, int64_t b_stride, float* c,
                         int64_t c_stride, int depth, Former former, const float* alpha,
                         Prefetcher& prefetch) {
  while (rows > 0) {
    auto block = [&]<int MR>() {
      product_block<Product, MR, NV>(a, a_stride, b, b_stride, c, c_stride, depth, former, alpha);
      return MR;
    };
    // Two even blocks beat a full one and a thin one.
    int done;
    if (rows >= kBlockRows && (rows >= 9 || rows == kBlockRows)) {
      done = block.template operator()<kBlockRows>();
    } else if (rows >= 4) {
      done = block.template operator()<4>();
    } else if (rows == 3) {
      done = block.template operator()<3>();
    } else if (rows == 2) {
      done = block.template operator()<2>();
    } else {
      done = block.template operator()<1>();
    }
    prefetch.step();
    rows -= done;
    a += done * a_stride;
    c += done * c_stride;
    if (alpha != nullptr) alpha += done;
  }
}

/// One panel of a product: c[rows][vectors] = former + a b, vectors <= kPanel.
template <typename Product>
inline void product_panel(int rows, int vectors, const typename Product::Element* a,
                          int64_t a_stride, const typename Product::Element* b, int64_t b_stride,
                          float* c, int64_t c_stride, int depth, Former former, const float* alpha,
                          Prefetcher& prefetch) {
  auto rows_of = [&]<int NV>() {
    product_rows<Product, NV>(rows, a, a_stride, b, b_stride, c, c_stride, depth, former, alpha,
                              prefetch);
  };
  switch (vectors) {
    case 1:
      rows_of.template operator()<1>();
      break;
    case 2:
      rows_of.template operator()<2>();
      break;
    case 3:
      rows_of.template operator()<(kPanel < 3 ? kPanel : 3)>();
      break;
    default:
      rows_of.template operator()<kPanel>();
      break;
  }
}

/// Rows of a packed K that stay in the first-level cache while all query rows go over them.
inline constexpr int kDepthBlock = 64;

/// s[rows][kTileSlots] = q k, k packed as by pack_k.
template <typename Product>
inline void product_scores(int rows, int slot_vectors, const typename Product::Element* q,
                           int64_t q_stride, const typename Product::Element* k, int depth,
                           float* s, Prefetcher& prefetch) {
  for (int i = 0; i < depth; i += kDepthBlock) {
    const int here = depth - i < kDepthBlock ? depth - i : kDepthBlock;
    for (int j = 0; j < slot_vectors; j += kPanel) {
      product_panel<Product>(rows, slot_vectors - j, q + i, q_stride,
                             k + i * kTileSlots + j * kLanes, kTileSlots, s + j * kLanes,
                             kTileSlots, here, i == 0 ? Former::kDropped : Former::kKept, nullptr,
                             prefetch);
    }
  }
}

/// Columns of a panel of packed V, and elements from one panel to the next.
inline constexpr int kPanelColumns = kPanel * kLanes;
inline constexpr int kPanelSize = kTileSlots * kPanelColumns;

/// o[rows] = o * alpha + p v, v packed as by pack_v.
template <typename Product>
inline void product_values(int rows, int value_vectors, const typename Product::Element* p,
                           const typename Product::Element* v, int depth, float* o,
                           int64_t o_stride, const float* alpha, Prefetcher& prefetch) {
  for (int j = 0; j < value_vectors; j += kPanel) {
    product_panel<Product>(rows, value_vectors - j, p, kTileSlots, v + j / kPanel * kPanelSize,
                           kPanelColumns, o + j * kLanes, o_stride, depth, Former::kScaled, alpha,
                           prefetch);
  }
}

/// K of the tile, transposed: out[qk_dim][kTileSlots], zero beyond the tile's slots.
template <typename E>
inline void pack_k(const Tile& t, float* out) {
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

/// Where column i (a multiple of kLanes) of slot (or pair of slots) t lies in a packed V: panels of
/// kPanelColumns columns, so that a panel's rows are adjacent.
inline int64_t packed_v_index(int t, int i) {
  return int64_t{i / kPanelColumns} * kPanelSize + t * kPanelColumns + i % kPanelColumns;
}

/// V of the tile in panels, zero beyond v_dim.
template <typename E>
inline void pack_v(const Tile& t, float* out) {
  for (int slot = 0; slot < t.slots; ++slot) {
    const uint8_t* row = t.v[slot] + t.v_offset;
    for (int i = 0; i < t.v_dim; i += kLanes) {
      store(out + packed_v_index(slot, i), load_padded<E>(row, i, t.v_dim));
    }
  }
}

#ifdef RELAY_HAS_BF16_DOT

/// Pairs of bf16, multiplied and added two by two in f32 (vdpbf16ps): twice the f32 rate.
struct BF16Product {
  using Element = uint32_t;
  static __m512i load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Vec multiply_add(uint32_t a, __m512i b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                 (__m512bh)b);
  }
};

/// As pack_k, in pairs along qk_dim: out[(qk_dim + 1) / 2][kTileSlots].
inline void pack_k_pairs(const Tile& t, uint32_t* out) {
  for (int first = 0; first < t.slots; first += 16) {
    for (int i = 0; i < t.qk_dim; i += 32) {
      const int n = t.qk_dim - i < 32 ? t.qk_dim - i : 32;
      const __mmask32 mask = n == 32 ? ~0u : (1u << n) - 1u;
      VecI v[16];
      for (int j = 0; j < 16; ++j) {
        v[j] = first + j < t.slots
                   ? (VecI)_mm512_maskz_loadu_epi16(mask, t.k[first + j] + t.k_offset + 2 * i)
                   : VecI{};
      }
      transpose(v);
      for (int j = 0; j < 16; ++j) {
        _mm512_storeu_si512(out + (i / 2 + j) * kTileSlots + first, (__m512i)v[j]);
      }
    }
  }
}

/// As pack_v, in pairs of slots.
inline void pack_v_pairs(const Tile& t, uint32_t* out) {
  for (int slot = 0; slot < t.slots; slot += 2) {
    for (int i = 0; i < t.v_dim; i += 16) {
      const int n = t.v_dim - i < 16 ? t.v_dim - i : 16;
      auto widen = [&](int which) {
        return _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(first_lanes(n), t.v[which] + t.v_offset + 2 * int64_t{i}));
      };
      const __m512i low = widen(slot);
      const __m512i high = slot + 1 < t.slots ? widen(slot + 1) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + packed_v_index(slot / 2, i),
                          _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

/// Rounds weights s[rows][kTileSlots] to bf16 in place: the first half of each row becomes pairs.
inline void round_weights(int rows, int slots, float* s) {
  for (int r = 0; r < rows; ++r) {
    float* row = s + r * kTileSlots;
    for (int j = 0; j < slots; j += 32) {
      const __m512 low = _mm512_loadu_ps(row + j);
      const __m512 high = j + 16 < slots ? _mm512_loadu_ps(row + j + 16) : _mm512_setzero_ps();
      _mm512_storeu_si512(row + j / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

#endif  // RELAY_HAS_BF16_DOT

inline QueryLayout many_layout([[maybe_unused]] DType k_type) {
#ifdef RELAY_HAS_BF16_DOT
  if (k_type == DType::kBF16) return QueryLayout::kBF16Pairs;
#endif
  return QueryLayout::kF32;
}

/// Unpacks the tile; true where the operand is in bf16 pairs.
inline bool pack_keys(const Tile& t, float* out) {
#ifdef RELAY_HAS_BF16_DOT
  if (t.k_type == DType::kBF16) {
    pack_k_pairs(t, reinterpret_cast<uint32_t*>(out));
    return true;
  }
#endif
  with_elements(t.k_type, [&](auto e) { pack_k<decltype(e)>(t, out); });
  return false;
}
inline bool pack_values(const Tile& t, float* out) {
#ifdef RELAY_HAS_BF16_DOT
  if (t.v_type == DType::kBF16) {
    pack_v_pairs(t, reinterpret_cast<uint32_t*>(out));
    return true;
  }
#endif
  with_elements(t.v_type, [&](auto e) { pack_v<decltype(e)>(t, out); });
  return false;
}

inline void attend_many(const Tile& t) {
  float* keys = t.scratch;
  float* values = keys + padded_dim(t.qk_dim) * kTileSlots;
  float* s = values + packed_v_floats(t.v_dim);
  float alpha[kScoreRows];
  const int slot_vectors = (t.slots + kLanes - 1) / kLanes;
  const int value_vectors = (t.v_dim + kLanes - 1) / kLanes;
  [[maybe_unused]] const bool key_pairs = pack_keys(t, keys);
  [[maybe_unused]] const bool value_pairs = pack_values(t, values);
  // Roughly one step for each register block of query rows in each product.
  Prefetcher prefetch(t, 2 * ((t.rows + kBlockRows - 1) / kBlockRows));

  for (int first = 0; first < t.rows; first += kScoreRows) {
    const int rows = t.rows - first < kScoreRows ? t.rows - first : kScoreRows;
    float* o = t.o + first * t.o_stride;
#ifdef RELAY_HAS_BF16_DOT
    if (key_pairs) {
      product_scores<BF16Product>(
          rows, slot_vectors, static_cast<const uint32_t*>(t.q) + first * t.q_stride, t.q_stride,
          reinterpret_cast<const uint32_t*>(keys), (t.qk_dim + 1) / 2, s, prefetch);
    } else
#endif
    {
      product_scores<F32Product>(rows, slot_vectors,
                                 static_cast<const float*>(t.q) + first * t.q_stride, t.q_stride,
                                 keys, t.qk_dim, s, prefetch);
    }
    softmax(t, first, rows, s, alpha);
#ifdef RELAY_HAS_BF16_DOT
    if (value_pairs) {
      round_weights(rows, t.slots, s);
      product_values<BF16Product>(rows, value_vectors, reinterpret_cast<const uint32_t*>(s),
                                  reinterpret_cast<const uint32_t*>(values), (t.slots + 1) / 2, o,
                                  t.o_stride, alpha, prefetch);
    } else
#endif
    {
      product_values<F32Product>(rows, value_vectors, s, values, t.slots, o, t.o_stride, alpha,
                                 prefetch);
    }
  }
}

// --- Rows in and out -------------------------------------------------------------------------

inline void pack_query(DType type, const void* src, int n, QueryLayout layout, void* dst) {
  const auto* row = static_cast<const uint8_t*>(src);
  auto* out = static_cast<float*>(dst);
  with_elements(type, [&](auto e) {
    using E = decltype(e);
    for (int i = 0; i < padded_dim(n); i += kLanes) {
      const Vec v = i < n ? load_padded<E>(row, i, n) : splat(0.0f);
#ifdef RELAY_HAS_BF16_DOT
      if (layout == QueryLayout::kBF16Pairs) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(dst) + i),
                            (__m256i)_mm512_cvtneps_pbh((__m512)v));
        continue;
      }
#endif
      (void)layout;
      store(out + i, v);
    }
  });
}

inline void expand_f16(const uint16_t* src, float* dst, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(dst + i, load_f16(reinterpret_cast<const uint8_t*>(src + i)));
  }
  for (; i < count; ++i) dst[i] = f16_to_f32(src[i]);
}

inline void scale_add(float* acc, float a, const float* part, float b, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(acc + i, fma(load(part + i), splat(b), load(acc + i) * splat(a)));
  }
  for (; i < n; ++i) acc[i] = acc[i] * a + part[i] * b;
}

/// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t f32_to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline void store_output(DType type, const float* o, float factor, int n, void* dst) {
  int i = 0;
  if (type == DType::kF32) {
    auto* out = static_cast<float*>(dst);
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(o + i) * splat(factor));
    for (; i < n; ++i) out[i] = o[i] * factor;
  } else if (type == DType::kF16) {
    auto* out = static_cast<uint16_t*>(dst);
    for (; i + kLanes <= n; i += kLanes) store_f16(out + i, load(o + i) * splat(factor));
    for (; i < n; ++i) out[i] = f32_to_f16(o[i] * factor);
  } else {
    auto* out = static_cast<uint16_t*>(dst);
    for (; i < n; ++i) out[i] = f32_to_bf16(o[i] * factor);
  }
}

inline KernelSet make_kernel_set(const char* name) {
  return {name,       kLanes,      kFewRows,   many_layout, pack_query,
          attend_few, attend_many, expand_f16, scale_add,   store_output};
}
