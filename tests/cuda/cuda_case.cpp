#include "cuda/cuda_case.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <sstream>
#include <thread>

#include "core/test_env.h"

namespace relay::test {
namespace {

constexpr unsigned char kNanByte = 0xff;  // all ones is NaN in f16, bf16 and e4m3
constexpr unsigned char kGuardByte = DeviceBuffer::kGuardByte;

int64_t kv_vector_bytes(const CudaConfig& config) {
  return (config.kv_type == DType::kF8E4M3 ? 1 : 2) * int64_t{config.shape.qk_dim};
}

const char* short_name(DType type) {
  if (type == DType::kF16) return "f16";
  if (type == DType::kBF16) return "bf16";
  return "e4m3";
}

const char* text_of(CachePlacement placement) {
  switch (placement) {
    case CachePlacement::kBlockMajor:
      return "block-major";
    case CachePlacement::kSlotMajor:
      return "slot-major";
    case CachePlacement::kBlockPairs:
      return "block pairs";
    case CachePlacement::kHeadMajor:
      return "head-major";
    case CachePlacement::kInterleaved:
      return "interleaved";
    case CachePlacement::kPadded:
      return "padded";
  }
  return "?";
}

const char* text_of(RowsPlacement placement) {
  switch (placement) {
    case RowsPlacement::kDense:
      return "dense";
    case RowsPlacement::kHeadMajor:
      return "head-major";
    case RowsPlacement::kPadded:
      return "padded";
  }
  return "?";
}

int64_t blocks_of(const ForestCase& forest, const ForestCase::Request& request) {
  if (request.rows == 0) return 0;
  return (request.kv_length + forest.block_size - 1) / forest.block_size;
}

/// A cache of 8 bits on the host is f32, as the oracle reads it.
bool is_fp8(const CudaConfig& config) { return config.kv_type == DType::kF8E4M3; }

/// The nearest that fp8 can say with such a scale.
std::vector<float> on_grid(std::span<const float> values, float scale) {
  std::vector<float> nearest(values.size());
  std::ranges::transform(values, nearest.begin(),
                         [&](float x) { return from_e4m3(to_e4m3(x / scale)) * scale; });
  return nearest;
}

void put_on_grid(KvTensor& tensor, float scale, int64_t slots) {
  for (int64_t slot = 0; slot < slots; ++slot) {
    for (int32_t head = 0; head < tensor.heads(); ++head) {
      const std::span<const float> decoded = tensor.decoded(slot, head);
      if (!std::isnan(decoded[0])) tensor.set(slot, head, on_grid(decoded, scale));
    }
  }
}

/// A query as the oracle reads it.
std::span<const float> decoded_query(const OperatorCase& op, int64_t row, int64_t head) {
  return {static_cast<const float*>(op.q.oracle_view().at(row, head)),
          static_cast<size_t>(op.config.shape.qk_dim)};
}

/// Whether all bytes are the guard's.
bool untouched(const unsigned char* bytes, size_t count) {
  return count == 0 || (bytes[0] == kGuardByte && std::memcmp(bytes, bytes + 1, count - 1) == 0);
}

}  // namespace

// --- fp8 e4m3 ------------------------------------------------------------------------------------

uint8_t to_e4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return sign | 0x7f;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 448.0) return sign | 0x7e;
  // One unit in the last place is 2^(e-3), and 2^-9 for subnormals; nearbyint ties to even.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent - 1, -6);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  // `units` has the implicit bit at 8 (absent for subnormals); a carry moves into the exponent.
  const int bits = units >= 8 ? ((exponent + 7) << 3) + (units - 8) : units;
  return static_cast<uint8_t>(sign | std::min(bits, 0x7e));
}

