// The nouns that every part of Relay shares: element types and how tensors lie in memory.
//
// Vocabulary. A *row* is one query token of one request. A *slot* is one position of the KV cache
// and holds one K and one V vector for each KV head. Query heads that read the same KV head form
// its *head group* (GQA); group = q_heads / kv_heads.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace relay {

/// Thrown for input that no attention can be computed from; the message says what to change.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& what) : std::runtime_error(what) {}
};

enum class DType : uint8_t {
  kF32,
  kF16,     ///< IEEE binary16
  kBF16,    ///< upper half of binary32
  kQ8_0,    ///< blocks of 32: one f16 scale, then 32 int8 (34 bytes); head size a multiple of 32
  kCustom,  ///< any other; read through KvPlane::unpack
  kF8E4M3,  ///< 8 bits, 4 of exponent, 3 of mantissa, no infinities: KV on GPUs only
};

const char* to_string(DType type);

/// Bytes of `count` consecutive elements; throws Error for kCustom and for a partial q8_0 block.
int64_t row_bytes(DType type, int64_t count);

/// Sizes of one attention operator. q_heads is a multiple of kv_heads.
struct HeadShape {
  int32_t q_heads = 1;
  int32_t kv_heads = 1;
  int32_t qk_dim = 64;  ///< elements of a Q or K vector, 1 to 1024
  int32_t v_dim = 64;   ///< elements of a V or output vector, 1 to 1024

  int32_t group() const { return q_heads / kv_heads; }
  bool operator==(const HeadShape&) const = default;
};

/// Why KV of these types and sizes cannot lie in KvLayout::kTiles; null if it can.
const char* obstacle_to_tiles(const HeadShape& shape, DType k_type, DType v_type);

/// Expands one K or V vector of `count` elements to f32 (DType::kCustom).
using UnpackRow = void (*)(const void* row, float* out, int64_t count);

/// Slots of a tile: what the kernels attend at once, and what KvLayout::kTiles keeps together.
inline constexpr int kTileSlots = 64;

/// How the vectors of a block's slots lie.
enum class KvLayout : uint8_t {
  /// One vector after the other. Every host's layout; many rows need it transposed first.
  kRows,
  /// In tiles of kTileSlots slots, as the kernels multiply them: for an engine that owns its layout
  /// (write_kv() writes it). f32, f16 or bf16, the same for K and V; block_size a multiple of
  /// kTileSlots, head sizes multiples of 16.
  ///   f32, f16: K[dim][slot], V[slot][dim]
  ///   bf16:     K[dim / 2][slot][dim % 2], V[slot / 2][dim][slot % 2], for dot products of pairs
  kTiles,
};

/// Where the K (or V) vectors lie. Strides are in bytes; the elements of one vector are contiguous
/// (kRows). Vector of slot s, KV head h: data + (s / block_size) * block_stride
///                                            + (s % block_size) * slot_stride + h * head_stride.
/// The same, of a tile's first slot, is where the tile begins; slot_stride is then the bytes of a
/// vector, and a block's tiles follow one another.
struct KvPlane {
  DType type = DType::kF16;
  const void* data = nullptr;
  int64_t block_stride = 0;
  int64_t slot_stride = 0;
  int64_t head_stride = 0;
  UnpackRow unpack = nullptr;  ///< only for kCustom

  /// The vector of a slot and a KV head; in kTiles, of a tile's first slot, the tile.
  const uint8_t* at(int64_t block_size, int64_t slot, int64_t head) const {
    return static_cast<const uint8_t*>(data) + slot / block_size * block_stride +
           slot % block_size * slot_stride + head * head_stride;
  }
};

struct KvCache {
  KvPlane k;
  KvPlane v;
  int64_t block_size = INT64_MAX;  ///< slots per block; the default is one block for all
  KvLayout layout = KvLayout::kRows;
  int64_t slots = 0;  ///< that it has, so that none outside is touched; 0: unknown
};

/// What is wrong with a cache's sizes, whatever lies in it; null if nothing is.
const char* fault_of(const KvCache& cache);

/// Q, the output, or a bias: one vector per (row, head). Strides in bytes, elements contiguous.
/// Vector of row r, head h: data + (r / rows_per_block) * block_stride
///                               + (r % rows_per_block) * row_stride + h * head_stride.
template <typename Pointer>
struct RowsView {
  DType type = DType::kF32;  ///< kF32, kF16 or kBF16
  Pointer data = nullptr;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t rows_per_block = INT64_MAX;
  int64_t block_stride = 0;

  Pointer at(int64_t row, int64_t head) const {
    using Byte =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return static_cast<Byte*>(data) + row / rows_per_block * block_stride +
           row % rows_per_block * row_stride + head * head_stride;
  }
};
using ConstRows = RowsView<const void*>;
using MutableRows = RowsView<void*>;

}  // namespace relay
