// One attention operator with its tensors in memory: random shapes, types and layouts, KV caches
// whose unused bytes are NaN, output buffers with guards around and between the rows.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/forest_generator.h"
#include "core/random.h"
#include "relay/attention.h"

namespace relay::test {

enum class Placement : uint8_t {
  kSlotMajor,    ///< [slot][head][dim], dense
  kHeadMajor,    ///< [head][slot][dim]: heads far apart
  kBlockMajor,   ///< [block][head][slot][dim], as engines with paged caches have it
  kInterleaved,  ///< [block][head][slot][K | V]: K and V in one buffer
  kPadded,       ///< kSlotMajor with gaps after vectors, slots and blocks, at the worst alignment
};

enum class RowsLayout : uint8_t {
  kDense,      ///< [row][head][dim]
  kHeadMajor,  ///< [head][row][dim]
  kBlocked,    ///< rows in blocks of rows_per_block with gaps, at the worst alignment
};

struct OperatorConfig {
  HeadShape shape;
  DType k_type = DType::kF32;
  DType v_type = DType::kF32;
  DType q_type = DType::kF32;
  DType out_type = DType::kF32;
  Placement placement = Placement::kSlotMajor;
  RowsLayout q_layout = RowsLayout::kDense;
  RowsLayout out_layout = RowsLayout::kDense;
  int64_t rows_per_block = 3;  ///< of kBlocked
  float sharpness = 1.0f;      ///< standard deviation of the logits before cap and bias
  float softcap = 0.0f;
  bool slopes = false;
  bool sinks = false;
  bool lse = true;

  std::string describe() const;
};

/// Any mix of everything above that the library promises to serve.
OperatorConfig random_config(Random& random);

/// K or V: the bytes as the library reads them, and the same values in f32 for the oracle.
class KvTensor {
 public:
  /// A view into `storage` (see make_kv); all bytes are NaN patterns until set.
  KvTensor(DType type, int32_t heads, int64_t dim, int64_t slots);

  DType type() const { return type_; }
  int32_t heads() const { return heads_; }
  int64_t dim() const { return dim_; }
  const KvPlane& plane() const { return plane_; }

  /// Encodes one vector; the oracle's copy holds what it decodes to.
  void set(int64_t slot, int64_t head, std::span<const float> values);
  /// Overwrites the bytes of one vector with NaN (or, for int8, garbage times NaN).
  void poison(int64_t slot, int64_t head);
  std::span<const float> decoded(int64_t slot, int64_t head) const;
  KvPlane oracle_plane() const;

 private:
  friend class KvStorage;
  unsigned char* vector(int64_t slot, int64_t head);

  DType type_;
  int32_t heads_;
  int64_t dim_;
  KvPlane plane_;
  int64_t block_size_ = INT64_MAX;
  std::vector<float> values_;  ///< [slot][head][dim], NaN until set
};

/// K and V of a cache of `blocks` blocks in one of the layouts.
class KvStorage {
 public:
  KvStorage(const OperatorConfig& config, int64_t block_size, int64_t blocks);
  KvStorage(const KvStorage&) = delete;
  KvStorage& operator=(const KvStorage&) = delete;

  KvTensor k;
  KvTensor v;
  KvCache cache() const;
  KvCache oracle_cache() const;

  /// Fills the flagged slots with random vectors; the rest stays NaN.
  void fill(const std::vector<bool>& used, Random& random);

 private:
  std::vector<unsigned char> bytes_;
  int64_t block_size_;
};

/// Q: random rows of variance 1 in any layout, gaps NaN, and the oracle's copy.
class QueryTensor {
 public:
  QueryTensor(const OperatorConfig& config, int64_t rows, Random& random);
  QueryTensor(QueryTensor&&) = default;

  void set(int64_t row, int64_t head, std::span<const float> values);
  ConstRows view() const { return view_; }
  ConstRows oracle_view() const;

 private:
  DType type_;
  int32_t heads_;
  int64_t dim_;
  ConstRows view_;
  std::vector<unsigned char> bytes_;
  std::vector<float> values_;
};

/// The output and lse with guard bytes on all sides and in all gaps.
class OutputTensor {
 public:
  OutputTensor(const OperatorConfig& config, int64_t rows);
  OutputTensor(OutputTensor&&) = default;  // the view keeps pointing into the moved buffer
  OutputTensor& operator=(OutputTensor&&) = default;

  MutableRows view() { return view_; }
  float* lse() { return with_lse_ ? lse_.data() + kLseGuard : nullptr; }

  double out(int64_t row, int64_t head, int64_t j) const;
  double lse(int64_t row, int64_t head) const;
  bool has_lse() const { return with_lse_; }
  DType type() const { return type_; }

  /// Empty, or what was written that should not have been.
  std::string broken_guards() const;
  /// The raw result, for bitwise comparison: output rows and lse, without the gaps.
  std::vector<unsigned char> bits() const;
  /// Back to the pattern that nothing has been written over.
  void reset();

 private:
  static constexpr int64_t kLseGuard = 32;
  int64_t offset(int64_t row, int64_t head) const;

  DType type_;
  int64_t rows_;
  int32_t heads_;
  int64_t dim_;
  bool with_lse_;
  MutableRows view_;
  int64_t base_ = 0;
  std::vector<unsigned char> bytes_;
  std::vector<float> lse_;
};

/// An operator over `rows` rows and a KV cache, all tensors random.
struct OperatorCase {
  OperatorCase(const OperatorConfig& config, int64_t rows, int64_t block_size, int64_t blocks,
               const std::vector<bool>& used, uint64_t seed);

  OperatorConfig config;
  int64_t rows;
  KvStorage kv;
  QueryTensor q;
  OutputTensor out;
  std::vector<float> slopes;
  std::vector<float> sinks;
  float scale;
  int64_t window = 0;
  ConstRows bias;

  PlanOptions options(int32_t threads) const;
  /// What the library sees; out and lse point into `output`.
  AttentionInputs inputs(OutputTensor& output) const;
  AttentionInputs inputs() { return inputs(out); }
  /// The same values as dense f32 tensors, for the oracle.
  AttentionInputs oracle_inputs() const;
};

enum class Threading : uint8_t { kInTurn, kInRandomTurn, kReal };

/// Runs every thread's share of a plan.
void run_plan(const Plan& plan, const AttentionInputs& inputs, Workspace& workspace,
              int32_t threads, Threading threading, uint64_t seed);

}  // namespace relay::test