float from_e4m3(uint8_t bits) {
  const float sign = (bits & 0x80) ? -1.0f : 1.0f;
  const int exponent = bits >> 3 & 15;
  const int mantissa = bits & 7;
  if ((bits & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -9);
  return sign * std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
}

// --- Cases ---------------------------------------------------------------------------------------

std::string CudaConfig::describe() const {
  std::ostringstream text;
  text << shape.q_heads << "/" << shape.kv_heads << " heads of " << shape.qk_dim << ", "
       << short_name(type) << " over " << short_name(kv_type) << ", cache " << text_of(cache)
       << ", q " << text_of(q_rows) << ", out " << text_of(out_rows) << ", sharpness " << sharpness
       << ", softcap " << softcap << (slopes ? ", slopes" : "") << (sinks ? ", sinks" : "")
       << (lse ? "" : ", no lse") << ", scales " << q_scale << ", " << k_scale << " and " << v_scale
       << ", slack " << slack << (check ? ", checked" : "");
  return text.str();
}

CudaConfig config_of(DType type, int32_t dim, int32_t kv_heads, int32_t group) {
  CudaConfig config;
  config.shape = {.q_heads = kv_heads * group, .kv_heads = kv_heads, .qk_dim = dim, .v_dim = dim};
  config.type = config.kv_type = type;
  return config;
}

CudaConfig fp8_config_of(DType type, int32_t dim, int32_t kv_heads, int32_t group) {
  CudaConfig config = config_of(type, dim, kv_heads, group);
  config.kv_type = DType::kF8E4M3;
  // Few significant bits: products with e4m3 are exact in f32, so the oracle reads true values.
  config.k_scale = 19 * 0x1p-10f;
  config.v_scale = 11 * 0x1p-9f;
  return config;
}

CudaConfig random_cuda_config(Random& random) {
  const int32_t dim = random.pick(std::vector<int32_t>{64, 64, 80, 96, 128, 128, 192, 256});
  const int32_t group = random.pick(std::vector<int32_t>{1, 1, 2, 3, 4, 4, 5, 7, 8, 16});
  const int32_t kv_heads =
      static_cast<int32_t>(random.log_between(1, std::max(1, 1024 / dim / group)));
  const DType type = random.chance(0.5) ? DType::kBF16 : DType::kF16;
  CudaConfig c = random.chance(0.2) ? fp8_config_of(type, dim, kv_heads, group)
                                    : config_of(type, dim, kv_heads, group);
  if (is_fp8(c) && random.chance(0.5)) c.q_scale = kQueryScale;
  c.cache = random.pick(kCachePlacements);
  c.q_rows = random.pick(kRowsPlacements);
  c.out_rows = random.pick(kRowsPlacements);
  c.sharpness = random.pick(std::vector<float>{0.0f, 0.5f, 1.0f, 1.0f, 2.0f, 4.0f});
  c.softcap = random.chance(0.25) ? random.pick(std::vector<float>{1.0f, 5.0f, 30.0f, 50.0f}) : 0;
  c.slopes = random.chance(0.25);
  c.sinks = random.chance(0.25);
  c.lse = random.chance(0.8);
  c.slack = random.chance(0.5) ? 0 : static_cast<int32_t>(random.between(1, 9));
  c.check = random.chance(0.3);
  return c;
}

std::vector<int32_t> TableWriter::blocks(int64_t count) {
  std::vector<int32_t> result(count);
  std::iota(result.begin(), result.end(), next_);
  next_ += static_cast<int32_t>(count);
  return result;
}

void TableWriter::table(const std::vector<int32_t>& table, int64_t kv_length, int32_t rows) {
  requests_.push_back({table, kv_length, rows});
}

void TableWriter::request(const std::vector<int32_t>& shared, int64_t own, int32_t rows) {
  std::vector<int32_t> all = shared;
  const std::vector<int32_t> fresh = blocks((own + block_size_ - 1) / block_size_);
  all.insert(all.end(), fresh.begin(), fresh.end());
  table(all, static_cast<int64_t>(shared.size()) * block_size_ + own, rows);
}

void TableWriter::padding(int32_t count) {
  for (int32_t i = 0; i < count; ++i) requests_.push_back({{}, 0, 0});
}

ForestCase TableWriter::finish(bool causal, int64_t window) {
  Random random(derive_seed(seed_, 0x7ab));
  std::vector<int32_t> dealt(next_ + 1 + random.between(0, 3));
  std::iota(dealt.begin(), dealt.end(), 0);
  random.shuffle(dealt);

  ForestCase c;
  c.seed = seed_;
  c.block_size = block_size_;
  c.blocks = static_cast<int64_t>(dealt.size());
  c.causal = causal;
  c.window = window;
  c.tables_possible = true;
  for (const Request& request : requests_) {
    if (request.rows == 0) {
      c.requests.push_back({.node = -1, .kv_length = 0, .rows = 0});
      continue;
    }
    ForestCase::Node node;
    for (int64_t t = 0; t < request.kv_length; ++t) {
      const int64_t block = dealt.at(request.table.at(t / block_size_));
      node.slots.push_back(block * block_size_ + t % block_size_);
    }
    c.requests.push_back({.node = static_cast<int32_t>(c.nodes.size()),
                          .kv_length = request.kv_length,
                          .rows = request.rows});
    c.nodes.push_back(std::move(node));
  }
  c.index_rows();
  return c;
}

ForestCase generate_tables(uint64_t seed, ForestLimits limits) {
  limits.tables_possible = true;
  ForestCase c;
  for (uint64_t draw = 0; c.block_size % 16 != 0; ++draw) {
    c = generate_forest(derive_seed(seed, 0x6000 + draw), limits);
  }
  c.seed = seed;
  Random random(derive_seed(seed, 0x6f));
  if (random.chance(0.3)) {
    for (int64_t count = random.between(1, 4); count > 0; --count) {
      const int64_t at = random.between(0, static_cast<int64_t>(c.requests.size()));
      c.requests.insert(c.requests.begin() + at, {.node = -1, .kv_length = 0, .rows = 0});
    }
    c.index_rows();
  }
  return c;
}

std::unique_ptr<OperatorCase> make_operator(const CudaConfig& config, const ForestCase& forest,
                                            const std::function<void(OperatorCase&)>& edit) {
  OperatorConfig host;
  host.shape = config.shape;
  host.k_type = host.v_type = is_fp8(config) ? DType::kF32 : config.kv_type;
  host.q_type = host.out_type = config.type;
  host.sharpness = config.sharpness;
  host.softcap = config.softcap;
  host.slopes = config.slopes;
  host.sinks = config.sinks;
  host.lse = config.lse;
  auto op = std::make_unique<OperatorCase>(host, forest.rows(), forest.block_size, forest.blocks,
                                           forest.used_slots(), forest.seed);
  if (edit) edit(*op);
  if (is_fp8(config)) {
    put_on_grid(op->kv.k, config.k_scale, forest.slots());
    put_on_grid(op->kv.v, config.v_scale, forest.slots());
  }
  for (int64_t row = 0; config.q_scale != 0.0f && row < op->rows; ++row) {
    for (int64_t head = 0; head < config.shape.q_heads; ++head) {
      op->q.set(row, head, on_grid(decoded_query(*op, row, head), config.q_scale));
    }
  }
  return op;
}

Arithmetic arithmetic_on_gpu(const CudaConfig& config) {
  Arithmetic a;
  a.query_rounding = (config.shape.qk_dim + 8) * 0x1p-23;
  a.weight_rounding = unit_roundoff(config.type);
  return a;
}

std::vector<cuda::Path> kernel_paths() {
  const char* only = std::getenv("RELAY_CUDA_PATH");
  const std::string name = only ? only : "";
  std::vector<cuda::Path> paths;
  if (name.empty() || name == "mma") paths.push_back(cuda::Path::kMma);
  if ((name.empty() || name == "wgmma") && compute_capability() / 10 == 9) {
    paths.push_back(cuda::Path::kWgmma);
  }
  return paths;
}

const char* name_of(cuda::Path path) {
  switch (path) {
    case cuda::Path::kAuto:
      return "auto";
    case cuda::Path::kMma:
      return "mma";
    case cuda::Path::kWgmma:
      return "wgmma";
  }
  return "?";
}

// --- Batches -------------------------------------------------------------------------------------

BatchLimits limits_of(const ForestCase& forest, int32_t slack) {
  int64_t blocks = 1;
  for (const ForestCase::Request& request : forest.requests) {
    blocks = std::max(blocks, blocks_of(forest, request));
  }
  const int32_t requests = static_cast<int32_t>(forest.requests.size());
  return {.requests = std::min(std::max(1, requests) + slack, cuda::kMaxRequests),
          .rows = std::max(1, forest.rows()) + slack,
          .blocks = static_cast<int32_t>(blocks) + slack,
          .cache_blocks = static_cast<int32_t>(forest.blocks) + slack,
          .block_size = static_cast<int32_t>(forest.block_size)};
}

BatchLimits larger(const BatchLimits& a, const BatchLimits& b) {
  return {.requests = std::max(a.requests, b.requests),
          .rows = std::max(a.rows, b.rows),
          .blocks = std::max(a.blocks, b.blocks),
          .cache_blocks = std::max(a.cache_blocks, b.cache_blocks),
          .block_size = a.block_size};
}

HostBatch host_batch(const ForestCase& forest, const BatchLimits& limits, int32_t requests,
                     uint64_t seed) {
  Random random(derive_seed(seed, 0xba));
  const auto garbage = [&] {
    return random.pick(std::vector<int32_t>{-1, std::numeric_limits<int32_t>::max(),
                                            std::numeric_limits<int32_t>::min(), 0,
                                            limits.cache_blocks});
  };
  HostBatch batch;
  batch.requests = requests;
  batch.table_stride = limits.blocks + random.between(0, 3);
  batch.query_starts = {0};
  batch.table.resize(requests * batch.table_stride);
  for (int32_t& entry : batch.table) entry = garbage();
  for (int32_t i = 0; i < requests; ++i) {
    const bool padding =
        i >= static_cast<int32_t>(forest.requests.size()) || forest.requests[i].rows == 0;
    batch.query_starts.push_back(batch.query_starts.back() +
                                 (padding ? 0 : forest.requests[i].rows));
    if (padding) {
      batch.kv_lengths.push_back(garbage());
      continue;
    }
    batch.kv_lengths.push_back(static_cast<int32_t>(forest.requests[i].kv_length));
    const std::vector<int64_t> slots = forest.path(forest.requests[i]);
    for (size_t t = 0; t < slots.size(); t += forest.block_size) {
      batch.table[i * batch.table_stride + t / forest.block_size] =
          static_cast<int32_t>(slots[t] / forest.block_size);
    }
  }
  return batch;
}

HostBatch decoy_batch(const BatchLimits& limits, int32_t requests, uint64_t seed) {
  Random random(derive_seed(seed, 0xdec));
  HostBatch batch;
  batch.requests = requests;
  batch.table_stride = limits.blocks + random.between(0, 3);
  batch.query_starts = {0};
  const int32_t rows = std::min(requests, limits.rows);
  for (int32_t i = 0; i < requests; ++i) {
    batch.query_starts.push_back(std::min(i + 1, rows));
    batch.kv_lengths.push_back(
        static_cast<int32_t>(random.between(1, int64_t{limits.blocks} * limits.block_size)));
    // Half of them share the beginning of one table.
    const bool shares = i > 0 && random.chance(0.5);
    const int64_t shared = shares ? random.between(0, batch.table_stride) : 0;
    for (int64_t column = 0; column < batch.table_stride; ++column) {
      batch.table.push_back(column < shared
                                ? batch.table[column]
                                : static_cast<int32_t>(random.between(0, limits.cache_blocks - 1)));
    }
  }
  return batch;
}

// --- Device --------------------------------------------------------------------------------------

DeviceOperator::Geometry DeviceOperator::geometry(RowsPlacement placement, int64_t vector,
                                                  int64_t heads, int64_t rows) {
  switch (placement) {
    case RowsPlacement::kDense:
      break;
    case RowsPlacement::kHeadMajor: {
      const int64_t head = vector * rows + 16;
      return {.row = vector, .head = head, .extent = head * heads};
    }
    case RowsPlacement::kPadded: {
      const int64_t row = (vector + 16) * heads + 48;
      return {.row = row, .head = vector + 16, .extent = row * rows};
    }
  }
  return {.row = vector * heads, .head = vector, .extent = vector * heads * rows};
}

namespace {

struct CacheGeometry {
  int64_t block, slot, head, v_offset, extent;
};

CacheGeometry cache_geometry(const CudaConfig& config, const BatchLimits& limits) {
  const int64_t vector = kv_vector_bytes(config);
  const int64_t heads = config.shape.kv_heads;
  const int64_t size = limits.block_size;
  const int64_t blocks = limits.cache_blocks;
  const int64_t plane = vector * heads * size * blocks;
  switch (config.cache) {
    case CachePlacement::kBlockMajor:
      return {vector * size * heads, vector, vector * size, plane, 2 * plane};
    case CachePlacement::kSlotMajor:
      return {vector * heads * size, vector * heads, vector, plane, 2 * plane};
    case CachePlacement::kBlockPairs:
      return {2 * vector * heads * size, vector * heads, vector, vector * heads * size, 2 * plane};
    case CachePlacement::kHeadMajor:
      return {vector * size, vector, vector * size * blocks, plane, 2 * plane};
    case CachePlacement::kInterleaved:
      return {2 * vector * size * heads, 2 * vector, 2 * vector * size, vector, 2 * plane};
    case CachePlacement::kPadded: {
      const int64_t slot = (vector + 16) * heads + 48;
      const int64_t block = slot * size + 80;
      return {block, slot, vector + 16, block * blocks, 2 * block * blocks};
    }
  }
  return {};
}

template <typename T>
size_t bytes_of(int64_t count) {
  return static_cast<size_t>(count) * sizeof(T);
}

}  // namespace

// The table is as large as any batch within the limits may ask for (see table_stride above).
DeviceOperator::DeviceOperator(const CudaConfig& config, const BatchLimits& limits)
    : config_(config),
      limits_(limits),
      table_stride_(limits.blocks + 3),
      q_geometry_(geometry(config.q_rows, query_bytes(), config.shape.q_heads, limits.rows)),
      out_geometry_(geometry(config.out_rows, vector_bytes(), config.shape.q_heads, limits.rows)),
      kv_(cache_geometry(config, limits).extent),
      q_(q_geometry_.extent),
      out_(out_geometry_.extent, kGuardByte),
      lse_(bytes_of<float>(int64_t{limits.rows} * config.shape.q_heads), kGuardByte),
      slopes_(bytes_of<float>(config.shape.q_heads)),
      sinks_(bytes_of<float>(config.shape.q_heads)),
      scales_(bytes_of<float>(3)),
      query_starts_(bytes_of<int32_t>(limits.requests + 1)),
      kv_lengths_(bytes_of<int32_t>(limits.requests)),
      table_(bytes_of<int32_t>(limits.requests * table_stride_)) {
  const CacheGeometry g = cache_geometry(config, limits);
  kv_block_ = g.block;
  kv_slot_ = g.slot;
  kv_head_ = g.head;
  v_offset_ = g.v_offset;
}

void DeviceOperator::upload(const OperatorCase& op, const ForestCase& forest) {
  const int64_t vector = kv_vector_bytes(config_);
  const int64_t size = limits_.block_size;
  kv_bytes_.assign(kv_.bytes(), kNanByte);
  for (const bool is_v : {false, true}) {
    const KvTensor& tensor = is_v ? op.kv.v : op.kv.k;
    const float scale = is_v ? config_.v_scale : config_.k_scale;
    const KvPlane& plane = tensor.plane();
    for (int64_t slot = 0; slot < forest.slots(); ++slot) {
      for (int64_t head = 0; head < config_.shape.kv_heads; ++head) {
        unsigned char* to = kv_bytes_.data() + (is_v ? v_offset_ : 0) + slot / size * kv_block_ +
                            slot % size * kv_slot_ + head * kv_head_;
        if (is_fp8(config_)) {
          const std::span<const float> values = tensor.decoded(slot, head);
          if (std::isnan(values[0])) continue;
          for (int64_t i = 0; i < vector; ++i) to[i] = to_e4m3(values[i] / scale);
        } else {
          std::memcpy(to, plane.at(size, slot, head), vector);
        }
      }
    }
  }
  kv_.upload<unsigned char>(kv_bytes_);

  q_bytes_.assign(q_.bytes(), kNanByte);
  const ConstRows q = op.q.view();
  for (int64_t row = 0; row < op.rows; ++row) {
    for (int64_t head = 0; head < config_.shape.q_heads; ++head) {
      unsigned char* to = q_bytes_.data() + row * q_geometry_.row + head * q_geometry_.head;
      if (config_.q_scale != 0.0f) {
        std::ranges::transform(decoded_query(op, row, head), to,
                               [&](float x) { return to_e4m3(x / config_.q_scale); });
      } else {
        std::memcpy(to, q.at(row, head), vector_bytes());
      }
    }
  }
  q_.upload<unsigned char>(q_bytes_);
  slopes_.upload<float>(op.slopes);
  sinks_.upload<float>(op.sinks);
  scales_.upload<float>(std::vector<float>{config_.k_scale, config_.v_scale, config_.q_scale});
  scale_ = op.scale;
}

void DeviceOperator::upload(const HostBatch& batch) {
  query_starts_.upload<int32_t>(batch.query_starts);
  kv_lengths_.upload<int32_t>(batch.kv_lengths);
  // The stride is baked into a captured graph, so every batch is laid out with the same one.
  std::vector<int32_t> table(batch.requests * table_stride_, -1);
  for (int64_t i = 0; i < batch.requests; ++i) {
    std::copy_n(batch.table.begin() + i * batch.table_stride, batch.table_stride,
                table.begin() + i * table_stride_);
  }
  table_.upload<int32_t>(table);
  batch_ = batch;
  batch_.table = std::move(table);
  batch_.table_stride = table_stride_;
}

void DeviceOperator::reset_output() {
  out_.fill(kGuardByte);
  lse_.fill(kGuardByte);
}

cuda::PlanOptions DeviceOperator::options(cuda::Path path, Sharing sharing, bool causal,
                                          int64_t window) const {
  return {.shape = config_.shape,
          .q_type = config_.type,
          .kv_type = config_.kv_type,
          .max_requests = limits_.requests,
          .max_rows = limits_.rows,
          .max_blocks = limits_.blocks,
          .block_size = limits_.block_size,
          .cache_blocks = limits_.cache_blocks,
          .causal = causal,
          .window = static_cast<int32_t>(window),
          .sharing = sharing,
          .check = config_.check,
          .path = path,
          .min_shared_slots = 64};  // small as they are, they are to share
}

cuda::Batch DeviceOperator::batch() const {
  return {.requests = batch_.requests,
          .query_starts = query_starts_.as<int32_t>(),
          .kv_lengths = kv_lengths_.as<int32_t>(),
          .table = table_.as<int32_t>(),
          .table_stride = table_stride_};
}

cuda::Inputs DeviceOperator::inputs() const {
  cuda::Inputs in;
  in.q = q_.data();
  in.q_row_stride = q_geometry_.row;
  in.q_head_stride = q_geometry_.head;
  in.out = out_.data();
  in.out_row_stride = out_geometry_.row;
  in.out_head_stride = out_geometry_.head;
  in.k = kv_.data();
  in.v = kv_.as<unsigned char>() + v_offset_;
  in.k_block_stride = in.v_block_stride = kv_block_;
  in.k_slot_stride = in.v_slot_stride = kv_slot_;
  in.k_head_stride = in.v_head_stride = kv_head_;
  in.scale = scale_;
  in.softcap = config_.softcap;
  in.slopes = config_.slopes ? slopes_.as<float>() : nullptr;
  in.sinks = config_.sinks ? sinks_.as<float>() : nullptr;
  if (is_fp8(config_)) {
    in.k_scale = config_.k_scale == 1.0f ? nullptr : scales_.as<float>();
    in.v_scale = config_.v_scale == 1.0f ? nullptr : scales_.as<float>() + 1;
    in.q_scale = config_.q_scale == 0.0f ? nullptr : scales_.as<float>() + 2;
  }
  in.lse = config_.lse ? lse_.as<float>() : nullptr;
  return in;
}

std::string DeviceOperator::download(OutputTensor& out, int32_t rows) const {
  std::ostringstream report;
  std::vector<unsigned char> bytes = out_.download();
  std::vector<unsigned char> lse = lse_.download();
  const MutableRows view = out.view();
  const int64_t vector = vector_bytes();
  const int64_t heads = config_.shape.q_heads;
  int64_t missing = 0;
  const auto miss = [&](const char* what, int64_t row, int64_t head) {
    if (missing++ == 0)
      report << what << " of row " << row << ", head " << head << " not written; ";
  };
  out.reset();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      // What has been taken out is made to look untouched: the rest has to be.
      unsigned char* from = bytes.data() + row * out_geometry_.row + head * out_geometry_.head;
      std::memcpy(view.at(row, head), from, vector);
      if (untouched(from, vector)) miss("output", row, head);
      std::memset(from, kGuardByte, vector);
      if (!config_.lse) continue;
      unsigned char* from_lse = lse.data() + (row * heads + head) * sizeof(float);
      std::memcpy(out.lse() + row * heads + head, from_lse, sizeof(float));
      if (untouched(from_lse, sizeof(float))) miss("lse", row, head);
      std::memset(from_lse, kGuardByte, sizeof(float));
    }
  }
  if (missing > 1) report << "and " << missing - 1 << " more; ";
  const auto written = [&](const std::vector<unsigned char>& rest, const char* name) {
    if (untouched(rest.data(), rest.size())) return;
    const auto at = std::find_if(rest.begin(), rest.end(),
                                 [](unsigned char byte) { return byte != kGuardByte; });
    report << name << " byte " << at - rest.begin()
           << " overwritten, behind the rows or in a gap; ";
  };
  written(bytes, "output");
  written(lse, "lse");
  report << out_.broken_guards("output") << lse_.broken_guards("lse");
  return report.str();
}

