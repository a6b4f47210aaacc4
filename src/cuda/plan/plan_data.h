// A plan as it lies in device memory: what planner.h writes and the kernels read.
//
// Work is counted in *steps*: one KV head's tile of `tile_slots` slots for one tile of up to
// `tile_rows` query rows (rows x head group). A segment has kv_heads x row_tiles *jobs* of `steps`
// steps each; all jobs of all segments stand in one line, which is cut into *portions*: portion i
// is the steps [cuts[i], cuts[i + 1]), the end of one job, some whole ones and the beginning of
// another. Each worker begins with one, all about as long. What follows is the *tail*: short
// portions of requests' own contexts, taken by whoever has time, since multiprocessors do not get
// equal parts of the memory's bandwidth.
#pragma once

#include <bit>
#include <cstdint>

namespace relay::cuda {

#ifdef __CUDACC__
#define RELAY_HD __host__ __device__
#define RELAY_NOINLINE __noinline__
#else
#define RELAY_HD
#define RELAY_NOINLINE
#endif
/// Before a loop on the device: where code runs once, reading it from memory takes longest.
#ifdef __CUDA_ARCH__
#define RELAY_NO_UNROLL _Pragma("unroll 1")
#else
#define RELAY_NO_UNROLL
#endif

/// Shared runs of one request that are looked at; what comes after them is read by it alone.
inline constexpr int kMaxRuns = 5;
/// Segments that one group of requests is cut into where their shared parts end in different
/// places.
inline constexpr int kMaxGroupSegments = 8;
/// Parts of one request: those of its runs, those that it leads, and what lies between.
inline constexpr int kMaxParts = 64;
/// Jobs of more rows are not cut within the tail, where each portion has room for so many results.
inline constexpr int kTailRows = 32;
static_assert(kMaxRuns * kMaxGroupSegments + kMaxGroupSegments + kMaxRuns + kMaxGroupSegments + 1 <=
              kMaxParts);

/// Blocks [begin, end) of a request that hold what request `owner` has there too.
struct Run {
  int32_t begin;
  int32_t end;
  int32_t owner;
  int32_t request;
};

/// Columns [first, first + slots) of one request's table, for `rows` query rows.
struct Segment {
  int32_t request;  ///< whose block table says where the slots lie
  int32_t first;
  int32_t slots;
  int32_t rows;
  int32_t row_begin;  ///< into row_index, where they are there
  int32_t steps;      ///< of each job; job j is KV head j % kv_heads of tile j / kv_heads
  int32_t row_tiles;
  int32_t step_base;     ///< number of its first step in the line
  int32_t partial_base;  ///< its first partial row; -1: results of whole jobs go straight out
  int32_t visible_from;  ///< every row sees the columns [visible_from, visible_to)
  int32_t visible_to;
  int32_t seen_from;  ///< no row sees columns before it: they are not to be read into any sum
  int32_t shared;     ///< rows of more than one request
  int32_t first_row;  ///< where its query rows are neighbours: the first; -1: they are in row_index
  int32_t unused[2];
};

/// A query row sees the columns [lo, hi) of its request.
struct RowInfo {
  int32_t request;
  int32_t position;
  int32_t lo;
  int32_t hi;
};

/// Where the rows of a request are: parts[count], or, for one with many rows, one segment after
/// the other from `segment` on, each of `rows_per_segment` rows.
struct RequestInfo {
  int32_t parts;
  int32_t segment;
  int32_t rows_per_segment;  ///< 0: listed in parts
  int32_t row_begin;         ///< its first query row
};

struct alignas(8) RequestPart {
  int32_t segment;
  int32_t row;  ///< its first row among the segment's
};

enum PlanFault : uint32_t {
  kFaultStarts =
      1,  ///< query_starts do not begin at 0, descend or exceed max_rows; nothing is planned
  kFaultLength = 2,   ///< fewer KV tokens than rows, or more than the block table has room for
  kFaultBlockId = 4,  ///< a block id outside of the cache
};

struct PlanHeader {
  int32_t segments = 0;
  int32_t shared_segments = 0;
  int32_t workers = 0;   ///< that have a portion of their own
  int32_t portions = 0;  ///< with those of the tail
  int32_t steps = 0;
  int32_t rows = 0;
  int32_t partial_rows = 0;  ///< of whole jobs
  int32_t pieces = 0;        ///< of all lists
  uint32_t faults = 0;
  int32_t fault_request = INT32_MAX;  ///< the first request that something is wrong with
};

/// Where the partial rows of a (query row, head) are listed.
struct PieceList {
  int32_t begin;
  int32_t count;  ///< or kDirect
};
/// Its result has gone straight out.
inline constexpr int32_t kDirect = -1;

/// A place in the line of steps, and the segment it is in (or at the end of).
struct Cut {
  int32_t step;
  int32_t segment;
};

struct PlanView {
  PlanHeader* header;
  Segment* segments;
  int32_t* row_index;     ///< query rows of the segments
  RowInfo* rows;          ///< [max_rows]
  RequestInfo* requests;  ///< [max_requests]
  RequestPart* parts;     ///< [max_requests][kMaxParts]
  Cut* cuts;              ///< [max_portions + 1], written for all portions and all workers
  Segment* begins;        ///< [max_portions] the segment in which each begins
  PieceList* lists;       ///< [max_rows][q_heads]
  int32_t* pieces;        ///< [all_partial_rows()] numbers of partial rows, of all lists
};

/// How long things take, in any unit, where all workers are busy.
struct PlanCosts {
  int32_t step_memory;  ///< reading a step's KV
  int32_t step_8;       ///< its products for up to 8 query rows
  int32_t step_64;      ///< for up to 64
  int32_t step_128;     ///< for more
  int32_t latency;      ///< of a copy of KV, where nothing else is read
  int32_t depth;        ///< steps that a worker has room for
  int32_t job;          ///< beginning and ending a job
  int32_t rows;         ///< the same for each 16 query rows of it
  int32_t worker;       ///< the least that is worth a worker of its own
  int32_t portion;      ///< the least that is worth handing out
  int32_t tail;         ///< what each worker has to do, at least, where there is a tail
  int32_t snap;         ///< steps: no piece of a job is smaller
};

struct PlanShape {
  int32_t max_requests;
  int32_t max_rows;
  int32_t max_blocks;
  int32_t block_size;
  int32_t cache_blocks;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t group;
  int32_t window;
  int32_t causal;
  int32_t tile_rows;   ///< a power of two,
  int32_t tile_slots;  ///< as this is
  int32_t workers;
  int32_t max_portions;  ///< as many as workers: there is no tail
  int32_t max_segments;
  int32_t max_row_index;
  int32_t partial_capacity;   ///< rows for whole jobs' partials; those of cut ones have their own
  int32_t min_shared_blocks;  ///< shorter runs are not worth sharing
  PlanCosts costs;
};

struct PlanBatch {
  int32_t requests;
  const int32_t* query_starts;
  const int32_t* kv_lengths;
  const int32_t* table;
  int64_t table_stride;
};

// --- What batch and shape say of a request
// --------------------------------------------------------

struct RequestShape {
  int32_t row_begin;
  int32_t rows;
  int32_t length;     ///< tokens
  int32_t seen_from;  ///< first column that any of its rows sees
  int32_t first;      ///< where that block begins
  uint32_t faults;
};

RELAY_HD inline RequestShape request_shape(const PlanShape& shape, const PlanBatch& batch,
                                           int32_t i) {
  RequestShape r{batch.query_starts[i], 0, 0, 0, 0, 0};
  const int32_t end = batch.query_starts[i + 1];
  const bool begins = i > 0 ? r.row_begin >= 0 : r.row_begin == 0;
  if (!begins || end < r.row_begin || end > shape.max_rows) {
    r.faults = kFaultStarts;
    r.row_begin = 0;
    return r;
  }
  r.rows = end - r.row_begin;
  if (r.rows == 0) return r;
  const int64_t room = int64_t{shape.max_blocks} * shape.block_size;
  r.length = batch.kv_lengths[i];
  if (r.length < r.rows || r.length > room) {
    r.faults = kFaultLength;
    r.length = r.length < 0 ? 0 : (r.length > room ? static_cast<int32_t>(room) : r.length);
  }
  if (shape.window > 0) {
    const int32_t lo = r.length - r.rows - shape.window + 1;
    if (lo > 0) {
      r.seen_from = lo;
      r.first = lo / shape.block_size * shape.block_size;
    }
  }
  return r;
}

/// Requests with so many rows that a tile of them is full read KV for themselves: to share a tile
/// with others would not make them faster.
RELAY_HD inline bool sharable(const PlanShape& shape, int32_t rows) {
  return rows > 0 && rows * shape.group <= shape.tile_rows;
}

/// Requests that keys have room for.
inline constexpr int32_t kMaxOwners = 1024;
/// Who owns a block of KV that several requests list: the greatest of their keys. That is the one
/// with the most blocks that may be shared (at most 2^20, see validate() in operator.cpp), of
/// several the first.
RELAY_HD inline uint32_t owner_key(int32_t blocks, int32_t request) {
  return static_cast<uint32_t>(blocks * kMaxOwners + kMaxOwners - 1 - request);
}
RELAY_HD inline int32_t owner_of_key(uint32_t key) {
  return kMaxOwners - 1 - static_cast<int32_t>(key % kMaxOwners);
}

RELAY_HD inline int32_t rows_per_tile(const PlanShape& shape) {
  return shape.group >= shape.tile_rows ? 1 : shape.tile_rows / shape.group;
}

RELAY_HD inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

#ifdef __CUDACC__
template <typename T>
struct Words {
  int4 of[sizeof(T) / 16];
};
#endif

/// *to = from, in device memory that is aligned to 16 bytes, as structures of such a size are:
/// neighbouring threads' structures lie apart, and what counts is how often all are touched.
template <typename T>
RELAY_HD void store(T* to, const T& from) {
  static_assert(sizeof(T) % 16 == 0);
#ifdef __CUDA_ARCH__
  const auto words = __builtin_bit_cast(Words<T>, from);
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / 16; ++i) reinterpret_cast<int4*>(to)[i] = words.of[i];
#else
  *to = from;
#endif
}
template <typename T>
RELAY_HD T load(const T* from) {
  static_assert(sizeof(T) % 16 == 0);
#ifdef __CUDA_ARCH__
  Words<T> words;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / 16; ++i) words.of[i] = reinterpret_cast<const int4*>(from)[i];
  return __builtin_bit_cast(T, words);
#else
  return *from;
#endif
}

/// a / b. A GPU divides by some 25 instructions: here once, for all of the planner.
RELAY_NOINLINE RELAY_HD inline int32_t quotient(int32_t a, int32_t b) { return a / b; }

RELAY_HD inline int32_t log2_of(int32_t power) {
#ifdef __CUDA_ARCH__
  return 31 - __clz(power);
#else
  return std::bit_width(static_cast<uint32_t>(power)) - 1;
#endif
}

}  // namespace relay::cuda
