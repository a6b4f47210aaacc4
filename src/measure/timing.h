// Repeated measurements in a few numbers.
#pragma once

#include <vector>

namespace relay::measure {

/// The value that a share `at` of the values does not exceed, linear in between.
double quantile(std::vector<double> values, double at);

/// Seconds over the rounds.
struct Timing {
  double median = 0;
  double low = 0;  ///< quartiles
  double high = 0;
  double best = 0;

  /// Distance of the quartiles over the median.
  double spread() const { return (high - low) / median; }
};
Timing timing_of(const std::vector<double>& seconds);

}  // namespace relay::measure