std::string DeviceOperator::changed_inputs() const {
  std::string report;
  const auto same = [&](const DeviceBuffer& buffer, const void* expected, size_t bytes,
                        const std::string& name) {
    const std::vector<unsigned char> now = buffer.download();
    if (bytes > 0 && std::memcmp(now.data(), expected, bytes) != 0) report += name + " changed; ";
    report += buffer.broken_guards(name);
  };
  same(kv_, kv_bytes_.data(), kv_bytes_.size(), "the cache");
  same(q_, q_bytes_.data(), q_bytes_.size(), "q");
  same(query_starts_, batch_.query_starts.data(), batch_.query_starts.size() * sizeof(int32_t),
       "query_starts");
  same(kv_lengths_, batch_.kv_lengths.data(), batch_.kv_lengths.size() * sizeof(int32_t),
       "kv_lengths");
  same(table_, batch_.table.data(), batch_.table.size() * sizeof(int32_t), "table");
  return report + slopes_.broken_guards("slopes") + sinks_.broken_guards("sinks") +
         scales_.broken_guards("scales");
}

DevicePlan::DevicePlan(const cuda::PlanOptions& options, const DeviceStream& stream)
    : memory_(cuda::workspace_bytes(options), kNanByte),
      plan_(cuda::make_plan(options, memory_.data(), memory_.bytes(), stream.get())) {}

