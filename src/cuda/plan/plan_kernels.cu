// Who shares what, found in the block tables: a block id means one content, so requests share a
// block exactly if they list the same id in the same column.
//
//   stamp_owners   every listed block gets an owner among those who list it      1 atomic an entry
//   find_runs      a request's columns become runs of one owner                   2 reads an entry
//   plan_work      planner.h                                                      one thread block
//   list_pieces    where each row's results will lie                    one warp a (row, KV head)
//
// The owner is the request that has the most blocks, of several the first: so a request that shares
// ever more with others, one after the other, has one run with one owner. Owners carry the number
// of the step, so that they need no clearing: one 64-bit maximum takes the newest step, in it the
// most blocks, and of these the first request.
#include <climits>

#include "cuda/launch.h"
#include "cuda/plan/pieces.h"
#include "cuda/plan/plan_kernels.h"

namespace relay::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumnsPerThread = 4;
constexpr int kColumns = kThreads * kColumnsPerThread;
constexpr int kMaxStarts = 64;
constexpr int kMaxTeam = 512;
constexpr int kTeamWarps = kMaxTeam / 32;
constexpr int kMaxArrays = 6;  // scanned at once
constexpr int kListThreads = 128;

/// Inclusive prefix sums of the lanes' numbers. One warp.
__device__ int32_t scan_warp(int32_t v) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int32_t other = __shfl_up_sync(~0u, v, d);
    if (threadIdx.x % 32 >= d) v += other;
  }
  return v;
}

/// Whole blocks that may be shared, [begin, end).
struct Columns {
  int32_t begin;
  int32_t end;
};

__device__ Columns sharable_columns(const PlanShape& shape, const RequestShape& r) {
  if (!sharable(shape, r.rows) || r.faults != 0) return {0, 0};
  return {r.first / shape.block_size, r.length / shape.block_size};
}

/// A thread's entries of a chunk of a block table; -1 behind its end.
struct Entries {
  int32_t ids[kColumnsPerThread];

  __device__ static int32_t column(int32_t chunk, int i) {
    return chunk + i * kThreads + static_cast<int32_t>(threadIdx.x);
  }
  __device__ void read(const int32_t* table, int32_t chunk, int32_t end) {
#pragma unroll
    for (int i = 0; i < kColumnsPerThread; ++i) {
      ids[i] = column(chunk, i) < end ? table[column(chunk, i)] : -1;
    }
  }
};

__global__ void stamp_owners(PlanShape shape, PlanBatch batch, PlanMemory memory, bool check) {
  let_next_start();
  wait_for_previous();
  const int32_t request = blockIdx.y;
  const int32_t chunk = blockIdx.x * kColumns;
  const int32_t* table = batch.table + request * batch.table_stride;
  Entries entries;
  // Most tables are not longer than this: read before the length is known.
  const bool ahead = chunk < 2 * kColumns;
  if (ahead) entries.read(table, chunk, shape.max_blocks);
  const auto epoch = static_cast<unsigned long long>(*memory.epoch);
  const RequestShape r = request_shape(shape, batch, request);
  const Columns columns = sharable_columns(shape, r);
  const int32_t end = check ? ceil_div(r.length, shape.block_size) : columns.end;
  if (!ahead) entries.read(table, chunk, end);
  const unsigned long long stamp = epoch << 32 | owner_key(columns.end, request);
#pragma unroll
  for (int i = 0; i < kColumnsPerThread; ++i) {
    const int32_t column = Entries::column(chunk, i);
    if (column >= end) break;
    const int32_t id = entries.ids[i];
    if (id < 0 || id >= shape.cache_blocks) {
      if (check) {
        atomicOr(&memory.faults[0], kFaultBlockId);
        atomicMax(&memory.faults[1], 0xffffffffu - request);
      }
    } else if (column >= columns.begin && column < columns.end) {
      atomicMax(&memory.owners[id], stamp);
    }
  }
}

