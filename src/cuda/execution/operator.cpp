// The host's half of the operator: checks, the workspace's layout, and launches.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <charconv>
#include <climits>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/kernels/kernels.h"
#include "cuda/kernels/write_kv.h"
#include "cuda/plan/pieces.h"
#include "cuda/plan/plan_kernels.h"
#include "relay/cuda.h"

namespace relay::cuda {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int32_t kMinSharedSlots = 64;
/// Partial results that are provided for: so many of each query row that may share, and of no more
/// rows than these in all. A batch that needs more shares in coarser pieces.
constexpr int64_t kPartialsPerRow = 12;
constexpr int64_t kMaxPartials = 4096;
static_assert(kMaxRequests <= kMaxOwners);
constexpr int32_t kMaxBlockSize = 1 << 16;  // wgmma::Maps::column_of()

[[noreturn]] void fail(const std::string& what) { throw Error("cuda: " + what); }

void check(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) {
    // Clears the error unless it has broken the context.
    cudaGetLastError();
    fail(std::string(doing) + ": " + cudaGetErrorString(error));
  }
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "no usable CUDA device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "asking the device");
  return value;
}

/// Bytes a nanosecond that each multiprocessor gets from memory where all read, by the memory's
/// clock and width; 0 where the driver does not tell these.
double read_rate(int32_t multiprocessors) {
  const double kilohertz = device_attribute(cudaDevAttrMemoryClockRate);
  const double bits = device_attribute(cudaDevAttrGlobalMemoryBusWidth);
  return 2 * kilohertz * 1e-6 * bits / 8 / multiprocessors;
}

void validate(const PlanOptions& o) {
  const HeadShape& s = o.shape;
  const auto one_of = [](auto value, auto... allowed) { return ((value == allowed) || ...); };
  if (s.q_heads < 1 || s.kv_heads < 1 || s.q_heads % s.kv_heads != 0) {
    fail("q_heads must be a positive multiple of kv_heads");
  }
  if (s.qk_dim != s.v_dim) fail("K and V must have the same head size");
  if (!one_of(s.qk_dim, 64, 80, 96, 128, 192, 256)) {
    fail("head size " + std::to_string(s.qk_dim) + " is not one of 64, 80, 96, 128, 192, 256");
  }
  if (!one_of(o.q_type, DType::kBF16, DType::kF16)) {
    fail(std::string("queries must be bf16 or f16, not ") + to_string(o.q_type));
  }
  if (o.kv_type != o.q_type && o.kv_type != DType::kF8E4M3) {
    fail(std::string("KV must be of the queries' type or f8_e4m3, not ") + to_string(o.kv_type));
  }
  if (o.max_requests < 1 || o.max_requests > kMaxRequests) {
    fail("max_requests must be 1 to " + std::to_string(kMaxRequests));
  }
  if (o.max_rows < 1) fail("max_rows must be positive");
  if (o.max_blocks < 1) fail("max_blocks must be positive");
  if (o.block_size < 16 || o.block_size > kMaxBlockSize || o.block_size % 16 != 0) {
    fail("block_size must be a multiple of 16, at most " + std::to_string(kMaxBlockSize));
  }
  if (int64_t{o.max_blocks} * o.block_size > (1 << 24)) {
    fail("max_blocks x block_size must be at most 2^24 tokens");
  }
  if (o.cache_blocks < 1) fail("cache_blocks must be positive");
  if (o.window < 0) fail("window must not be negative");
  if (o.window > 0 && !o.causal) fail("a window needs causal attention");
  if (o.min_shared_slots < 0) fail("min_shared_slots must not be negative");
}

/// PlanOptions::min_shared_slots, or the environment's; 0: as the batch makes it.
int32_t asked_min_shared_slots(const PlanOptions& o) {
  if (o.min_shared_slots > 0) return o.min_shared_slots;
  const char* name = std::getenv("RELAY_CUDA_MIN_SHARED_SLOTS");
  const std::string_view value = name != nullptr ? name : "";
  if (value.empty()) return 0;
  int32_t slots = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), slots);
  if (error != std::errc() || end != value.data() + value.size() || slots < 1) {
    fail("RELAY_CUDA_MIN_SHARED_SLOTS=" + std::string(value) + " is no positive number");
  }
  return slots;
}