std::string disagreement(const OperatorConfig& config, const OutputTensor& a, const OutputTensor& b,
                         int32_t rows, const std::vector<bool>& which) {
  // Weights and outputs that are rounded to 8 bits move a vector by about 2^-8 of itself; one slot
  // too many or too few of 300 alike moves it by 2^-4.
  constexpr double kRelative = 0.04;
  const double floor = 4 * smallest_step(config.out_type);
  for (int64_t row = 0; row < rows; ++row) {
    if (!which.empty() && !which[row]) continue;
    for (int64_t head = 0; head < config.shape.q_heads; ++head) {
      double difference = 0, size = 0;
      for (int64_t j = 0; j < config.shape.v_dim; ++j) {
        const double x = a.out(row, head, j), y = b.out(row, head, j);
        difference += (x - y) * (x - y);
        size += x * x;
      }
      const double allowed =
          std::max(kRelative * std::sqrt(size), floor * std::sqrt(config.shape.v_dim));
      if (!(std::sqrt(difference) <= allowed)) {
        std::ostringstream text;
        text << "row " << row << ", head " << head << " differs by " << std::sqrt(difference)
             << ", of a vector of length " << std::sqrt(size);
        return text.str();
      }
    }
  }
  return "";
}

// --- Running -------------------------------------------------------------------------------------

