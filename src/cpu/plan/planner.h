// Cuts a forest into work items of near-equal finish for all threads.
#pragma once

#include "cpu/plan/cost_model.h"
#include "cpu/plan/plan.h"

namespace relay {

/// Fills `plan`. The arguments have been checked. A function of its arguments alone; allocates
/// nothing once the plan has grown to its working size.
void cut_plan(Plan& plan, const Forest& forest, const PlanOptions& options, const CostModel& costs);

/// Seconds of one item by a cost model (see there), merging left out.
double item_seconds(const CostModel& costs, const WorkItem& item, const HeadShape& shape);

/// Seconds of merging two partials of one KV head.
double merge_seconds(const CostModel& costs, const HeadShape& shape);

}  // namespace relay