/// The length from which on sharing a run is faster. Reading it once saves what the other requests
/// would read, from the L2 cache mostly; a second partial result costs each row, and merging costs
/// a step some time. The constants are those that lose least over 144 batches of 2 to 64 requests
/// on an H200 (bench/cuda, set `paper`, prefixes of up to 2048 tokens).
int32_t min_shared_slots(const PlanOptions& o, int32_t requests) {
  constexpr double kMergeNs = 1000;
  constexpr double kNsPerElement = 0.04;  // of a request's row in all heads
  constexpr double kBytesPerNs = 6667;
  const double kv_bytes = 2.0 * o.shape.kv_heads * o.shape.qk_dim * (o.kv_type == o.q_type ? 2 : 1);
  const double row = static_cast<double>(o.shape.q_heads) * o.shape.qk_dim;
  const double costs = kMergeNs + kNsPerElement * row * requests;
  const double saved = kv_bytes * std::max(1, requests - 1) / kBytesPerNs;  // for each slot
  return static_cast<int32_t>(std::clamp(costs / saved, double{kMinSharedSlots}, 1e9));
}

Path choose_path(const PlanOptions& o) {
  Path wanted = o.path;
  if (wanted == Path::kAuto) {
    const char* name = std::getenv("RELAY_CUDA_PATH");
    const std::string value = name != nullptr ? name : "";
    if (value == "mma") {
      wanted = Path::kMma;
    } else if (value == "wgmma") {
      wanted = Path::kWgmma;
    } else if (!value.empty()) {
      fail("RELAY_CUDA_PATH=" + value + " is neither mma nor wgmma");
    }
  }
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (major < 8) fail("a GPU of compute capability 8.0 or newer is needed");
  if (wanted == Path::kWgmma) {
    if (major != 9) fail("the path wgmma needs compute capability 9.0");
    return Path::kWgmma;
  }
  if (wanted == Path::kMma) return Path::kMma;
  return major == 9 ? Path::kWgmma : Path::kMma;
}

PlanShape shape_of(const PlanOptions& o, const PathShape& path, int32_t multiprocessors) {
  PlanShape s{};
  s.max_requests = o.max_requests;
  s.max_rows = o.max_rows;
  s.max_blocks = o.max_blocks;
  s.block_size = o.block_size;
  s.cache_blocks = o.cache_blocks;
  s.q_heads = o.shape.q_heads;
  s.kv_heads = o.shape.kv_heads;
  s.group = o.shape.group();
  s.window = o.window;
  s.causal = o.causal ? 1 : 0;
  s.tile_rows = path.tile_rows;
  s.tile_slots = path.tile_slots;
  s.workers = multiprocessors * path.blocks_per_sm;
  s.max_portions = s.workers * (1 + path.tail_portions);
  s.max_segments = static_cast<int32_t>(PlannerScratch::max_segments(s));
  // Rows that share are those of requests that fill no tile.
  const int64_t sharing_rows =
      std::min<int64_t>(o.max_rows, int64_t{o.max_requests} * rows_per_tile(s));
  s.max_row_index = static_cast<int32_t>(sharing_rows * kMaxParts);
  s.partial_capacity = static_cast<int32_t>(std::min(sharing_rows * kPartialsPerRow, kMaxPartials) *
                                            o.shape.q_heads);
  s.costs = path.costs;
  return s;
}

}  // namespace

class Plan {
 public:
  PlanOptions options;
  Path path = Path::kMma;
  int32_t multiprocessors = 0;
  PlanShape shape{};
  PlanView view{};
  PlanMemory memory{};
  float* partial_out = nullptr;
  float2* partial_state = nullptr;
  int64_t partial_rows = 0;
  int32_t asked_min_shared_slots = 0;
  mutable PlanBatch batch{};  ///< planned last
  mutable int32_t batch_rows = 0;

