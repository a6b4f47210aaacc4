// Matrix products of bf16 pairs on Intel's AMX: a 16 x 16 block of f32 sums, 16 pairs deep, in one
// instruction. Keys and values of a tile lie as AMX wants its second operand anyway (pairs along
// the summed dimension), query rows and weights as its first.
//
// Numbers of more than 8 significant bits are sums of two bf16 (halves): a product of such sums is
// three products, as that of the two low halves is left out.

inline constexpr int kAmxRows = 16;     ///< query rows of a block
inline constexpr int kAmxColumns = 32;  ///< slots or elements of V at once: two blocks
inline constexpr int kAmxDepth = 16;    ///< pairs that one instruction sums

inline bool suits_amx(int qk_dim, int v_dim) {
  return qk_dim % (2 * kAmxDepth) == 0 && v_dim % kAmxColumns == 0;
}
/// Whether a tile of bf16 goes to AMX as it lies. It wants whole blocks of slots: a part of one
/// would multiply zeros by what may be NaN.
inline bool suits_amx(const Tile& t) {
  return t.slots == kTileSlots && suits_amx(t.qk_dim, t.v_dim);
}

/// AMX's tile registers, as its instruction wants them described: 0 and 1 hold sums, 4 and 5 the
/// first operand (a row for each query row), 6 and 7 the second (16 rows). A row has 64 bytes.
struct AmxConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(AmxConfig) == 64);

/// For blocks of 1 to 16 query rows. Constants in memory: the intrinsic does not tell the compiler
/// how much of them is read.
struct AmxConfigs {
  AmxConfig of_rows[kAmxRows + 1];
  constexpr AmxConfigs() {
    for (int r = 0; r <= kAmxRows; ++r) {
      for (int tile = 0; tile < 6; ++tile) of_rows[r].rows[tile] = static_cast<uint8_t>(r);
    }
  }
};
inline constexpr AmxConfigs kAmxConfigs;

