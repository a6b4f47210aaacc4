// The whole operator in one call, on threads of its own.
#include <thread>
#include <vector>

#include "cpu/plan/plan.h"
#include "relay/attention.h"

namespace relay {

void attend_forest(const Forest& forest, const PlanOptions& options,
                   const AttentionInputs& inputs) {
  validate(forest);
  const PlanPtr plan = make_plan(forest, options);
  validate(*plan, inputs);
  Workspace workspace(*plan);
  std::vector<std::jthread> threads;  // joined at the end
  for (int32_t t = 1; t < options.threads; ++t) {
    threads.emplace_back([&, t] { attend(*plan, inputs, workspace, t); });
  }
  attend(*plan, inputs, workspace, 0);
}

}  // namespace relay
