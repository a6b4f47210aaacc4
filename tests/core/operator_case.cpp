#include "core/operator_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <latch>
#include <limits>
#include <numeric>
#include <sstream>
#include <thread>

#include "core/numeric.h"
#include "core/test_env.h"

namespace relay::test {
namespace {

constexpr unsigned char kNanByte = 0xff;  // all ones is NaN in f32, f16 and bf16
constexpr unsigned char kGuardByte = 0xa5;
constexpr int64_t kMargin = 256;  // bytes around tensors, more than any vector register

std::string name(const HeadShape& shape) {
  std::ostringstream text;
  text << shape.q_heads << "/" << shape.kv_heads << " heads of " << shape.qk_dim << "/"
       << shape.v_dim;
  return text.str();
}

/// The first multiple of 64 in `buffer` at least kMargin in, plus `shift`.
template <typename T>
int64_t aligned_base(const std::vector<T>& buffer, int64_t shift) {
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  const uintptr_t aligned = (address + kMargin + 63) / 64 * 64;
  return static_cast<int64_t>(aligned - address) + shift;
}

/// Strides of a Q or output tensor; extent is the bytes it spans.
struct RowsGeometry {
  int64_t row_stride, head_stride, rows_per_block, block_stride, extent, shift;
};

RowsGeometry rows_geometry(RowsLayout layout, DType type, int64_t rows, int32_t heads, int64_t dim,
                           int64_t rows_per_block) {
  const int64_t element = element_alignment(type);
  const int64_t vector = dim * element;
  RowsGeometry g{.row_stride = vector * heads,
                 .head_stride = vector,
                 .rows_per_block = INT64_MAX,
                 .block_stride = 0,
                 .extent = vector * heads * rows,
                 .shift = 0};
  if (layout == RowsLayout::kHeadMajor) {
    g.row_stride = vector;
    g.head_stride = vector * rows + 3 * element;
    g.extent = g.head_stride * heads;
  } else if (layout == RowsLayout::kBlocked) {
    g.head_stride = vector + element;
    g.row_stride = g.head_stride * heads + 5 * element;
    g.rows_per_block = rows_per_block;
    g.block_stride = g.row_stride * rows_per_block + 7 * element;
    g.extent = g.block_stride * ((rows + rows_per_block - 1) / rows_per_block);
    g.shift = element;
  }
  return g;
}

}  // namespace

std::string OperatorConfig::describe() const {
  std::ostringstream text;
  text << name(shape) << ", k " << to_string(k_type) << ", v " << to_string(v_type) << ", q "
       << to_string(q_type) << ", out " << to_string(out_type) << ", placement "
       << static_cast<int>(placement) << ", q layout " << static_cast<int>(q_layout)
       << ", out layout " << static_cast<int>(out_layout) << ", sharpness " << sharpness
       << ", softcap " << softcap << (slopes ? ", slopes" : "") << (sinks ? ", sinks" : "")
       << (lse ? "" : ", no lse");
  return text.str();
}

OperatorConfig random_config(Random& random) {
  struct Dims {
    int32_t qk, v;
  };
  static const std::vector<Dims> kDims = {
      {32, 32},   {40, 40},   {64, 64},   {64, 64},   {65, 67},   {67, 65},   {72, 72},
      {80, 80},   {96, 96},   {112, 112}, {128, 128}, {128, 128}, {192, 128}, {256, 256},
      {320, 256}, {576, 512}, {64, 128},  {128, 64},  {160, 160}, {32, 576},  {36, 33},
  };
  static const std::vector<int32_t> kGroups = {1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 32};
  OperatorConfig c;
  const Dims dims = random.pick(kDims);
  const int32_t group = random.pick(kGroups);
  const int32_t kv_heads =
      static_cast<int32_t>(random.log_between(1, std::max<int64_t>(1, 512 / dims.qk / group)));
  c.shape = {.q_heads = group * kv_heads, .kv_heads = kv_heads, .qk_dim = dims.qk, .v_dim = dims.v};

  const auto kv_type = [&](int64_t dim) {
    std::vector<DType> types = {DType::kF32,  DType::kF16,  DType::kF16,
                                DType::kBF16, DType::kBF16, DType::kCustom};
    if (dim % 32 == 0) types.insert(types.end(), {DType::kQ8_0, DType::kQ8_0});
    return random.pick(types);
  };
  const std::vector<DType> plain = {DType::kF32, DType::kF16, DType::kBF16};
  c.k_type = kv_type(dims.qk);
  const bool v_like_k = c.k_type != DType::kQ8_0 || dims.v % 32 == 0;
  c.v_type = v_like_k && random.chance(0.7) ? c.k_type : kv_type(dims.v);
  c.q_type = random.pick(plain);
  c.out_type = random.pick(plain);
  c.placement = random.pick(std::vector<Placement>{Placement::kSlotMajor, Placement::kHeadMajor,
                                                   Placement::kBlockMajor, Placement::kInterleaved,
                                                   Placement::kPadded, Placement::kPadded});
  // An interleaved cache of mixed types would need padding between K and V to align the wider one.
  if (c.placement == Placement::kInterleaved && c.k_type != c.v_type) {
    c.placement = Placement::kPadded;
  }
  const std::vector<RowsLayout> rows = {RowsLayout::kDense, RowsLayout::kHeadMajor,
                                        RowsLayout::kBlocked};
  c.q_layout = random.pick(rows);
  c.out_layout = random.pick(rows);
  c.rows_per_block = random.between(1, 9);
  c.sharpness = random.pick(std::vector<float>{0.0f, 0.5f, 1.0f, 1.0f, 2.0f, 4.0f});
  c.softcap = random.chance(0.25) ? random.pick(std::vector<float>{1.0f, 5.0f, 30.0f, 50.0f}) : 0;
  c.slopes = random.chance(0.25);
  c.sinks = random.chance(0.25);
  c.lse = random.chance(0.8);
  return c;
}

// --- KV ------------------------------------------------------------------------------------------

KvTensor::KvTensor(DType type, int32_t heads, int64_t dim, int64_t slots)
    : type_(type),
      heads_(heads),
      dim_(dim),
      values_(slots * heads * dim, std::numeric_limits<float>::quiet_NaN()) {
  plane_.type = type;
  plane_.unpack = type == DType::kCustom ? unpack_custom : nullptr;
}

unsigned char* KvTensor::vector(int64_t slot, int64_t head) {
  return const_cast<unsigned char*>(plane_.at(block_size_, slot, head));
}

void KvTensor::set(int64_t slot, int64_t head, std::span<const float> values) {
  unsigned char* to = vector(slot, head);
  encode(type_, values, to);
  float* copy = values_.data() + (slot * heads_ + head) * dim_;
  if (type_ == DType::kCustom) {
    unpack_custom(to, copy, dim_);
  } else {
    for (int64_t i = 0; i < dim_; ++i) copy[i] = static_cast<float>(decode_element(type_, to, i));
  }
}

void KvTensor::poison(int64_t slot, int64_t head) {
  std::memset(vector(slot, head), kNanByte, vector_bytes(type_, dim_));
  std::fill_n(values_.data() + (slot * heads_ + head) * dim_, dim_,
              std::numeric_limits<float>::quiet_NaN());
}

std::span<const float> KvTensor::decoded(int64_t slot, int64_t head) const {
  return {values_.data() + (slot * heads_ + head) * dim_, static_cast<size_t>(dim_)};
}

KvPlane KvTensor::oracle_plane() const {
  const int64_t vector = dim_ * static_cast<int64_t>(sizeof(float));
  return {.type = DType::kF32,
          .data = values_.data(),
          .block_stride = 0,
          .slot_stride = vector * heads_,
          .head_stride = vector,
          .unpack = nullptr};
}

KvStorage::KvStorage(const OperatorConfig& config, int64_t block_size, int64_t blocks)
    : k(config.k_type, config.shape.kv_heads, config.shape.qk_dim, block_size * blocks),
      v(config.v_type, config.shape.kv_heads, config.shape.v_dim, block_size * blocks),
      block_size_(block_size) {
  const int64_t heads = config.shape.kv_heads;
  int64_t extent[2] = {0, 0};
  int64_t shift[2] = {0, 0};
  KvTensor* tensors[2] = {&k, &v};
  for (int i = 0; i < 2; ++i) {
    KvTensor& t = *tensors[i];
    KvPlane& p = t.plane_;
    const int64_t element = element_alignment(t.type_);
    const int64_t bytes = vector_bytes(t.type_, t.dim_);
    switch (config.placement) {
      case Placement::kSlotMajor:
        p.head_stride = bytes;
        p.slot_stride = bytes * heads;
        p.block_stride = p.slot_stride * block_size;
        extent[i] = p.block_stride * blocks;
        break;
      case Placement::kHeadMajor:
        p.slot_stride = bytes;
        p.block_stride = bytes * block_size;
        p.head_stride = p.block_stride * blocks;
        extent[i] = p.head_stride * heads;
        break;
      case Placement::kBlockMajor:
        p.slot_stride = bytes;
        p.head_stride = bytes * block_size;
        p.block_stride = p.head_stride * heads;
        extent[i] = p.block_stride * blocks;
        break;
      case Placement::kInterleaved:
        p.slot_stride = vector_bytes(k.type_, k.dim_) + vector_bytes(v.type_, v.dim_);
        p.head_stride = p.slot_stride * block_size;
        p.block_stride = p.head_stride * heads;
        extent[i] = i == 0 ? p.block_stride * blocks : 0;
        break;
      case Placement::kPadded:
        p.head_stride = bytes + element;
        p.slot_stride = p.head_stride * heads + 3 * element;
        p.block_stride = p.slot_stride * block_size + 5 * element;
        extent[i] = p.block_stride * blocks;
        shift[i] = element;  // odd for q8_0, 2 bytes for f16 and bf16, 4 for f32
        break;
    }
    t.block_size_ = block_size;
  }

  const int64_t v_begin = (kMargin + extent[0] + 63) / 64 * 64 + kMargin;
  bytes_.assign(v_begin + extent[1] + 3 * kMargin, kNanByte);
  unsigned char* base = bytes_.data() + aligned_base(bytes_, 0);
  unsigned char* k_base = base + shift[0];
  k.plane_.data = k_base;
  v.plane_.data = config.placement == Placement::kInterleaved
                      ? k_base + vector_bytes(k.type_, k.dim_)
                      : base + v_begin - kMargin + shift[1];
}

KvCache KvStorage::cache() const {
  return {.k = k.plane(), .v = v.plane(), .block_size = block_size_};
}

KvCache KvStorage::oracle_cache() const {
  return {.k = k.oracle_plane(), .v = v.oracle_plane(), .block_size = INT64_MAX};
}

void KvStorage::fill(const std::vector<bool>& used, Random& random) {
  for (KvTensor* tensor : {&k, &v}) {
    std::vector<float> values(tensor->dim());
    for (size_t slot = 0; slot < used.size(); ++slot) {
      if (!used[slot]) continue;
      for (int32_t head = 0; head < tensor->heads(); ++head) {
        for (float& value : values) value = random.normal();
        tensor->set(static_cast<int64_t>(slot), head, values);
      }
    }
  }
}

// --- Q and the output ----------------------------------------------------------------------------

QueryTensor::QueryTensor(const OperatorConfig& config, int64_t rows, Random& random)
    : type_(config.q_type),
      heads_(config.shape.q_heads),
      dim_(config.shape.qk_dim),
      values_(rows * heads_ * dim_) {
  const RowsGeometry g =
      rows_geometry(config.q_layout, type_, rows, heads_, dim_, config.rows_per_block);
  bytes_.assign(g.extent + 3 * kMargin, kNanByte);
  view_ = {.type = type_,
           .data = bytes_.data() + aligned_base(bytes_, g.shift),
           .row_stride = g.row_stride,
           .head_stride = g.head_stride,
           .rows_per_block = g.rows_per_block,
           .block_stride = g.block_stride};
  std::vector<float> values(dim_);
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t head = 0; head < heads_; ++head) {
      for (float& value : values) value = random.normal();
      set(row, head, values);
    }
  }
}