  explicit Plan(const PlanOptions& o) : options(o) {
    validate(o);
    path = choose_path(o);
    asked_min_shared_slots = cuda::asked_min_shared_slots(o);
    multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
    const PathShape p = path == Path::kWgmma
                            ? wgmma_shape(o.shape.qk_dim, o.kv_type, read_rate(multiprocessors))
                            : mma_shape(o.shape.qk_dim);
    shape = shape_of(o, p, multiprocessors);
    if (!fit_costs(shape)) {
      fail(
          "max_requests, max_rows, max_blocks x block_size and kv_heads are too large together; "
          "lower one of them");
    }
    partial_rows = all_partial_rows(shape);
  }

  /// Places everything from `base` on (null: only counts); returns the bytes.
  size_t lay_out(char* base) {
    size_t used = 0;
    const auto take = [&](auto*& p, int64_t count) {
      using T = std::remove_reference_t<decltype(*p)>;
      p = reinterpret_cast<T*>(base + used);
      used += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    };
    // First what make_plan() clears.
    take(memory.owners, options.cache_blocks);
    take(memory.epoch, 1);
    take(memory.faults, 2);
    take(view.header, 1);
    take(memory.taken, 1);
    take(view.cuts, shape.max_portions + 1);
    take(view.begins, shape.max_portions);
    cleared = used;
    take(view.lists, int64_t{options.max_rows} * options.shape.q_heads);
    take(view.pieces, partial_rows);
    take(view.segments, shape.max_segments);
    take(view.row_index, shape.max_row_index);
    take(view.rows, options.max_rows);
    take(view.requests, options.max_requests);
    take(view.parts, int64_t{options.max_requests} * kMaxParts);
    take(memory.run_counts, options.max_requests);
    take(memory.runs, int64_t{options.max_requests} * kMaxRuns);
    take(memory.scratch, PlannerScratch::lay_out(shape, nullptr, nullptr));
    take(partial_state, partial_rows);
    take(partial_out, partial_rows * options.shape.v_dim);
    return used;
  }
  size_t cleared = 0;
};

void PlanDeleter::operator()(Plan* plan) const { delete plan; }

size_t workspace_bytes(const PlanOptions& options) {
  Plan plan(options);
  return plan.lay_out(nullptr);
}

PlanPtr make_plan(const PlanOptions& options, void* workspace, size_t bytes, Stream stream) {
  PlanPtr plan(new Plan(options));
  const size_t needed = plan->lay_out(nullptr);
  if (workspace == nullptr) fail("the workspace is null");
  if (bytes < needed) {
    fail("the workspace has " + std::to_string(bytes) + " bytes, the plan needs " +
         std::to_string(needed));
  }
  if (reinterpret_cast<uintptr_t>(workspace) % kAlignment != 0) {
    fail("the workspace must be aligned to 256 bytes");
  }
  plan->lay_out(static_cast<char*>(workspace));
  const auto s = static_cast<cudaStream_t>(stream);
  check(cudaMemsetAsync(workspace, 0, plan->cleared, s), "clearing the workspace");
  // The first step has number 1: a cleared owner is older.
  check(cudaMemsetAsync(plan->memory.epoch, 1, 1, s), "clearing the workspace");
  return plan;
}

void plan_batch(const Plan& plan, const Batch& batch, Stream stream) {
  const PlanOptions& o = plan.options;
  if (batch.requests < 0 || batch.requests > o.max_requests) {
    fail("the batch has " + std::to_string(batch.requests) + " requests, the plan is for at most " +
         std::to_string(o.max_requests));
  }
  if (batch.requests > 0 &&
      (batch.query_starts == nullptr || batch.kv_lengths == nullptr || batch.table == nullptr)) {
    fail("query_starts, kv_lengths or table is null");
  }
  if (batch.requests > 0 && batch.table_stride < o.max_blocks) {
    fail("table_stride " + std::to_string(batch.table_stride) + " is less than max_blocks " +
         std::to_string(o.max_blocks));
  }
  if (batch.rows < 0 || batch.rows > o.max_rows) {
    fail("the batch has " + std::to_string(batch.rows) + " rows, the plan is for at most " +
         std::to_string(o.max_rows));
  }
  plan.batch = {batch.requests, batch.query_starts, batch.kv_lengths, batch.table,
                batch.table_stride};
  plan.batch_rows = batch.rows > 0 ? batch.rows : o.max_rows;
  PlanShape shape = plan.shape;
  shape.max_rows = plan.batch_rows;  // query starts beyond it plan nothing
  const int32_t asked = plan.asked_min_shared_slots;
  shape.min_shared_blocks =
      ceil_div(asked > 0 ? asked : min_shared_slots(o, batch.requests), o.block_size);
  check(launch_plan(shape, plan.batch, plan.view, plan.memory, o.sharing == Sharing::kOn, o.check,
                    static_cast<cudaStream_t>(stream)),
        "planning");
}