namespace {

/// One path with or without sharing. The first variant's output is what all others agree with.
class Variant {
 public:
  Variant(const CudaCase& test, const OperatorCase& op, const Oracle& oracle,
          DeviceOperator& device, const DeviceStream& stream, const BatchLimits& limits)
      : test_(test),
        op_(op),
        oracle_(oracle),
        device_(device),
        stream_(stream),
        limits_(limits),
        rows_(test.forest.rows()),
        requests_(static_cast<int32_t>(test.forest.requests.size())) {}

  /// Empty, or what went wrong. `output` is what it computed.
  std::string run(cuda::Path path, Sharing sharing, OutputTensor& output) {
    const HostBatch batch = host_batch(test_.forest, limits_, requests_, test_.forest.seed);
    device_.upload(batch);
    const DevicePlan plan(device_.options(path, sharing, test_.forest.causal, test_.forest.window),
                          stream_);
    if (std::string(cuda::path_of(*plan)) != name_of(path)) {
      return std::string("path_of() says ") + cuda::path_of(*plan);
    }

    cuda::plan_batch(*plan, device_.batch(), stream_.get());
    std::string report = attend(plan, output, "first run");
    if (!report.empty()) return report;
    report = oracle_.compare(op_, output, arithmetic_on_gpu(test_.config), test_.statistics);
    if (!report.empty()) return report;
    report = check_summary(*plan, sharing);
    if (!report.empty()) return report;
    if (test_.config.check) cuda::check_batch(*plan, stream_.get());

    // The next layer, and the next step with the same batch: bit for bit the same.
    OutputTensor again(op_.config, rows_);
    report = repeat(plan, again, output, "second layer", [] {});
    if (!report.empty()) return report;
    report = repeat(plan, again, output, "second step",
                    [&] { cuda::plan_batch(*plan, device_.batch(), stream_.get()); });
    if (!report.empty()) return report;

    // A graph of another batch, which then gets this one's arrays in place.
    const HostBatch decoy = decoy_batch(limits_, requests_, test_.forest.seed);
    device_.upload(decoy);
    const DeviceGraph graph(stream_, [&] {
      cuda::plan_batch(*plan, device_.batch(), stream_.get());
      cuda::attend(*plan, device_.inputs(), stream_.get());
    });
    device_.reset_output();
    graph.launch(stream_);
    stream_.wait(describe("graph of another batch"));
    OutputTensor other(op_.config, std::max(1, limits_.rows));
    report = device_.download(other, decoy.rows());  // NaN, if it met any, is an answer too
    if (!report.empty()) return "graph of another batch: " + report;
    device_.upload(batch);
    device_.reset_output();
    graph.launch(stream_);
    stream_.wait(describe("graph"));
    report = device_.download(again, rows_);
    if (!report.empty()) return "graph: " + report;
    if (again.bits() != output.bits()) return "a graph computes something else";
    return plan.broken_guards();
  }

