#include "measure/timing.h"

#include <algorithm>

namespace relay::measure {

double quantile(std::vector<double> values, double at) {
  std::sort(values.begin(), values.end());
  const double index = at * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(index);
  const size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (values[above] - values[below]) * (index - static_cast<double>(below));
}

Timing timing_of(const std::vector<double>& seconds) {
  return {.median = quantile(seconds, 0.5),
          .low = quantile(seconds, 0.25),
          .high = quantile(seconds, 0.75),
          .best = *std::min_element(seconds.begin(), seconds.end())};
}

}  // namespace relay::measure
