// Operators of tests/core on the GPU: a ForestCase becomes block tables in device memory, an
// OperatorCase becomes device tensors in any layout, and the output comes back between guards.
//
// Tolerances are those of core/tolerance.h with the roundings of the GPU's kernels:
// - Q and K are multiplied as they are, and products of bf16 or f16 are exact in f32. Tensor cores
//   align the products of a step and truncate instead of rounding: up to 2^-23 for each term, so a
//   dot product errs by (d + 8) 2^-23 |q||k| more than in f32 arithmetic. That is what u_q covers.
// - P is rounded to the queries' type before P V: u_p = 2^-8 (bf16) or 2^-11 (f16), which covers a
//   sum of the rounded weights as well as one of the unrounded. Weights below 2^-14 have fewer bits
//   in f16: their errors add up to n 2^-25 at most, less than half of u_p up to n = 8192, where the
//   bound counts u_p twice; beyond that for rows that spread over all slots alike.
// - ex2.approx (2^-22 relative, and the rounding of its argument) and the soft cap's tanh are
//   within what kExp, kTanh and the other terms allow to f32 arithmetic, and so is P V: in
//   g = (3 n + 640) u, truncation takes 2 n u, and merging tiles of 16 slots or more the rest.
// - e4m3 is exact in f16 and bf16; the oracle reads the decoded values times their scale.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/checker.h"
#include "core/forest_generator.h"
#include "core/operator_case.h"
#include "core/random.h"
#include "core/tolerance.h"
#include "cuda/device.h"
#include "relay/cuda.h"

namespace relay::test {

// --- fp8 e4m3 ------------------------------------------------------------------------------------

uint8_t to_e4m3(float value);  ///< nearest, ties to even; beyond 448 it stays 448
float from_e4m3(uint8_t bits);

// --- Cases ---------------------------------------------------------------------------------------

/// How K and V lie in one buffer; block, slot and head strides are multiples of 16 bytes.
enum class CachePlacement : uint8_t {
  kBlockMajor,   ///< [K | V][block][head][slot]
  kSlotMajor,    ///< [K | V][block][slot][head]
  kBlockPairs,   ///< [block][K | V][slot][head]
  kHeadMajor,    ///< [K | V][head][block][slot]
  kInterleaved,  ///< [block][head][slot][K | V]
  kPadded,       ///< kSlotMajor with gaps after vectors, slots and blocks
};
inline const std::vector<CachePlacement> kCachePlacements = {
    CachePlacement::kBlockMajor, CachePlacement::kSlotMajor,   CachePlacement::kBlockPairs,
    CachePlacement::kHeadMajor,  CachePlacement::kInterleaved, CachePlacement::kPadded};

enum class RowsPlacement : uint8_t {
  kDense,      ///< [row][head]
  kHeadMajor,  ///< [head][row] with a gap after each head
  kPadded,     ///< kDense with gaps after vectors and rows
};
inline const std::vector<RowsPlacement> kRowsPlacements = {
    RowsPlacement::kDense, RowsPlacement::kHeadMajor, RowsPlacement::kPadded};

struct CudaConfig {
  HeadShape shape{.q_heads = 4, .kv_heads = 2, .qk_dim = 128, .v_dim = 128};
  DType type = DType::kBF16;     ///< of queries and output
  DType kv_type = DType::kBF16;  ///< the same, or kF8E4M3
  CachePlacement cache = CachePlacement::kBlockMajor;
  RowsPlacement q_rows = RowsPlacement::kDense;
  RowsPlacement out_rows = RowsPlacement::kDense;
  float sharpness = 1.0f;  ///< standard deviation of the logits before cap and bias
  float softcap = 0.0f;
  bool slopes = false;
  bool sinks = false;
  bool lse = true;
  float k_scale = 1.0f;  ///< of kF8E4M3; 1 is given as a null pointer
  float v_scale = 1.0f;
  float q_scale = 0.0f;  ///< not 0: queries are kF8E4M3, as the cache is
  int32_t slack = 0;     ///< how far the plan's limits lie above what the batch needs
  bool check = false;    ///< PlanOptions::check

