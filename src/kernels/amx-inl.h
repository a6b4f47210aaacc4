// Matrix products of bf16 pairs on Intel's AMX: a 16 x 16 block of f32 sums, 16 pairs deep, in one
// instruction. Keys and values of a tile lie as AMX wants its second operand anyway (pairs along
// the summed dimension), query rows and weights as its first.

inline constexpr int kAmxRows = 16;     ///< query rows of a block
inline constexpr int kAmxColumns = 32;  ///< slots or elements of V at once: two blocks
inline constexpr int kAmxDepth = 16;    ///< pairs that one instruction sums

/// How many of the tile's query rows, from the first on, AMX takes. It wants whole blocks: a part
/// of one would read beyond what is there, or multiply zeros by what may be NaN.
inline int amx_rows(const Tile& t) {
  const bool whole =
      t.slots == kTileSlots && t.qk_dim % (2 * kAmxDepth) == 0 && t.v_dim % kAmxColumns == 0;
  return whole ? t.rows / kAmxRows * kAmxRows : 0;
}

/// Tiles that are all 16 rows of 64 bytes, as the instruction wants it told. A constant in memory:
/// the intrinsic does not tell the compiler how much of it is read.
struct AmxConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr AmxConfig kAmxConfig;
static_assert(sizeof(AmxConfig) == 64);

/// This thread's AMX tiles, while it lives.
class AmxTiles {
 public:
  AmxTiles() { _tile_loadconfig(&kAmxConfig); }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

/// c[16 * kBlocks][32] = a b, or += if kAdd. Strides in elements; `depth` pairs, a multiple of 16.
template <int kBlocks, bool kAdd>
inline void amx_block(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                      float* c, int64_t c_stride, int depth) {
  const int64_t a_bytes = a_stride * 4;
  const int64_t b_bytes = b_stride * 4;
  const int64_t c_bytes = c_stride * 4;
  float* lower = c + kAmxRows * c_stride;
  // The intrinsics that load do not tell the compiler that they read memory.
  asm volatile("" ::: "memory");
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kBlocks == 2) {
      _tile_loadd(2, lower, c_bytes);
      _tile_loadd(3, lower + 16, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < depth; k += kAmxDepth) {
    _tile_loadd(6, b + k * b_stride, b_bytes);
    _tile_loadd(7, b + k * b_stride + 16, b_bytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBlocks == 2) {
      _tile_loadd(5, a + kAmxRows * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (kBlocks == 2) {
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + 16, c_bytes);
  }
  asm volatile("" ::: "memory");
}

/// c[rows][32] = a b, or += if kAdd; rows a multiple of 16. Steps the prefetcher once for every 16.
template <bool kAdd>
inline void amx_product(int rows, const uint32_t* a, int64_t a_stride, const uint32_t* b,
                        int64_t b_stride, float* c, int64_t c_stride, int depth,
                        Prefetcher& prefetch) {
  int done = 0;
  for (; done + 2 * kAmxRows <= rows; done += 2 * kAmxRows) {
    amx_block<2, kAdd>(a + done * a_stride, a_stride, b, b_stride, c + done * c_stride, c_stride,
                       depth);
    prefetch.step();
    prefetch.step();
  }
  if (done < rows) {
    amx_block<1, kAdd>(a + done * a_stride, a_stride, b, b_stride, c + done * c_stride, c_stride,
                       depth);
    prefetch.step();
  }
}

/// How often attend_amx steps the prefetcher.
inline int amx_steps(const Tile& t, int rows) {
  return rows / kAmxRows * (kTileSlots + t.v_dim) / kAmxColumns;
}

/// The first `rows` (amx_rows(t)) query rows of a tile over its operands.
inline void attend_amx(const Tile& t, int rows, const Operands<BF16Product>& operands, float* s,
                       Prefetcher& prefetch) {
  const AmxTiles tiles;
  alignas(64) float alpha[kScoreRows];
  const auto* weights = reinterpret_cast<const uint32_t*>(s);
  for (int first = 0; first < rows; first += kScoreRows) {
    const int count = rows - first < kScoreRows ? rows - first : kScoreRows;
    const auto* q = static_cast<const uint32_t*>(t.q) + first * t.q_stride;
    const auto scores = [&] {
      for (int j = 0; j < kTileSlots; j += kAmxColumns) {
        amx_product<false>(count, q, t.q_stride, operands.keys + j, kTileSlots, s + j, kTileSlots,
                           t.qk_dim / 2, prefetch);
      }
    };
    scores();
    float* o = t.o + first * t.o_stride;
    EarlyWeights<Weights::kBF16Pairs> early(t, first, count);
    if (early.known()) {
      const auto take = early.take(0, s);
      for (int r = 0; r < count; ++r) {
        Vec row[kScoreVectors];
        for (int j = 0; j < kScoreVectors; ++j) row[j] = load(s + r * kTileSlots + j * kLanes);
        take(r, row);
      }
    }
    if (!early.known() || !early.commit()) {
      if (early.known()) scores();  // they have been overwritten
      softmax<Weights::kBF16Pairs>(t, first, count, s, alpha);
      for (int r = 0; r < count; ++r) {
        const Vec factor = splat(alpha[r]);
        float* row = o + r * t.o_stride;
        for (int i = 0; i < t.v_dim; i += kLanes) store(row + i, load(row + i) * factor);
      }
    }
    for (int i = 0; i < t.v_dim; i += kAmxColumns) {
      amx_product<true>(
          count, weights, kTileSlots,
          operands.values + i / kPanelColumns * operands.panel_stride + i % kPanelColumns,
          operands.row_stride, o + i, t.o_stride, kTileSlots / 2, prefetch);
    }
  }
}