__global__ void find_runs(PlanShape shape, PlanBatch batch, PlanMemory memory) {
  __shared__ int32_t owner_of[kColumns + 1];  // the one before the first, then this chunk's
  __shared__ int32_t warp_sum[kThreads / 32];
  __shared__ int32_t starts[kMaxStarts + 1];
  __shared__ int32_t owners[kMaxStarts + 1];
  let_next_start();
  const int32_t request = blockIdx.x;
  const int32_t* table = batch.table + request * batch.table_stride;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  wait_for_previous();
  // Before the length is known, and so while it is read.
  Entries entries;
  entries.read(table, 0, shape.max_blocks);
  const RequestShape r = request_shape(shape, batch, request);
  const Columns columns = sharable_columns(shape, r);
  const int32_t first_chunk = columns.begin / kColumns * kColumns;
  if (first_chunk > 0) entries.read(table, first_chunk, columns.end);
  int32_t count = 0;
  for (int32_t chunk = first_chunk; chunk < columns.end; chunk += kColumns) {
    int32_t found[kColumnsPerThread];
#pragma unroll
    for (int i = 0; i < kColumnsPerThread; ++i) {
      const int32_t column = Entries::column(chunk, i);
      const int32_t id = entries.ids[i];
      const bool known =
          column >= columns.begin && column < columns.end && id >= 0 && id < shape.cache_blocks;
      found[i] = known ? owner_of_key(static_cast<uint32_t>(memory.owners[id])) : request;
    }
    Entries next;
    next.read(table, chunk + kColumns, columns.end);
    if (threadIdx.x == 0) owner_of[0] = chunk == first_chunk ? -1 : owner_of[kColumns];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kColumnsPerThread; ++i) {
      const int32_t column = Entries::column(chunk, i);
      int32_t owner = request;
      if (found[i] != request) {
        // The owner must list the block in this very column: elsewhere it is at another position.
        const int32_t their_id = batch.table[found[i] * batch.table_stride + column];
        const Columns theirs = sharable_columns(shape, request_shape(shape, batch, found[i]));
        const bool theirs_too = column >= theirs.begin && column < theirs.end;
        if (theirs_too && their_id == entries.ids[i]) owner = found[i];
      }
      owner_of[1 + i * kThreads + threadIdx.x] = owner;
    }
    entries = next;
    __syncthreads();
    // Where the owner changes, in order.
    const int first = threadIdx.x * kColumnsPerThread;
    int here = 0;
#pragma unroll
    for (int i = 0; i < kColumnsPerThread; ++i) {
      if (chunk + first + i < columns.end && owner_of[first + i] != owner_of[first + i + 1]) ++here;
    }
    const int before = scan_warp(here);
    if (lane == 31) warp_sum[warp] = before;
    __syncthreads();
    int at = count + before - here;
    int total = count;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) at += warp_sum[w];
      total += warp_sum[w];
    }
#pragma unroll
    for (int i = 0; i < kColumnsPerThread; ++i) {
      if (chunk + first + i < columns.end && owner_of[first + i] != owner_of[first + i + 1]) {
        if (at <= kMaxStarts) {
          starts[at] = chunk + first + i;
          owners[at] = owner_of[first + i + 1];
        }
        ++at;
      }
    }
    count = total;
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  int32_t kept = 0;
  for (int32_t s = 0; s < count && s < kMaxStarts && kept < kMaxRuns; ++s) {
    if (owners[s] == request) continue;
    Run run{starts[s], s + 1 < count ? starts[s + 1] : columns.end, owners[s], request};
    if (shape.window > 0) {
      // The windows of requests begin in different places: meet at few.
      const int32_t raster = shape.window / (4 * shape.block_size);
      if (raster > 1) run.begin = ceil_div(run.begin, raster) * raster;
    }
    if (run.end - run.begin < shape.min_shared_blocks) continue;
    memory.runs[request * kMaxRuns + kept++] = run;
  }
  memory.run_counts[request] = kept;
}

/// Exclusive prefix sums of some arrays in place, by a whole block.
template <int kArrays>
__device__ __noinline__ void block_scan(int32_t* const (&arrays)[kArrays], int32_t n,
                                        int32_t (*warp_sums)[kTeamWarps], int32_t* sums) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t warp = threadIdx.x / 32;
  int32_t done[kArrays] = {};
