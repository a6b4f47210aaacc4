#include "engine/step_pacer.h"

#include <algorithm>
#include <cmath>

namespace relay::engine {

namespace {

constexpr int32_t kFirst = 128;      // rows of the first prompt, when nothing is measured
constexpr int32_t kLeastAlone = 32;  // prompts advance, however slow the machine
constexpr int32_t kLeastBeside = 8;
// While prompts go on and on, now and then a step without them shows what decoding takes by itself.
constexpr int32_t kMixedSteps = 32;
constexpr double kNew = 0.3;  // weight of a measurement among those before it
constexpr double kBurstSteps = 8;
constexpr double kMadeGood = 0.5;  // of the time in which requests decode

}  // namespace

/// Whether decode_seconds_ says what so many rows take.
bool StepPacer::knows(int32_t decode_rows) const {
  return decode_seconds_ > 0 && decode_rows <= 2 * decode_rows_ && 2 * decode_rows >= decode_rows_;
}

PrefillBudget StepPacer::budget(int32_t decode_rows, int32_t adapters) const {
  if (step_seconds_ <= 0) return {batch_tokens_, batch_tokens_, batch_tokens_};
  int32_t alone = std::min(kFirst, batch_tokens_);
  if (row_seconds_ > 0) {
    const double rows = std::min(step_seconds_ / adapters / row_seconds_, 1e6);
    alone = std::clamp(static_cast<int32_t>(rows) / kLeastAlone * kLeastAlone,
                       std::min(kLeastAlone, batch_tokens_), batch_tokens_);
  }
  if (decode_rows == 0 || decode_stretch_ <= 0) return {alone, alone, alone};
  if (mixed_steps_ >= kMixedSteps) return {0, alone, 0};
  int32_t beside = 0;
  if (knows(decode_rows)) {
    const double rows =
        row_seconds_ > 0 ? (decode_stretch_ - 1) * decode_seconds_ / row_seconds_ : 0.0;
    beside =
        std::clamp(static_cast<int32_t>(std::min(rows, 1e6)), std::min(kLeastBeside, alone), alone);
  }
  return {beside, alone, held_up_ < kBurstSteps * step_seconds_ ? alone : beside};
}

void StepPacer::note(int32_t decode_rows, int32_t prefill_rows, double seconds) {
  if (seconds <= 0) return;
  const auto mix = [](double& average, double value) {
    average = average <= 0 ? value : (1 - kNew) * average + kNew * value;
  };
  const bool known = knows(decode_rows);
  if (decode_rows == 0) {
    held_up_ = 0;
  } else {
    const double allowed = known ? decode_stretch_ * decode_seconds_ : 0.0;
    if (prefill_rows > 0) held_up_ += std::max(seconds - allowed, 0.0);
    held_up_ = std::max(held_up_ - kMadeGood * seconds, 0.0);
  }
  if (prefill_rows == 0) {
    if (!known) decode_seconds_ = 0;
    mix(decode_seconds_, seconds);
    decode_rows_ = decode_rows;
    mixed_steps_ = 0;
    return;
  }
  if (decode_rows > 0) {
    ++mixed_steps_;
    if (!known) return;
    // At least a tenth: where a row seems to cost nothing, the decode time is an outlier.
    mix(row_seconds_, std::max(seconds - decode_seconds_, 0.1 * seconds) / prefill_rows);
  } else if (prefill_rows >= kLeastAlone) {  // fewer take as long as reading the weights does
    mix(row_seconds_, seconds / prefill_rows);
  }
}

}  // namespace relay::engine
