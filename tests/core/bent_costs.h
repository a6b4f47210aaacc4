// Plans of a machine where partial results are cheaper or dearer than on any real one.
#pragma once

#include <vector>

#include "core/random.h"
#include "cpu/plan/cost_model.h"
#include "cpu/plan/plan.h"

namespace relay::test {

/// By how much: so that all shared segments are kept as they are, some or nearly all are folded
/// into those below them (cpu/plan/fold.h). 1: as on this machine.
inline double random_bend(Random& random) {
  return random.pick(std::vector<double>{1, 1, 1e-3, 1e-1, 1e1, 1e3});
}

inline PlanPtr make_plan_by_bent_costs(const Forest& forest, const PlanOptions& options,
                                       double bend) {
  CostModel costs = planning_costs(options);
  costs.state *= bend;
  costs.store *= bend;
  costs.merge *= bend;
  PlanPtr plan(new Plan);
  remake_plan(*plan, forest, options, costs);
  return plan;
}

/// A plan of a machine that reads slowly and has no cache: what can be shared pays.
inline PlanPtr make_plan_of_slow_memory(const Forest& forest, const PlanOptions& options) {
  CostModel costs = planning_costs(options);
  costs.byte *= 1e3;
  costs.last_cache_bytes = 0;
  PlanPtr plan(new Plan);
  remake_plan(*plan, forest, options, costs);
  return plan;
}

}  // namespace relay::test