namespace {

void check_operand(const void* data, std::initializer_list<int64_t> strides, const char* name) {
  if (data == nullptr) fail(std::string(name) + " is null");
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t stride : strides) {
    aligned = aligned && stride % 16 == 0;
    if (stride < 0) fail(std::string(name) + " has a negative stride");
  }
  if (!aligned) fail(std::string(name) + " and its strides must be multiples of 16 bytes");
}

AttendParams params_of(const Plan& plan, const Inputs& in) {
  const PlanOptions& o = plan.options;
  AttendParams p{};
  p.plan = plan.view;
  p.taken = plan.memory.taken;
  p.table = plan.batch.table;
  p.table_stride = plan.batch.table_stride;
  p.requests = plan.batch.requests;
  p.q = static_cast<const char*>(in.q);
  p.k = static_cast<const char*>(in.k);
  p.v = static_cast<const char*>(in.v);
  p.out = static_cast<char*>(in.out);
  p.q_row = in.q_row_stride;
  p.q_head = in.q_head_stride;
  p.out_row = in.out_row_stride;
  p.out_head = in.out_head_stride;
  p.k_block = in.k_block_stride;
  p.k_slot = in.k_slot_stride;
  p.k_head = in.k_head_stride;
  p.v_block = in.v_block_stride;
  p.v_slot = in.v_slot_stride;
  p.v_head = in.v_head_stride;
  p.head_size = o.shape.qk_dim;
  p.block_size = o.block_size;
  p.cache_blocks = o.cache_blocks;
  p.q_heads = o.shape.q_heads;
  p.kv_heads = o.shape.kv_heads;
  p.group = o.shape.group();
  p.tile_rows = plan.shape.tile_rows;
  p.workers = plan.shape.workers;
  p.max_portions = plan.shape.max_portions;
  p.partial_capacity = plan.shape.partial_capacity;
  p.scale = in.scale;
  p.softcap = in.softcap;
  p.slopes = in.slopes;
  p.sinks = in.sinks;
  p.q_scale = in.q_scale;
  p.k_scale = in.k_scale;
  p.v_scale = in.v_scale;
  p.lse = in.lse;
  p.partial_out = plan.partial_out;
  p.partial_state = plan.partial_state;
  return p;
}

}  // namespace

void attend(const Plan& plan, const Inputs& in, Stream stream) {
  if (plan.batch.requests == 0) return;
  check_operand(in.q, {in.q_row_stride, in.q_head_stride}, "q");
  check_operand(in.out, {in.out_row_stride, in.out_head_stride}, "out");
  check_operand(in.k, {in.k_block_stride, in.k_slot_stride, in.k_head_stride}, "k");
  check_operand(in.v, {in.v_block_stride, in.v_slot_stride, in.v_head_stride}, "v");
  if (!(in.softcap >= 0.0f)) fail("softcap must not be negative");
  if (!(in.scale >= 0.0f)) fail("scale must not be negative");
  if (in.q == in.out) fail("out must not overlap q");
  if (in.q_scale != nullptr && plan.options.kv_type != DType::kF8E4M3) {
    fail("queries in f8_e4m3 (q_scale) need KV in f8_e4m3");
  }
  const AttendParams p = params_of(plan, in);
  const auto s = static_cast<cudaStream_t>(stream);
  const PlanOptions& o = plan.options;
  const auto launch = plan.path == Path::kWgmma ? launch_wgmma : launch_mma;
  check(launch(p, o.q_type, o.kv_type, s), "attention");
  check(launch_merge(p, o.q_type, plan.batch_rows, plan.multiprocessors, s), "merging");
}

