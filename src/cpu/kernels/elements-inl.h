// Reading vectors of KV elements of any type as f32.

inline constexpr int kQ8Block = 32;                 ///< elements of a block of q8_0
inline constexpr int kQ8BlockBytes = 2 + kQ8Block;  ///< its scale, in f16, comes first

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
    const uint8_t* block = row + i / kQ8Block * kQ8BlockBytes;
    uint16_t scale;
    std::memcpy(&scale, block, sizeof(scale));
    return load_i8(block + 2 + i % kQ8Block) * splat(f16_to_f32(scale));
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