void QueryTensor::set(int64_t row, int64_t head, std::span<const float> values) {
  void* to = const_cast<void*>(view_.at(row, head));
  encode(type_, values, to);
  float* copy = values_.data() + (row * heads_ + head) * dim_;
  for (int64_t i = 0; i < dim_; ++i) copy[i] = static_cast<float>(decode_element(type_, to, i));
}

ConstRows QueryTensor::oracle_view() const {
  const int64_t vector = dim_ * static_cast<int64_t>(sizeof(float));
  return {.type = DType::kF32,
          .data = values_.data(),
          .row_stride = vector * heads_,
          .head_stride = vector};
}

OutputTensor::OutputTensor(const OperatorConfig& config, int64_t rows)
    : type_(config.out_type),
      rows_(rows),
      heads_(config.shape.q_heads),
      dim_(config.shape.v_dim),
      with_lse_(config.lse) {
  const RowsGeometry g =
      rows_geometry(config.out_layout, type_, rows, heads_, dim_, config.rows_per_block);
  bytes_.resize(g.extent + 3 * kMargin);
  base_ = aligned_base(bytes_, g.shift);
  view_ = {.type = type_,
           .data = bytes_.data() + base_,
           .row_stride = g.row_stride,
           .head_stride = g.head_stride,
           .rows_per_block = g.rows_per_block,
           .block_stride = g.block_stride};
  lse_.resize(rows * heads_ + 2 * kLseGuard);
  reset();
}