#pragma unroll 1
  for (int32_t chunk = 0; chunk < n; chunk += blockDim.x) {
    const int32_t i = chunk + threadIdx.x;
    const int32_t warps = ceil_div(min(n - chunk, static_cast<int32_t>(blockDim.x)), 32);
    int32_t before[kArrays];
    if (warp < warps) {
      int32_t through[kArrays];
#pragma unroll
      for (int a = 0; a < kArrays; ++a) before[a] = through[a] = i < n ? arrays[a][i] : 0;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
#pragma unroll
        for (int a = 0; a < kArrays; ++a) {
          const int32_t other = __shfl_up_sync(~0u, through[a], d);
          through[a] += lane >= d ? other : 0;
        }
      }
#pragma unroll
      for (int a = 0; a < kArrays; ++a) {
        if (lane == 31) warp_sums[a][warp] = through[a];
        before[a] = done[a] + through[a] - before[a];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t w = 0; w < warps; ++w) {
#pragma unroll
      for (int a = 0; a < kArrays; ++a) {
        const int32_t sum = warp_sums[a][w];
        before[a] += w < warp ? sum : 0;
        done[a] += sum;
      }
    }
#pragma unroll
    for (int a = 0; a < kArrays; ++a) {
      if (i < n) arrays[a][i] = before[a];
    }
    __syncthreads();
  }
#pragma unroll
  for (int a = 0; a < kArrays; ++a) sums[a] = done[a];
}

/// The threads of one block.
class BlockTeam {
 public:
  /// Of shared memory.
  using WarpSums = int32_t[kMaxArrays][kTeamWarps];
  __device__ explicit BlockTeam(WarpSums& sums) : warp_sums_(sums) {}

  template <typename F>
  __device__ void each(int n, F f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }
  __device__ bool any(bool b) { return __syncthreads_or(b); }
  template <int kArrays>
  __device__ void scan(int32_t* const (&arrays)[kArrays], int32_t n, int32_t* sums) {
    static_assert(kArrays <= kMaxArrays);
    block_scan(arrays, n, warp_sums_, sums);
  }
  template <int kValues>
  __device__ void sum(int32_t (&values)[kValues]) {
    reduce(values, 0, [](int32_t v) { return __reduce_add_sync(~0u, v); });
  }
  template <int kValues>
  __device__ void greatest(int32_t (&values)[kValues]) {
    reduce(values, INT_MIN, [](int32_t v) { return __reduce_max_sync(~0u, v); });
  }
  __device__ void add(int32_t* p, int32_t v) { atomicAdd(p, v); }
  __device__ void min(int32_t* p, int32_t v) { atomicMin(p, v); }
  __device__ void max(int32_t* p, int32_t v) { atomicMax(p, v); }
  __device__ void set_bits(uint32_t* p, uint32_t v) { atomicOr(p, v); }

 private:
  WarpSums& warp_sums_;

  template <int kValues, typename F>
  __device__ void reduce(int32_t (&values)[kValues], int32_t none, F of_warp) {
    static_assert(kValues <= kMaxArrays && kTeamWarps <= 32);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int a = 0; a < kValues; ++a) {
      values[a] = of_warp(values[a]);
      if (lane == 0) warp_sums_[a][threadIdx.x / 32] = values[a];
    }
    __syncthreads();
#pragma unroll
    for (int a = 0; a < kValues; ++a) {
      values[a] = of_warp(lane < blockDim.x / 32 ? warp_sums_[a][lane] : none);
    }
    __syncthreads();  // the next who needs warp_sums
  }
};

/// `kInSharedMemory`: the planner's arrays, which else lie in memory.scratch.
template <bool kInSharedMemory>
__global__ void __launch_bounds__(kMaxTeam)
    plan_work(PlanShape shape, PlanBatch batch, PlanView view, PlanMemory memory, bool sharing) {
  extern __shared__ char shared_scratch[];
  __shared__ BlockTeam::WarpSums warp_sums;
  let_next_start();
  PlannerScratch scratch;
  PlannerScratch::lay_out(shape, kInSharedMemory ? shared_scratch : memory.scratch, &scratch);
  BlockTeam team(warp_sums);
  wait_for_previous();
  Planner<BlockTeam> planner(team, shape, batch, scratch, view);
  planner.plan(sharing ? memory.run_counts : nullptr, memory.runs);
  if (threadIdx.x == 0) {
    ++*memory.epoch;
    *memory.taken = 0;  // as merging leaves it, if it was launched
    if (memory.faults[0] != 0) {
      view.header->faults |= memory.faults[0];
      view.header->fault_request =
          ::min(view.header->fault_request, static_cast<int32_t>(0xffffffffu - memory.faults[1]));
      memory.faults[0] = 0;
      memory.faults[1] = 0;
    }
  }
}