 private:
  std::string describe(const char* what) const {
    return test_.name + ": " + test_.config.describe() + ", " + test_.forest.describe() + ", " +
           what;
  }

  std::string attend(const DevicePlan& plan, OutputTensor& output, const char* what) {
    device_.reset_output();
    cuda::attend(*plan, device_.inputs(), stream_.get());
    stream_.wait(describe(what));
    const std::string report = device_.download(output, rows_);
    return report.empty() ? report : std::string(what) + ": " + report;
  }

  template <typename Before>
  std::string repeat(const DevicePlan& plan, OutputTensor& again, const OutputTensor& output,
                     const char* what, Before&& before) {
    before();
    const std::string report = attend(plan, again, what);
    if (!report.empty()) return report;
    return again.bits() == output.bits() ? "" : std::string(what) + ": other bits than the first";
  }

  std::string check_summary(const cuda::Plan& plan, Sharing sharing) const {
    const cuda::PlanSummary summary = cuda::summarize(plan, stream_.get());
    std::ostringstream report;
    const auto expect = [&](bool holds, const char* what) {
      if (!holds) {
        report << what << ": " << summary.kv_slots_read << " slots read, "
               << summary.kv_slots_attended << " attended, " << summary.segments << " segments, "
               << summary.shared_segments << " shared, " << summary.partial_rows
               << " partial rows of " << summary.partial_capacity << "; ";
      }
    };
    expect(summary.kv_slots_read <= summary.kv_slots_attended, "more is read than attended");
    expect(summary.partial_rows <= summary.partial_capacity,
           "partial states beyond their capacity");
    if (sharing == Sharing::kOff) expect(summary.shared_segments == 0, "sharing is off");
    if (test_.reads == Reads::kFewer && sharing == Sharing::kOn) {
      expect(summary.kv_slots_read < summary.kv_slots_attended, "nothing is shared");
      expect(summary.shared_segments > 0, "no segment is shared");
    }
    if (test_.reads != Reads::kOfForest) return report.str();

    Forest forest;
    build_from_tables(test_.forest, sharing, forest);
    expect(summary.kv_slots_attended == forest.slots_attended(), "another number is attended");
    expect(summary.kv_slots_read == forest.slots_read(), "another number is read");
    const bool shares = sharing == Sharing::kOn && forest.slots_read() < forest.slots_attended();
    expect((summary.shared_segments > 0) == shares, "segments are shared, or are not");
    if (!report.str().empty()) {
      report << "expected " << forest.slots_read() << " and " << forest.slots_attended() << "; ";
    }
    return report.str();
  }

