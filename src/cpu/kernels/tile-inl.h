// The kernels, written once over the vector primitives of simd_*.h; included once per kernel set,
// inside its namespace.
//
// Traffic and work of one tile of T slots for M query rows of one KV head (dk, dv head sizes):
//   read from memory   T * (dk + dv) * element size, once, whatever M is
//   arithmetic         2 * M * T * (dk + dv) flops, and M * T exponentials
// attend_few (M small: decode of one request) is bound by that read and streams K and V through
// registers. attend_many (M large) is bound by arithmetic: it unpacks the tile once and runs two
// register-blocked matrix products with the softmax between them. attend_tiled runs the same
// products on KV that lies unpacked in memory.

#define RELAY_INLINE inline __attribute__((always_inline))
#define RELAY_NOINLINE __attribute__((noinline))
#define RELAY_INLINE_LAMBDA __attribute__((always_inline))

// In the order of their dependence.
// clang-format off
#include "cpu/kernels/elements-inl.h"
#include "cpu/kernels/math-inl.h"
#include "cpu/kernels/prefetch-inl.h"
#include "cpu/kernels/softmax-inl.h"
#include "cpu/kernels/few_rows-inl.h"
#ifdef RELAY_HAS_BYTE_DOT
#include "cpu/kernels/q8-inl.h"
#endif
#include "cpu/kernels/few_dots-inl.h"
#include "cpu/kernels/product-inl.h"
#ifdef RELAY_HAS_AMX
#include "cpu/kernels/amx-inl.h"
#endif
#include "cpu/kernels/many_rows-inl.h"
#include "cpu/kernels/tiled-inl.h"
#include "cpu/kernels/rows-inl.h"
// clang-format on

/// Query rows of one pass over a tile, as the cost model counts attend_few; the same in all sets.
inline constexpr int kFewRows = 8;

inline KernelSet make_kernel_set(const char* name) {
  return {name,       kLanes,      kFewRows,     few_layout, many_layout, pack_query,
          attend_few, attend_many, attend_tiled, expand_f16, scale_add,   store_output};
}