/// The last portion that begins at or before a step. One warp.
__device__ int32_t portion_of(const int32_t* cuts, int32_t portions, int32_t step) {
  const int32_t lane = threadIdx.x % 32;
  int32_t low = 0;
  while (portions > 1) {
    const int32_t each = ceil_div(portions, 32);
    const int32_t at = lane * each;
    const bool before = at < portions && cuts[low + at] <= step;
    const int32_t skipped = (__popc(__ballot_sync(~0u, before)) - 1) * each;
    low += skipped;
    portions = min(each, portions - skipped);
  }
  return low;
}

/// Calls f(first_row, tile, partial) for the pieces of a query row's part in each of its tiles,
/// part by part, 32 pieces at a time: `first_row` is the row's first among the segment's rows x
/// group, `partial` the lane's piece as partial_row() gives it, INT_MIN for none. One warp.
template <typename F>
__device__ void each_piece(const PlanShape& shape, const PlanView& view, const int32_t* cuts,
                           int32_t row, int32_t kv_head, F f) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t portions = view.header->portions;
  const int32_t request = view.rows[row].request;
  const RequestInfo info = view.requests[request];
  const int32_t local = row - info.row_begin;
#pragma unroll 1
  for (int32_t number = 0; number < info.parts; ++number) {
    // All lanes read the same.
    RequestPart part;
    if (info.rows_per_segment > 0) {
      part = {info.segment + local / info.rows_per_segment, local % info.rows_per_segment};
    } else {
      part = view.parts[request * kMaxParts + number];
      part.row += local;
    }
    const Segment& segment = view.segments[part.segment];
    const int32_t steps = segment.steps;
    const int32_t segment_rows = segment.rows;
    const int32_t partial_base = segment.partial_base;
    const int32_t step_base = segment.step_base;
    if (steps == 0) continue;
    const int32_t first_row = part.row * shape.group;
#pragma unroll 1
    for (int32_t tile = first_row / shape.tile_rows;
         tile * shape.tile_rows < first_row + shape.group; ++tile) {
      const int32_t begin = step_base + (tile * shape.kv_heads + kv_head) * steps;
      const int32_t end = begin + steps;
#pragma unroll 1
      for (int32_t p = portion_of(cuts, portions, begin); p < portions && cuts[p] < end; p += 32) {
        int32_t partial = INT_MIN;
        if (p + lane < portions) {
          const int32_t from = max(begin, cuts[p + lane]);
          const int32_t to = min(end, cuts[p + lane + 1]);
          if (from < to) {
            partial = partial_row(shape, segment_rows, partial_base, kv_head,
                                  tile * shape.tile_rows, p + lane, from == begin, to == end);
          }
        }
        f(first_row, tile, partial);
      }
    }
  }
}

/// Into the L1 cache.
__device__ void fetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