  std::string describe() const;
};

CudaConfig config_of(DType type, int32_t dim, int32_t kv_heads, int32_t group);
/// A cache of fp8 with scales that use its range.
CudaConfig fp8_config_of(DType type, int32_t dim, int32_t kv_heads, int32_t group);
/// Of such queries. Values times it are exact in bf16 and f16, in which the host keeps them.
inline constexpr float kQueryScale = 5 * 0x1p-8f;
/// Any mix of everything above.
CudaConfig random_cuda_config(Random& random);

/// Requests written down by their block tables, also those that no prefix tree describes. Ids are
/// handed out in order and dealt anew in the end.
class TableWriter {
 public:
  explicit TableWriter(int64_t block_size, uint64_t seed = 1)
      : block_size_(block_size), seed_(seed) {}

  /// Blocks that nobody has yet.
  std::vector<int32_t> blocks(int64_t count);
  /// A request of this very table, as far as kv_length goes.
  void table(const std::vector<int32_t>& table, int64_t kv_length, int32_t rows = 1);
  /// A request of these whole blocks, then `own` tokens in blocks of its own.
  void request(const std::vector<int32_t>& shared, int64_t own, int32_t rows = 1);
  /// Requests without rows.
  void padding(int32_t count = 1);
  ForestCase finish(bool causal = true, int64_t window = 0);

 private:
  struct Request {
    std::vector<int32_t> table;
    int64_t kv_length;
    int32_t rows;
  };
  int64_t block_size_;
  uint64_t seed_;
  int32_t next_ = 0;
  std::vector<Request> requests_;
};

/// A random forest of blocks that the GPU takes, some with padding between the requests.
ForestCase generate_tables(uint64_t seed, ForestLimits limits);

/// What summarize() must say of the slots that are read with sharing.
enum class Reads : uint8_t {
  kAny,       ///< no more than without
  kFewer,     ///< fewer than without
  kOfForest,  ///< each node of a prefix tree once: for decode rows, and nodes long enough to pay
};
/// Tokens of a node that are always worth sharing.
inline constexpr int64_t kWorthSharing = 64;

struct CudaCase {
  std::string name;
  CudaConfig config;
  ForestCase forest;
  bool statistics = true;  ///< off for data that is not random
  Reads reads = Reads::kAny;
  std::function<void(OperatorCase&)> edit = {};  ///< of the tensors, before anything runs
  int64_t budget = 150'000;                      ///< of the oracle
};

/// The tensors of a case on the host; what is fp8 lies on the grid of its scale, K and V in f32.
std::unique_ptr<OperatorCase> make_operator(const CudaConfig& config, const ForestCase& forest,
                                            const std::function<void(OperatorCase&)>& edit = {});
Arithmetic arithmetic_on_gpu(const CudaConfig& config);

/// The paths that this GPU has; RELAY_CUDA_PATH leaves one alone.
std::vector<cuda::Path> kernel_paths();
const char* name_of(cuda::Path path);

// --- Device --------------------------------------------------------------------------------------

/// What a plan and its tensors are made for.
struct BatchLimits {
  int32_t requests = 1;
  int32_t rows = 1;
  int32_t blocks = 1;  ///< of a request
  int32_t cache_blocks = 1;
  int32_t block_size = 16;
};
BatchLimits limits_of(const ForestCase& forest, int32_t slack);
/// Limits that serve both.
BatchLimits larger(const BatchLimits& a, const BatchLimits& b);

/// The arrays of a cuda::Batch. What must not be read is garbage: lengths and tables of padding,
/// table entries behind a request's last block.
struct HostBatch {
  int32_t requests = 0;
  std::vector<int32_t> query_starts, kv_lengths, table;
  int64_t table_stride = 0;

