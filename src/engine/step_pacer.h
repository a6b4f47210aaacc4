// How many rows of prompts a step may compute, by the step times measured so far. A step cannot be
// interrupted: whoever decodes waits for the prompts beside it, and so does a cancellation.
//
// While requests decode, a step may take decode_stretch times as long as it would without prompts:
// a long prompt must not hold them up. Short prompts, which one step of step_seconds could take
// whole, would wait long for their first tokens at that pace, and together cost decoding no more if
// they are computed at once. So they may fill steps of step_seconds, on credit: what such steps
// take beyond the stretch is at most kBurstSteps * step_seconds and, in the long run, half of the
// time. However many short prompts arrive, decoding keeps half the pace that the stretch leaves it.
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

  /// For a step beside so many decode rows. `adapters` take turns: a step that prompts have to
  /// themselves takes its share of step_seconds, so that each is served once in that time.
  PrefillBudget budget(int32_t decode_rows, int32_t adapters = 1) const;
  /// A step took so long.
  void note(int32_t decode_rows, int32_t prefill_rows, double seconds);

 private:
  bool knows(int32_t decode_rows) const;

  double step_seconds_;
  double decode_stretch_;
  int32_t batch_tokens_;
  double row_seconds_ = 0;     // what a prefill row adds to a step; 0: not known yet
  double decode_seconds_ = 0;  // of the last steps without prefill; 0: not known yet
  int32_t decode_rows_ = 0;    // in the last of those
  int32_t mixed_steps_ = 0;    // since then
  double held_up_ = 0;         // seconds beyond the stretch that are not made good for yet
};

}  // namespace relay::engine
