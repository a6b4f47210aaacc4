// The kernels' boundary: what one instruction set offers. Nothing here knows a request or a plan.
//
// A tile is up to kTileSlots KV slots of one KV head; a query row here is one (row, head of the
// group) pair, so the whole GQA group goes over a tile while it is in cache. The state of a query
// row over the slots seen so far is (max, sum, o), in base 2:
//   max >= max_s x_s - 20,   sum = sum_s 2^(x_s - max),   o = sum_s 2^(x_s - max) v_s,
// where x_s = log2(e) * logit_s. Any max in that range does: it cancels out. Nothing seen: max =
// -inf, sum = 0, o = 0.
#pragma once

#include <cstdint>
#include <string>

#include "relay/types.h"

namespace relay::kernels {

/// Query rows whose scores are held at once between the two matrix products of a tile.
inline constexpr int kScoreRows = 48;

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.693147180559945309417f;

/// How packed queries lie: f32, or pairs of bf16 for the dot-product instructions, or as sums of
/// two bf16, the high half and the low: for every 32 elements 16 pairs of the high and 16 of the
/// low. Or as q8_0 has them (kInt8): for every 32 elements kInt8Words words, of which the first 8
/// are signed bytes, then follow their scale in f32 and -128 times their sum.
enum class QueryLayout : uint8_t { kF32, kBF16Pairs, kBF16Halves, kInt8 };

inline constexpr int kInt8Words = 10;

/// One tile for one KV head and a run of query rows. Strides of q and o are in elements.
struct Tile {
  int slots = 0;  ///< 1 to kTileSlots
  /// [slots] vectors, to which k_offset bytes are added; for attend_tiled [1], the tile itself.
  const uint8_t* const* k = nullptr;
  const uint8_t* const* v = nullptr;
  int64_t k_offset = 0;
  int64_t v_offset = 0;
  DType k_type = DType::kF16;
  DType v_type = DType::kF16;
  int qk_dim = 0;
  int v_dim = 0;

  /// What will be wanted next, fetched into the cache along the way: k_bytes from each of
  /// next_k[0, next_slots) on (plus the offset), and the same of V.
  int next_slots = 0;
  const uint8_t* const* next_k = nullptr;
  const uint8_t* const* next_v = nullptr;
  int64_t next_k_offset = 0;
  int64_t next_v_offset = 0;
  int next_k_bytes = 0;
  int next_v_bytes = 0;

  int rows = 0;             ///< query rows
  const void* q = nullptr;  ///< [rows][q_stride], zero beyond qk_dim
  int64_t q_stride = 0;     ///< 4-byte words: elements (f32, halves) or pairs (bf16)
  float* o = nullptr;       ///< [rows][o_stride]; only the first v_dim count
  int64_t o_stride = 0;
  float* max = nullptr;  ///< [rows]
  float* sum = nullptr;  ///< [rows]

  float scale = 1.0f;                 ///< softmax scale times log2(e); with a soft cap, scale / cap
  float softcap = 0.0f;               ///< cap times log2(e), 0 for none
  int group = 1;                      ///< consecutive query rows that share a bias row
  const float* bias = nullptr;        ///< [rows / group][kTileSlots] or null; -inf hides
  const float* bias_scale = nullptr;  ///< [group], includes log2(e)

  float* scratch = nullptr;  ///< scratch_floats(...) floats, 64-byte aligned
};

/// One instruction set. Every function is pure: it touches only what it is handed.
struct KernelSet {
  const char* name;
  int lanes;  ///< f32 lanes of a vector

  /// Query rows of one pass of attend_few, as the cost model counts them: K and V come straight
  /// from memory, again for each further pass (narrow vectors make two of one). attend_many unpacks
  /// the tile once.
  int few_rows;

  /// Packed layout that attend_few wants for queries against KV of these types.
  QueryLayout (*few_layout)(DType k_type, DType v_type);

  /// Packed layout that attend_many and attend_tiled want for queries against KV of these types and
  /// head sizes.
  QueryLayout (*many_layout)(DType k_type, DType v_type, int qk_dim, int v_dim);

  /// Copies one vector of n elements (f32, f16, bf16) into packed form, padded with zeros up to
  /// padded_dim(n) elements.
  void (*pack_query)(DType type, const void* src, int n, QueryLayout layout, void* dst);

  /// Queries must be in few_layout(k_type, v_type).
  void (*attend_few)(const Tile& tile);
  /// Queries must be in many_layout(k_type, v_type).
  void (*attend_many)(const Tile& tile);
  /// As attend_many, for any number of rows, over a tile in KvLayout::kTiles.
  void (*attend_tiled)(const Tile& tile);

  /// Expands `count` f16 values to f32 (bias rows).
  void (*expand_f16)(const uint16_t* src, float* dst, int64_t count);
  /// acc[i] = acc[i] * a + part[i] * b
  void (*scale_add)(float* acc, float a, const float* part, float b, int n);
  /// dst[i] = o[i] * factor, stored as f32, f16 or bf16.
  void (*store_output)(DType type, const float* o, float factor, int n, void* dst);
};

/// Elements of a packed vector: n rounded up to 16, the widest vector of any set.
inline constexpr int padded_dim(int n) { return (n + 15) & ~15; }

/// Floats of a packed V: whole panels of at most 64 columns.
inline constexpr int64_t packed_v_floats(int v_dim) {
  return int64_t{kTileSlots} * ((v_dim + 63) / 64 * 64);
}

/// Floats of scratch that a tile of these head sizes needs.
int64_t scratch_floats(int qk_dim, int v_dim);

/// The set in use (see current_isa()).
const KernelSet& active();

/// 4-byte words of a packed query vector of n elements.
inline constexpr int query_words(QueryLayout layout, int n) {
  if (layout == QueryLayout::kInt8) return n / 32 * kInt8Words;
  return layout == QueryLayout::kBF16Pairs ? padded_dim(n) / 2 : padded_dim(n);
}

/// In which form set `isa` multiplies queries and KV of these types in attend_many and
/// attend_tiled, where head sizes allow. Throws Error if no such set runs here.
QueryLayout product_layout(const std::string& isa, DType k_type, DType v_type);

}  // namespace relay::kernels