  int32_t rows() const { return query_starts.back(); }
};
/// `requests` in all: the forest's own, then padding.
HostBatch host_batch(const ForestCase& forest, const BatchLimits& limits, int32_t requests,
                     uint64_t seed);
/// A valid batch that has nothing to do with any forest: to capture and to leave traces with.
HostBatch decoy_batch(const BatchLimits& limits, int32_t requests, uint64_t seed);

/// One layer's tensors and one batch in device memory, all of it between guards. Unused slots, rows
/// and gaps of the inputs are NaN.
class DeviceOperator {
 public:
  DeviceOperator(const CudaConfig& config, const BatchLimits& limits);

  /// Replaces the tensors in place. `blocks` of the forest must fit the limits.
  void upload(const OperatorCase& op, const ForestCase& forest);
  /// Replaces the batch in place.
  void upload(const HostBatch& batch);
  void reset_output();
  /// What the cache holds since it was uploaded.
  const std::vector<unsigned char>& cache_bytes() const { return kv_bytes_; }

  cuda::PlanOptions options(cuda::Path path, Sharing sharing, bool causal, int64_t window) const;
  cuda::Batch batch() const;
  cuda::Inputs inputs() const;

  /// Moves the first `rows` rows into `out`. Empty, or what was written that should not have been
  /// (rows behind them included), or what was not written that should have been.
  std::string download(OutputTensor& out, int32_t rows) const;
  /// Empty, or which input has changed since it was uploaded, or which guard is broken.
  std::string changed_inputs() const;

 private:
  struct Geometry {
    int64_t row, head, extent;
  };
  static Geometry geometry(RowsPlacement placement, int64_t vector, int64_t heads, int64_t rows);
  int64_t vector_bytes() const { return int64_t{2} * config_.shape.qk_dim; }
  int64_t query_bytes() const { return vector_bytes() / (config_.q_scale != 0.0f ? 2 : 1); }

  CudaConfig config_;
  BatchLimits limits_;
  int64_t kv_block_ = 0, kv_slot_ = 0, kv_head_ = 0, v_offset_ = 0;
  float scale_ = 1.0f;
  int32_t requests_ = 0;
  int64_t table_stride_;
  Geometry q_geometry_, out_geometry_;
  DeviceBuffer kv_, q_, out_, lse_, slopes_, sinks_, scales_, query_starts_, kv_lengths_, table_;
  std::vector<unsigned char> kv_bytes_, q_bytes_;
  HostBatch batch_;
};

/// A plan in memory of its own, which is garbage before and lies between guards.
class DevicePlan {
 public:
  DevicePlan(const cuda::PlanOptions& options, const DeviceStream& stream);

  const cuda::Plan& operator*() const { return *plan_; }
  std::string broken_guards() const { return memory_.broken_guards("workspace"); }

 private:
  DeviceBuffer memory_;
  cuda::PlanPtr plan_;
};

/// Empty, or where two outputs differ by far more than roundings of random data can: for all rows,
/// where the oracle takes some. `rows` as flags; empty means all.
std::string disagreement(const OperatorConfig& config, const OutputTensor& a, const OutputTensor& b,
                         int32_t rows, const std::vector<bool>& which = {});

// --- Running -------------------------------------------------------------------------------------

/// Runs a case on every path, with sharing and without: twice, from a plan made twice, and through
/// a graph that was captured with another batch. Empty, or what went wrong.
std::string run_case(const CudaCase& test);

/// Runs the cases, oracles in parallel; scale() below 1 takes some of them. Reports failures to
/// GoogleTest.
void run_cases(std::vector<CudaCase> cases);

/// Calls f(0) to f(count - 1) from several threads.
void parallel_for(size_t count, const std::function<void(size_t)>& f);

/// Every so many of 0 to count-1 as scale() says, two at least.
std::vector<size_t> sampled(size_t count);

}  // namespace relay::test
