#include "cpu/plan/calibrate.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>
#include <span>

#include "base/aligned_buffer.h"

namespace relay {
namespace {

using kernels::KernelSet;
using kernels::QueryLayout;
using kernels::Tile;

constexpr int kSmallDim = 64;
constexpr int kLargeDim = 128;
constexpr int kSomeRows = 16;  // more than few, and whole blocks of AMX
constexpr int kMostRows = 48;  // a multiple of every register block
/// Tiles in turn: together more than a first-level cache, as KV that was prefetched lies in the
/// second.
constexpr int kTiles = 4;
/// Everything is timed once in a round and the least of all rounds counts: a neighbour who takes
/// some of the core's time takes it from all costs, and a plan depends on their ratios.
constexpr int kRounds = 12;

/// kCustom reaches the kernels as f32; what unpacking costs, only its owner knows.
DType kernel_type(DType type) { return type == DType::kCustom ? DType::kF32 : type; }

struct Probe {
  std::function<void()> work;
  double seconds = std::numeric_limits<double>::infinity();
};

void time(std::span<Probe> probes) {
  using Clock = std::chrono::steady_clock;
  for (const Probe& probe : probes) probe.work();  // warms up
  for (int round = 0; round < kRounds; ++round) {
    for (Probe& probe : probes) {
      const Clock::time_point start = Clock::now();
      probe.work();
      probe.seconds =
          std::min(probe.seconds, std::chrono::duration<double>(Clock::now() - start).count());
    }
  }
}

class Calibration {
 public:
  Calibration(const KernelSet& kernels, DType k_type, DType v_type)
      : kernels_(kernels),
        k_type_(kernel_type(k_type)),
        v_type_(kernel_type(v_type)),
        memory_(kFloats + kernels::scratch_floats(kLargeDim, kLargeDim)) {
    std::fill_n(memory_.data(), kFloats, 0.0f);
  }

  KernelCosts measure() {
    enum { kFew, kMany = 4, kState = 8, kStore, kMerge, kProbes };  // paths have four corners
    std::array<Probe, kProbes> probes;
    set_corners(std::span(probes).subspan<kFew, 4>(), true, 1, kernels_.few_rows);
    set_corners(std::span(probes).subspan<kMany, 4>(), false, kSomeRows, kMostRows);
    float* from = queries();
    float* to = outputs();
    const QueryLayout layout = kernels_.many_layout(k_type_, v_type_, kLargeDim, kLargeDim);
    const auto each_row = [&](auto work) {
      return [=] {
        for (int r = 0; r < kMostRows; ++r) work(r * kLargeDim);
      };
    };
    probes[kState].work = each_row([=, this](int at) {
      kernels_.pack_query(DType::kF32, from, kLargeDim, layout, to + at);
      std::fill_n(to + at, kLargeDim, 0.0f);
      kernels_.store_output(DType::kF32, to + at, 1.0f, kLargeDim, from);
    });
    probes[kStore].work =
        each_row([=](int at) { std::memcpy(to + at, from + at, kLargeDim * sizeof(float)); });
    probes[kMerge].work =
        each_row([=, this](int at) { kernels_.scale_add(from, 1.0f, to + at, 0.5f, kLargeDim); });
    std::fill_n(maxima(), kMostRows, 0.0f);
    std::fill_n(sums(), kMostRows, 1.0f);
    time(probes);

    KernelCosts costs;
    costs.few = path(std::span(probes).subspan<kFew, 4>(), 1, kernels_.few_rows);
    costs.many = path(std::span(probes).subspan<kMany, 4>(), kSomeRows, kMostRows);
    constexpr double kElements = kMostRows * kLargeDim;
    // Stored by one core and fetched by another: some of both goes through the shared cache.
    constexpr double kBetweenCores = 3;
    costs.state_element = probes[kState].seconds / (2 * kElements);
    costs.store_element = kBetweenCores * probes[kStore].seconds / kElements;
    costs.merge_element = kBetweenCores * probes[kMerge].seconds / kElements;
    return costs;
  }

 private:
  static constexpr int64_t kPlane = int64_t{kTiles} * kTileSlots * kLargeDim;
  static constexpr int64_t kStates = int64_t{kMostRows} * kLargeDim;
  static constexpr int64_t kFloats = 2 * kPlane + 2 * kStates + 2 * kMostRows;

  float* keys() { return memory_.data(); }
  float* values() { return keys() + kPlane; }
  float* queries() { return values() + kPlane; }
  float* outputs() { return queries() + kStates; }
  float* maxima() { return outputs() + kStates; }
  float* sums() { return maxima() + kMostRows; }
  float* scratch() { return memory_.data() + kFloats; }

  using Corners = std::span<Probe, 4>;

  void set_corners(Corners corners, bool few, int low, int high) {
    corners[0].work = [=, this] { attend(few, low, kSmallDim); };
    corners[1].work = [=, this] { attend(few, high, kSmallDim); };
    corners[2].work = [=, this] { attend(few, low, kLargeDim); };
    corners[3].work = [=, this] { attend(few, high, kLargeDim); };
  }

  /// Solves the bilinear law from its four corners.
  static KernelCosts::Path path(Corners corners, int low, int high) {
    const auto slot = [&](int i) { return corners[i].seconds / (kTiles * kTileSlots); };
    const double small = (slot(1) - slot(0)) / (high - low);  // per row
    const double large = (slot(3) - slot(2)) / (high - low);
    constexpr double kSmall = 2 * kSmallDim;  // E
    constexpr double kLarge = 2 * kLargeDim;
    KernelCosts::Path p;
    p.row_element = std::max(0.0, (large - small) / (kLarge - kSmall));
    p.row = std::max(0.0, small - kSmall * p.row_element);
    const double small_slot = slot(0) - low * small;
    const double large_slot = slot(2) - low * large;
    p.slot_element = std::max(0.0, (large_slot - small_slot) / (kLarge - kSmall));
    p.slot = std::max(0.0, small_slot - kSmall * p.slot_element);
    return p;
  }

  void attend(bool few, int rows, int dim) {
    const uint8_t* k[kTileSlots];
    const uint8_t* v[kTileSlots];
    Tile tile;
    tile.slots = kTileSlots;
    tile.k = k;
    tile.v = v;
    tile.k_type = k_type_;
    tile.v_type = v_type_;
    tile.qk_dim = tile.v_dim = dim;
    tile.rows = rows;
    tile.q = queries();
    tile.q_stride = dim;
    tile.o = outputs();
    tile.o_stride = dim;
    tile.max = maxima();
    tile.sum = sums();
    tile.scratch = scratch();
    for (int t = 0; t < kTiles; ++t) {
      for (int s = 0; s < kTileSlots; ++s) {
        const int64_t slot = int64_t{t} * kTileSlots + s;
        k[s] = reinterpret_cast<const uint8_t*>(keys()) + slot * row_bytes(k_type_, dim);
        v[s] = reinterpret_cast<const uint8_t*>(values()) + slot * row_bytes(v_type_, dim);
      }
      if (few) {
        kernels_.attend_few(tile);
      } else {
        kernels_.attend_many(tile);
      }
    }
  }

  const KernelSet& kernels_;
  const DType k_type_;
  const DType v_type_;
  AlignedBuffer<float> memory_;
};

}  // namespace

KernelCosts measure_kernel_costs(const KernelSet& kernels, DType k_type, DType v_type) {
  return Calibration(kernels, k_type, v_type).measure();
}

}  // namespace relay