void write_kv(const Plan& plan, const KvWrite& write, const Inputs& cache, Stream stream) {
  if (write.tokens < 0) fail("negative number of tokens");
  if (write.tokens == 0) return;
  check_operand(write.k, {write.k_row_stride, write.k_head_stride}, "k");
  check_operand(write.v, {write.v_row_stride, write.v_head_stride}, "v");
  check_operand(cache.k, {cache.k_block_stride, cache.k_slot_stride, cache.k_head_stride},
                "the cache's k");
  check_operand(cache.v, {cache.v_block_stride, cache.v_slot_stride, cache.v_head_stride},
                "the cache's v");
  if (write.slots == nullptr) fail("slots is null");
  const auto plane = [](const void* data, int64_t block, int64_t slot, int64_t head) {
    return KvWriteParams::Plane{static_cast<char*>(const_cast<void*>(data)), block, slot, head};
  };
  const PlanOptions& o = plan.options;
  KvWriteParams p{};
  p.k = static_cast<const char*>(write.k);
  p.v = static_cast<const char*>(write.v);
  p.k_row = write.k_row_stride;
  p.k_head = write.k_head_stride;
  p.v_row = write.v_row_stride;
  p.v_head = write.v_head_stride;
  p.k_cache = plane(cache.k, cache.k_block_stride, cache.k_slot_stride, cache.k_head_stride);
  p.v_cache = plane(cache.v, cache.v_block_stride, cache.v_slot_stride, cache.v_head_stride);
  p.slots = write.slots;
  p.k_scale = cache.k_scale;
  p.v_scale = cache.v_scale;
  p.head_size = o.shape.qk_dim;
  p.kv_heads = o.shape.kv_heads;
  p.block_size = o.block_size;
  p.cache_blocks = o.cache_blocks;
  check(launch_write_kv(p, o.q_type, o.kv_type, write.tokens, static_cast<cudaStream_t>(stream)),
        "writing KV");
}

namespace {

template <typename T>
std::vector<T> copy_back(const T* from, int64_t count, cudaStream_t stream) {
  std::vector<T> to(static_cast<size_t>(count));
  check(cudaMemcpyAsync(to.data(), from, to.size() * sizeof(T), cudaMemcpyDeviceToHost, stream),
        "reading the plan");
  check(cudaStreamSynchronize(stream), "reading the plan");
  return to;
}

}  // namespace

PlanSummary summarize(const Plan& plan, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const PlanHeader header = copy_back(plan.view.header, 1, s)[0];
  PlanSummary summary;
  summary.segments = header.segments;
  summary.shared_segments = header.shared_segments;
  summary.workers = header.workers;
  summary.partial_rows = header.partial_rows;
  summary.partial_capacity = plan.shape.partial_capacity;
  for (const Segment& segment : copy_back(plan.view.segments, header.segments, s)) {
    summary.kv_slots_read += segment.slots;
    summary.kv_slots_attended += int64_t{segment.slots} * segment.rows;
  }
  summary.flops = 4.0 * plan.options.shape.qk_dim * plan.options.shape.q_heads *
                  static_cast<double>(summary.kv_slots_attended);
  return summary;
}

void check_batch(const Plan& plan, Stream stream) {
  const PlanHeader header = copy_back(plan.view.header, 1, static_cast<cudaStream_t>(stream))[0];
  if (header.faults == 0) return;
  std::string what = "batch: request " + std::to_string(header.fault_request) +
                     " is the first of which something is out of range:";
  if ((header.faults & kFaultStarts) != 0) what += " query_starts descend or exceed max_rows;";
  if ((header.faults & kFaultLength) != 0) {
    what += " kv_lengths below the number of rows or beyond max_blocks;";
  }
  if ((header.faults & kFaultBlockId) != 0) what += " block ids outside of the cache;";
  what.back() = '.';
  fail(what);
}

const PlanOptions& options_of(const Plan& plan) { return plan.options; }

const char* path_of(const Plan& plan) { return plan.path == Path::kWgmma ? "wgmma" : "mma"; }

std::string device_name() {
  int device = 0;
  check(cudaGetDevice(&device), "no usable CUDA device");
  cudaDeviceProp p{};
  check(cudaGetDeviceProperties(&p, device), "asking the device");
  return std::string(p.name) + " (" + std::to_string(p.major) + "." + std::to_string(p.minor) +
         ", " + std::to_string(p.multiProcessorCount) + " SMs)";
}

}  // namespace relay::cuda
