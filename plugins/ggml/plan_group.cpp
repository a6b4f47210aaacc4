#include "plan_group.h"

#include "statistics.h"

namespace relay::ggml {

void PlanSlot::plan(const PlanKey& key, Sharing sharing, int32_t threads) {
  const Clock::time_point start = Clock::now();
  threads_ = threads;
  build_from_mask(key.mask, sharing, forest_);
  const PlanOptions options{
      .shape = key.shape, .k_type = key.k_type, .v_type = key.v_type, .threads = threads};
  if (plan_ == nullptr) {
    plan_ = make_plan(forest_, options);
  } else {
    remake_plan(*plan_, forest_, options);
  }
  workspace_.fit(*plan_);
  Statistics::instance().count_planning(Clock::now() - start);
}

void PlanSlot::attend(const AttentionInputs& inputs, int ith, int nth) {
  // ggml may run the graph on fewer threads than it was asked for.
  for (int32_t thread = ith; thread < threads_; thread += nth) {
    relay::attend(*plan_, inputs, workspace_, thread);
  }
}

void PlanGroup::reset(const PlanKey& key, size_t node) {
  key_ = key;
  first_ = last_ = node;
  slot_ = nullptr;
}

void PlanGroup::plan(PlanSlot& slot, Sharing sharing, int32_t threads) {
  slot_ = &slot;
  sharing_ = sharing;
  PlanKey key = key_;
  if (mask_is_computed()) key.mask.data = nullptr;
  slot.plan(key, sharing, threads);
  phase_.store(mask_is_computed() ? Phase::kDeferred : Phase::kReady, std::memory_order_release);
}

void PlanGroup::attend(const AttentionInputs& inputs, int ith, int nth) {
  Phase phase = phase_.load(std::memory_order_acquire);
  if (phase == Phase::kDeferred &&
      phase_.compare_exchange_strong(phase, Phase::kPlanning, std::memory_order_acq_rel)) {
    slot_->plan(key_, sharing_, nth);
    phase_.store(Phase::kReady, std::memory_order_release);
    phase_.notify_all();
  } else if (phase != Phase::kReady) {
    while (phase_.load(std::memory_order_acquire) != Phase::kReady) phase_.wait(Phase::kPlanning);
  }
  slot_->attend(inputs, ith, nth);
}

}  // namespace relay::ggml