/// Lists the pieces of each (query row, head). Once a step and not in each layer, since looking
/// them up takes longer than adding them.
__global__ void __launch_bounds__(kListThreads) list_pieces(PlanShape shape, PlanView view) {
  extern __shared__ int32_t cuts[];
  let_next_start();
  wait_for_previous();
  constexpr int32_t kWarps = kListThreads / 32;
  const int32_t lane = threadIdx.x % 32;
  const int32_t portions = view.header->portions;
  const int32_t chunks = ceil_div(shape.group, 32);  // of a group's heads: one a lane
  const int32_t tasks = view.header->rows * shape.kv_heads * chunks;
  const int32_t first_task = blockIdx.x * kWarps + threadIdx.x / 32;
  // What the first one reads comes while the cuts do.
  if (first_task < tasks) {
    const int32_t request = view.rows[first_task / chunks / shape.kv_heads].request;
    fetch(&view.requests[request]);
    fetch(&view.parts[request * kMaxParts]);
  }
  for (int32_t i = threadIdx.x; i <= portions; i += kListThreads) cuts[i] = view.cuts[i].step;
  __syncthreads();
#pragma unroll 1
  for (int32_t task = first_task; task < tasks; task += gridDim.x * kWarps) {
    const int32_t chunk = task % chunks;
    const int32_t kv_head = task / chunks % shape.kv_heads;
    const int32_t row = task / chunks / shape.kv_heads;
    const int32_t head = chunk * 32 + lane;  // of the group
    const auto tile_of = [&](int32_t first_row, int32_t of_group) {
      return (first_row + of_group) / shape.tile_rows;
    };
    int32_t count = 0;
    bool direct = false;
    each_piece(shape, view, cuts, row, kv_head,
               [&](int32_t first_row, int32_t tile, int32_t partial) {
                 const uint32_t there = __ballot_sync(~0u, partial != INT_MIN);
                 const bool whole = __any_sync(~0u, partial == -1);
                 if (tile_of(first_row, head) != tile) return;
                 count += __popc(there);
                 direct = direct || whole;
               });
    const bool is_head = head < shape.group;
    if (direct || !is_head) count = 0;
    const int32_t through = scan_warp(count);
    int32_t begin = 0;
    if (lane == 31 && through > 0) begin = atomicAdd(&view.header->pieces, through);
    begin = __shfl_sync(~0u, begin, 31) + through - count;
    if (is_head) {
      view.lists[row * shape.q_heads + kv_head * shape.group + head] = {begin,
                                                                        direct ? kDirect : count};
    }
    int32_t at = begin;  // where the lane's head goes on
    const int32_t heads = min(32, shape.group - chunk * 32);
    if (!__any_sync(~0u, count > 0)) continue;
    each_piece(shape, view, cuts, row, kv_head,
               [&](int32_t first_row, int32_t tile, int32_t partial) {
                 const uint32_t there = __ballot_sync(~0u, partial != INT_MIN);
                 const int32_t before = __popc(there & ((1u << lane) - 1));
#pragma unroll 1
                 for (int32_t h = 0; h < heads; ++h) {
                   const int32_t of_group = chunk * 32 + h;
                   const int32_t to = __shfl_sync(~0u, at, h) + before;
                   const bool lists = __shfl_sync(~0u, count, h) > 0 && partial >= 0;
                   if (lists && tile_of(first_row, of_group) == tile) {
                     view.pieces[to] = partial + (first_row + of_group) % shape.tile_rows;
                   }
                 }
                 if (tile_of(first_row, head) == tile) at += __popc(there);
               });
  }
}

}  // namespace

cudaError_t launch_plan(const PlanShape& shape, const PlanBatch& batch, const PlanView& view,
                        const PlanMemory& memory, bool sharing, bool check, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const bool any = batch.requests > 0;
  sharing = sharing && batch.requests > 1;
  if ((sharing || check) && any) {
    const dim3 grid((shape.max_blocks + kColumns - 1) / kColumns, batch.requests);
    error = launch(stamp_owners, grid, kThreads, 0, stream, shape, batch, memory, check);
    if (error != cudaSuccess) return error;
  }
  if (sharing) {
    error = launch(find_runs, batch.requests, kThreads, 0, stream, shape, batch, memory);
    if (error != cudaSuccess) return error;
  }
  // Of the batch, not of the limits: a small batch finds its arrays in shared memory.
  PlanShape fitted = shape;
  fitted.max_requests = any ? batch.requests : 1;
  const int64_t bytes = PlannerScratch::lay_out(fitted, nullptr, nullptr);
  int device = 0;
  int most = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  // Threads that have nothing to do take time as well.
  const int32_t team = batch.requests <= 256 ? 256 : kMaxTeam;
  if (bytes <= most - 1024) {
    error = cudaFuncSetAttribute(plan_work<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - 1024);
    if (error != cudaSuccess) return error;
    error = launch(plan_work<true>, 1, team, static_cast<size_t>(bytes), stream, fitted, batch,
                   view, memory, sharing);
  } else {
    error = launch(plan_work<false>, 1, team, 0, stream, fitted, batch, view, memory, sharing);
  }
  if (error != cudaSuccess || !any) return error;
  const int64_t warps = int64_t{shape.max_rows} * shape.kv_heads * ceil_div(shape.group, 32);
  const int64_t blocks = warps * 32 / kListThreads + 1;
  const int64_t enough = 16 * int64_t{shape.workers};
  return launch(list_pieces, static_cast<unsigned>(blocks < enough ? blocks : enough), kListThreads,
                sizeof(int32_t) * (shape.max_portions + 1), stream, fitted, view);
}

}  // namespace relay::cuda
