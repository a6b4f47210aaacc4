// Query rows in, output rows out.

#ifdef RELAY_HAS_BYTE_DOT
/// A query vector of n elements as QueryLayout::kInt8; what a byte leaves out is at most 1/254 of
/// its block's largest element.
template <typename E>
inline void pack_int8(const uint8_t* row, int n, uint32_t* out) {
  for (int first = 0; first < n; first += kQ8Block, out += kInt8Words) {
    Vec top = splat(0.0f);
    for (int i = first; i < first + kQ8Block; i += kLanes) {
      top = larger_magnitude(top, E::load(row, i));
    }
    const float scale = reduce_each<1>(&top, Magnitude{})[0] * (1.0f / 127.0f);
    const Vec inverse = splat(scale > 1e-37f ? 1.0f / scale : 0.0f);
    Vec total = splat(0.0f);
    for (int i = 0; i < kQ8Block; i += kLanes) {
      const Vec v = round(E::load(row, first + i) * inverse);
      store_i8(out + i / 4, v);
      total += v;
    }
    // A block that is not finite has a scale that is not.
    const float sum = reduce_each<1>(&total, Add{})[0];
    const int32_t start = sum == sum ? static_cast<int32_t>(-128.0f * sum) : 0;
    std::memcpy(out + kQ8Block / 4, &scale, sizeof(scale));
    std::memcpy(out + kQ8Block / 4 + 1, &start, sizeof(start));
  }
}
#endif

inline void pack_query(DType type, const void* src, int n, QueryLayout layout, void* dst) {
  const auto* row = static_cast<const uint8_t*>(src);
  auto* out = static_cast<float*>(dst);
  with_elements(type, [&](auto e) {
    using E = decltype(e);
#ifdef RELAY_HAS_BYTE_DOT
    if (layout == QueryLayout::kInt8) return pack_int8<E>(row, n, static_cast<uint32_t*>(dst));
#endif
#ifdef RELAY_HAS_AMX
    if (layout == QueryLayout::kBF16Halves) {
      for (int i = 0; i < n; i += 32) store_halves(out + i, E::load(row, i), E::load(row, i + 16));
      return;
    }
#endif
    for (int i = 0; i < padded_dim(n); i += kLanes) {
      const Vec v = i < n ? load_padded<E>(row, i, n) : splat(0.0f);
#ifdef RELAY_HAS_BF16_DOT
      if (layout == QueryLayout::kBF16Pairs) {
        store_bf16(static_cast<uint16_t*>(dst) + i, v);
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