void OutputTensor::reset() {
  std::memset(bytes_.data(), kGuardByte, bytes_.size());
  std::memset(lse_.data(), kGuardByte, lse_.size() * sizeof(float));
}

int64_t OutputTensor::offset(int64_t row, int64_t head) const {
  return static_cast<const unsigned char*>(view_.at(row, head)) - bytes_.data();
}

double OutputTensor::out(int64_t row, int64_t head, int64_t j) const {
  return decode_element(type_, view_.at(row, head), j);
}

double OutputTensor::lse(int64_t row, int64_t head) const {
  return lse_[kLseGuard + row * heads_ + head];
}

std::string OutputTensor::broken_guards() const {
  std::vector<bool> written(bytes_.size());
  const int64_t vector = dim_ * element_alignment(type_);
  for (int64_t row = 0; row < rows_; ++row) {
    for (int32_t head = 0; head < heads_; ++head) {
      const auto begin = written.begin() + offset(row, head);
      std::fill(begin, begin + vector, true);
    }
  }
  std::ostringstream text;
  for (size_t i = 0; i < bytes_.size(); ++i) {
    if (!written[i] && bytes_[i] != kGuardByte) {
      text << "output byte " << static_cast<int64_t>(i) - base_ << " overwritten; ";
      break;
    }
  }
  const int64_t used = with_lse_ ? rows_ * heads_ : 0;
  for (int64_t i = 0; i < static_cast<int64_t>(lse_.size()); ++i) {
    if (i >= kLseGuard && i < kLseGuard + used) continue;
    unsigned char pattern[sizeof(float)];
    std::memcpy(pattern, &lse_[i], sizeof(float));
    if (std::any_of(pattern, pattern + sizeof(float), [](auto b) { return b != kGuardByte; })) {
      text << "lse element " << i - kLseGuard << " overwritten; ";
      break;
    }
  }
  return text.str();
}