  const CudaCase& test_;
  const OperatorCase& op_;
  const Oracle& oracle_;
  DeviceOperator& device_;
  const DeviceStream& stream_;
  const BatchLimits limits_;
  const int32_t rows_;
  const int32_t requests_;
};

std::string run_on_gpu(const CudaCase& test, const OperatorCase& op, const Oracle& oracle) {
  const BatchLimits limits = limits_of(test.forest, test.config.slack);
  const DeviceStream stream;
  DeviceOperator device(test.config, limits);
  device.upload(op, test.forest);
  const int32_t rows = test.forest.rows();
  OutputTensor first(op.config, rows), output(op.config, rows);
  bool is_first = true;
  for (const cuda::Path path : kernel_paths()) {
    for (const Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
      const std::string way =
          std::string(name_of(path)) + (sharing == Sharing::kOn ? ", shared: " : ", alone: ");
      std::string report;
      try {
        report = Variant(test, op, oracle, device, stream, limits)
                     .run(path, sharing, is_first ? first : output);
        if (report.empty() && !is_first && test.statistics) {
          report = disagreement(op.config, first, output, rows);
        }
        if (report.empty()) report = device.changed_inputs();
      } catch (const std::exception& e) {
        report = e.what();
      }
      if (!report.empty()) return way + report;
      is_first = false;
    }
  }
  return "";
}

}  // namespace

