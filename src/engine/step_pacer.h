// How many rows of prompts a step may compute, by the step times measured so far. A step cannot be
// interrupted: whoever decodes waits for the prompts beside it, and so does a cancellation.
#pragma once

#include <cstdint>

#include "engine/scheduler.h"

namespace relay::engine {

class StepPacer {
 public:
  /// step_seconds: how long a step may take in which prompts have the word; 0: no limit but
  /// batch_tokens. decode_stretch: a step in which requests decode may take so many times as long
  /// as it would without prompts; 0: it is a step like others.
  StepPacer(double step_seconds, double decode_stretch, int32_t batch_tokens)
      : step_seconds_(step_seconds), decode_stretch_(decode_stretch), batch_tokens_(batch_tokens) {}

  /// For a step beside so many decode rows.
  PrefillBudget budget(int32_t decode_rows) const;
  /// A step took so long.
  void note(int32_t decode_rows, int32_t prefill_rows, double seconds);

 private:
  double step_seconds_;
  double decode_stretch_;
  int32_t batch_tokens_;
  double row_seconds_ = 0;     // what a prefill row adds to a step; 0: not known yet
  double decode_seconds_ = 0;  // of the last steps without prefill; 0: not known yet
  int32_t decode_rows_ = 0;    // in the last of those
  int32_t mixed_steps_ = 0;    // since then
};

}  // namespace relay::engine