/// This thread's AMX tiles, while it lives. How the host had configured them comes back afterwards,
/// as ggml's own products on AMX configure a thread only once; what was in them is lost.
class AmxTiles {
 public:
  AmxTiles() { asm volatile("sttilecfg %0" : "=m"(host_)); }
  ~AmxTiles() {
    if (host_[0] != 0) {  // the palette
      asm volatile("ldtilecfg %0" : : "m"(host_));
    } else {
      _tile_release();
    }
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  /// For blocks of so many query rows.
  void configure(int rows) { _tile_loadconfig(&kAmxConfigs.of_rows[rows]); }

 private:
  alignas(64) uint8_t host_[sizeof(AmxConfig)];  // the intrinsics would tell of 8 bytes only
};

/// c[rows][32] = a b, or += if kAdd, for as many rows as the tiles are configured for. Strides in
/// 4-byte words; `depth` pairs, a multiple of 16. Halves: in a row of `a`, 16 pairs of high halves
/// and 16 of low ones take turns; `b` has a row of the one, then the same of the other.
template <bool kAdd, bool kHalves>
inline void amx_block(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                      float* c, int64_t c_stride, int depth) {
  const int64_t a_bytes = a_stride * 4;
  const int64_t b_bytes = b_stride * 4 * (kHalves ? 2 : 1);
  const int64_t c_bytes = c_stride * 4;
  // The intrinsics that load do not tell the compiler that they read memory.
  asm volatile("" ::: "memory");
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int k = 0; k < depth; k += kAmxDepth) {
    if constexpr (kHalves) {
      const uint32_t* high = b + 2 * k * b_stride;
      const uint32_t* low = high + b_stride;
      _tile_loadd(4, a + 2 * k, a_bytes);
      _tile_loadd(5, a + 2 * k + kAmxDepth, a_bytes);
      _tile_loadd(6, high, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, high + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, low, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, low + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, b + k * b_stride, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + k * b_stride + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  asm volatile("" ::: "memory");
}

/// The query rows of a tile over its operands, of bf16 pairs or halves.
template <Weights kWeights>
class AmxAttention {
 public:
  AmxAttention(const Tile& t, const Operands<BF16Product>& operands, float* s)
      : t_(t),
        operands_(operands),
        s_(s),
        slots_((t.slots + kAmxColumns - 1) / kAmxColumns * kAmxColumns),
        prefetch_(t, (t.rows + kAmxRows - 1) / kAmxRows * (slots_ + t.v_dim) / kAmxColumns) {}

  /// Block after block, the scores of the next before the weights of this one: AMX's instructions
  /// are few and run beside those of the softmax.
  void run() {
    const int rest = t_.rows % kAmxRows;
    const int whole = t_.rows - rest;
    AmxTiles tiles;
    if (whole > 0) {
      tiles.configure(kAmxRows);
      scores(0);
      for (int first = 0; first < whole; first += kAmxRows) {
        if (first + kAmxRows < whole) scores(first + kAmxRows);
        weigh(first, kAmxRows);
        values(first);
      }
    }
    if (rest > 0) {
      tiles.configure(rest);
      scores(whole);
      weigh(whole, rest);
      values(whole);
    }
  }

 private:
  static constexpr bool kHalves = kWeights == Weights::kBF16Halves;
  static_assert(2 * kAmxRows <= kScoreRows);

  /// Room for the scores of the block that begins with this row: two blocks take turns.
  float* scores_of(int first) const { return s_ + first % (2 * kAmxRows) * kTileSlots; }

  void scores(int first) {
    const auto* q = static_cast<const uint32_t*>(t_.q) + first * t_.q_stride;
    for (int j = 0; j < slots_; j += kAmxColumns) {
      amx_block<false, kHalves>(q, t_.q_stride, operands_.keys + j, kTileSlots,
                                scores_of(first) + j, kTileSlots, t_.qk_dim / 2);
      prefetch_.step();
    }
  }

  void weigh(int first, int rows) {
    float* s = scores_of(first);
    EarlyWeights<kWeights> early(t_, first, rows);
    if (early.known()) {
      const auto take = early.take(0, s);
      for (int r = 0; r < rows; ++r) {
        Vec row[kScoreVectors];
        for (int j = 0; j < kScoreVectors; ++j) row[j] = load(s + r * kTileSlots + j * kLanes);
        take(r, row);
      }
      if (early.commit()) return;
      scores(first);  // they have been overwritten
    }
    alignas(64) float alpha[kAmxRows];
    softmax<kWeights>(t_, first, rows, s, alpha);
    for (int r = 0; r < rows; ++r) {
      const Vec factor = splat(alpha[r]);
      float* o = t_.o + (first + r) * t_.o_stride;
      for (int i = 0; i < t_.v_dim; i += kLanes) store(o + i, load(o + i) * factor);
    }
  }

  void values(int first) {
    const auto* weights = reinterpret_cast<const uint32_t*>(scores_of(first));
    for (int i = 0; i < t_.v_dim; i += kAmxColumns) {
      amx_block<true, kHalves>(
          weights, kTileSlots,
          operands_.values + i / kPanelColumns * operands_.panel_stride + i % kPanelColumns,
          operands_.row_stride, t_.o + first * t_.o_stride + i, t_.o_stride, slots_ / 2);
      prefetch_.step();
    }
  }

  const Tile& t_;
  const Operands<BF16Product>& operands_;
  float* s_;
  int slots_;
  Prefetcher prefetch_;
};

/// Makes rows of pairs of an unpacked operand's rows [0, count), kPanelColumns wide: of rows 2i and
/// 2i + 1 the high halves in row 2i, the low ones in row 2i + 1.
inline void split_rows(float* rows, int count) {
  const auto pair = [](Vec first, Vec second) RELAY_INLINE_LAMBDA {  // of high halves
    return (Vec)(((VecU)first >> 16) | (VecU)second);
  };
  for (int r = 0; r < count; r += 2) {
    float* even = rows + r * kPanelColumns;
    float* odd = even + kPanelColumns;
    for (int i = 0; i < kPanelColumns; i += kLanes) {
      const Vec first = load(even + i);
      const Vec second = load(odd + i);
      const Vec first_high = high_half(first);
      const Vec second_high = high_half(second);
      store(even + i, pair(first_high, second_high));
      store(odd + i, pair(high_half(first - first_high), high_half(second - second_high)));
    }
  }
}

/// All query rows of a tile whose K and V lie unpacked in its scratch, as sums of halves.
inline void attend_halves(const Tile& t, const Scratch& scratch) {
  static_assert(kPanelColumns == kTileSlots);
  split_rows(scratch.keys, t.qk_dim);
  const int slots = (t.slots + kAmxColumns - 1) / kAmxColumns * kAmxColumns;
  for (int i = 0; i < t.v_dim; i += kPanelColumns) {
    float* panel = scratch.values + unpacked_v_index(0, i);
    std::memset(panel + t.slots * kPanelColumns, 0,
                static_cast<size_t>(slots - t.slots) * kPanelColumns * sizeof(float));
    split_rows(panel, slots);
  }
  const Operands<BF16Product> operands = {reinterpret_cast<const uint32_t*>(scratch.keys),
                                          reinterpret_cast<const uint32_t*>(scratch.values),
                                          kPanelColumns, kPanelSize};
  AmxAttention<Weights::kBF16Halves>(t, operands, scratch.scores).run();
}
