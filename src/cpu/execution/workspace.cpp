#include "cpu/execution/workspace.h"

namespace relay {

Workspace::Workspace() : state_(std::make_unique<State>()) {}
Workspace::Workspace(const Plan& plan) : Workspace() { fit(plan); }
Workspace::~Workspace() = default;
Workspace::Workspace(Workspace&&) noexcept = default;
Workspace& Workspace::operator=(Workspace&&) noexcept = default;

void Workspace::fit(const Plan& plan) {
  State& s = *state_;
  s.fitted_to = 0;  // nothing's, should memory run out
  s.layout = layout_of(plan);
  s.partial_o.reserve(s.layout.partial_floats);
  if (s.partial_states.size() < static_cast<size_t>(s.layout.partial_states)) {
    s.partial_states.resize(static_cast<size_t>(s.layout.partial_states));
  }
  const auto threads = static_cast<size_t>(plan.options.threads);
  if (s.threads.size() < threads) s.threads.resize(threads);
  for (size_t i = 0; i < threads; ++i) s.threads[i].reserve(s.layout.thread_floats);
  if (s.nodes < s.layout.nodes) {
    s.half_there = std::make_unique<std::atomic<uint64_t>[]>(s.layout.nodes);
    s.nodes = s.layout.nodes;
  }
  for (int64_t i = 0; i < s.layout.nodes; ++i) s.half_there[i].store(0, std::memory_order_relaxed);
  s.next_item.store(0, std::memory_order_relaxed);
  s.finished_threads.store(0, std::memory_order_relaxed);
  s.fitted_to = plan.serial;
}

}  // namespace relay
