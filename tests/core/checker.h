// Compares what the library computed with the oracle, row by row.
//
// Three measures (tolerance.h derives the bounds):
//   1. every element within its worst-case bound, and lse too;
//   2. each (row, head): mean squared error of its elements below kRowRms^2 of the modelled
//   variance.
//      Few slots mean that all elements share one rounding, so this is a tail bound for a single
//      error: six standard deviations, of a distribution with no tail to speak of;
//   3. the mean of that ratio over all N rows and heads below 2 + 12 / sqrt(N): an average of
//      independent ratios, each of mean at most 1 and standard deviation about sqrt(2).
// Data that is not random (all keys equal, say) correlates its roundings: statistics are off there.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/operator_case.h"
#include "core/tolerance.h"

namespace relay::test {

inline constexpr double kRowRms = 6.0;

/// What a row attends and where it stands: the ground truth, from whoever made the case.
struct RowTruth {
  int64_t position = 0;
  std::vector<AttendedSlot> slots;
};
using Truth = std::function<RowTruth(int64_t row)>;

Truth truth_of(const ForestCase& forest_case);
/// Of a mask; the caller keeps it alive.
Truth truth_of(const Mask& mask);

/// Answers of the oracle for some rows of a case: computed once, compared with many runs.
class Oracle {
 public:
  /// Takes all rows, or a random choice of them once (row, slot, head) triples exceed `budget`.
  /// `arithmetics`: every set of roundings that it will be asked about.
  Oracle(const OperatorCase& op, const Truth& truth, std::vector<Arithmetic> arithmetics,
         uint64_t seed, int64_t budget = 250'000);

  /// Empty, or a report of the worst offence.
  std::string compare(const OperatorCase& op, const OutputTensor& output,
                      const Arithmetic& arithmetic, bool statistics = true) const;

  /// Mean over rows and heads of (mean squared error / variance) in the last comparison.
  double last_mean_ratio() const { return last_mean_ratio_; }

 private:
  struct Answer {
    int64_t row = 0;
    int64_t head = 0;
    std::vector<double> out;
    double lse = 0;
    std::vector<Bounds> bounds;  ///< per arithmetic
  };
  std::vector<Answer> answers_;
  std::vector<Arithmetic> arithmetics_;
  mutable double last_mean_ratio_ = 0;
};

/// Every kernel set's roundings for a case, without repetition.
std::vector<Arithmetic> arithmetics_for(const OperatorConfig& config);

}  // namespace relay::test