std::vector<unsigned char> OutputTensor::bits() const {
  std::vector<unsigned char> result;
  const int64_t vector = dim_ * element_alignment(type_);
  for (int64_t row = 0; row < rows_; ++row) {
    for (int32_t head = 0; head < heads_; ++head) {
      const auto begin = bytes_.begin() + offset(row, head);
      result.insert(result.end(), begin, begin + vector);
    }
  }
  const auto* lse = reinterpret_cast<const unsigned char*>(lse_.data());
  result.insert(result.end(), lse, lse + lse_.size() * sizeof(float));
  return result;
}

// --- The whole -----------------------------------------------------------------------------------

namespace {

Random stream(uint64_t seed, uint64_t purpose) { return Random(derive_seed(seed, purpose)); }

QueryTensor make_query(const OperatorConfig& config, int64_t rows, uint64_t seed) {
  Random random = stream(seed, 0x51);
  return QueryTensor(config, rows, random);
}

}  // namespace

OperatorCase::OperatorCase(const OperatorConfig& config_, int64_t rows_, int64_t block_size,
                           int64_t blocks, const std::vector<bool>& used, uint64_t seed)
    : config(config_),
      rows(rows_),
      kv(config, block_size, blocks),
      q(make_query(config, rows, seed)),
      out(config, rows) {
  Random random = stream(seed, 0x52);
  kv.fill(used, random);
  // q . k of independent elements of variance 1 has variance qk_dim.
  scale = config.sharpness / std::sqrt(static_cast<float>(config.shape.qk_dim));
  for (int32_t head = 0; head < config.shape.q_heads; ++head) {
    // ALiBi's slopes are 2^-1 to 2^-8; 0 (no bias for this head) happens too.
    slopes.push_back(
        random.chance(0.1) ? 0.0f : static_cast<float>(std::exp2(-1.0 - 7.0 * random.uniform())));
    sinks.push_back(2.0f * random.normal());
  }
}

