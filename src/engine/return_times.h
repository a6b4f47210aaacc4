// When clients that were refused should come again. If all of them came at once, all but a few
// would be refused again, and each refusal takes time from those who are served.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>

namespace relay::engine {

class ReturnTimes {
 public:
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  /// Official clients do not believe in more than a minute.
  static constexpr int32_t kLongest = 30;
  /// For a place that becomes free so many may come, as some have left or are late.
  static constexpr int32_t kPerPlace = 4;

  /// The seconds, at least 1, for one more client: each gets a turn of its own. `place`: seconds
  /// until another place becomes free, on average; 0: not known.
  int32_t next(Clock::time_point now, double place) {
    const Clock::time_point first = now + seconds(std::min<double>(place, kLongest));
    last_ = std::clamp(last_ + seconds(place / kPerPlace), first, now + seconds(kLongest));
    return std::max(1, static_cast<int32_t>(std::ceil(Seconds(last_ - now).count())));
  }

 private:
  static Clock::duration seconds(double count) {
    return std::chrono::duration_cast<Clock::duration>(Seconds(count));
  }

  Clock::time_point last_{};  // the last turn
};

}  // namespace relay::engine