std::string run_case(const CudaCase& test) {
  std::string report;
  try {
    const std::unique_ptr<OperatorCase> op = make_operator(test.config, test.forest, test.edit);
    const Oracle oracle(*op, truth_of(test.forest), {arithmetic_on_gpu(test.config)},
                        test.forest.seed, test.budget);
    const std::lock_guard lock(gpu_mutex());
    report = run_on_gpu(test, *op, oracle);
  } catch (const std::exception& e) {
    report = e.what();
  }
  if (report.empty()) return "";
  return test.name + "\n  " + test.config.describe() + "\n  " + test.forest.describe() + "\n  " +
         report;
}

void parallel_for(size_t count, const std::function<void(size_t)>& f) {
  std::atomic<size_t> next{0};
  const size_t threads =
      std::min<size_t>(count, std::clamp(std::thread::hardware_concurrency(), 1u, 32u));
  std::vector<std::thread> running;
  for (size_t t = 0; t < threads; ++t) {
    running.emplace_back([&] {
      for (size_t i = next++; i < count; i = next++) f(i);
    });
  }
  for (std::thread& thread : running) thread.join();
}

std::vector<size_t> sampled(size_t count) {
  const auto wanted = static_cast<size_t>(std::llround(static_cast<double>(count) * scale()));
  const size_t taken = std::clamp(wanted, std::min<size_t>(2, count), count);
  std::vector<size_t> result;
  for (size_t i = 0; i < taken; ++i) result.push_back(i * count / taken);
  return result;
}

void run_cases(std::vector<CudaCase> cases) {
  constexpr size_t kMaxReports = 3;
  const std::vector<size_t> chosen = sampled(cases.size());
  std::mutex mutex;
  std::vector<std::string> reports;
  parallel_for(chosen.size(), [&](size_t i) {
    {
      const std::lock_guard lock(mutex);
      if (reports.size() >= kMaxReports) return;
    }
    std::string report = run_case(cases[chosen[i]]);
    cases[chosen[i]] = {};  // its memory
    if (report.empty()) return;
    const std::lock_guard lock(mutex);
    reports.push_back(std::move(report));
  });
  for (const std::string& report : reports) ADD_FAILURE() << report << "\n" << repeat_command();
}

}  // namespace relay::test