PlanOptions OperatorCase::options(int32_t threads) const {
  return {
      .shape = config.shape, .k_type = config.k_type, .v_type = config.v_type, .threads = threads};
}

AttentionInputs OperatorCase::inputs(OutputTensor& output) const {
  AttentionInputs inputs;
  inputs.q = q.view();
  inputs.kv = kv.cache();
  inputs.out = output.view();
  inputs.scale = scale;
  inputs.softcap = config.softcap;
  inputs.window = window;
  inputs.slopes = config.slopes ? slopes.data() : nullptr;
  inputs.sinks = config.sinks ? sinks.data() : nullptr;
  inputs.bias = bias;
  inputs.lse = output.lse();
  return inputs;
}

AttentionInputs OperatorCase::oracle_inputs() const {
  AttentionInputs inputs;
  inputs.q = q.oracle_view();
  inputs.kv = kv.oracle_cache();
  inputs.scale = scale;
  inputs.softcap = config.softcap;
  inputs.slopes = config.slopes ? slopes.data() : nullptr;
  inputs.sinks = config.sinks ? sinks.data() : nullptr;
  inputs.bias = bias;
  return inputs;
}

void run_plan(const Plan& plan, const AttentionInputs& inputs, Workspace& workspace,
              int32_t threads, Threading threading, uint64_t seed) {
  if (threading == Threading::kReal) {
    std::latch start(threads);
    std::vector<std::thread> running;
    for (int32_t thread = 0; thread < threads; ++thread) {
      running.emplace_back([&, thread] {
        start.arrive_and_wait();
        attend(plan, inputs, workspace, thread);
      });
    }
    for (std::thread& thread : running) thread.join();
    return;
  }
  std::vector<int32_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  Random random(derive_seed(seed, 0x72));
  if (threading == Threading::kInRandomTurn) random.shuffle(order);
  for (int32_t thread : order) attend(plan, inputs, workspace, thread);
}

}  // namespace relay::test
