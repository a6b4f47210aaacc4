#include "core/checker.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>

#include "core/test_env.h"
#include "reference/logits.h"

namespace relay::test {

Truth truth_of(const ForestCase& forest_case) {
  return [&forest_case](int64_t row) {
    return RowTruth{.position = forest_case.position(row), .slots = forest_case.attended(row)};
  };
}

Truth truth_of(const Mask& mask) {
  return [&mask](int64_t row) { return RowTruth{.position = 0, .slots = mask.attended(row)}; };
}

std::vector<Arithmetic> arithmetics_for(const OperatorConfig& config) {
  std::vector<Arithmetic> result;
  for (const std::string& isa : isas()) {
    const Arithmetic arithmetic = arithmetic_of(isa, config.shape, config.k_type, config.v_type);
    if (std::find(result.begin(), result.end(), arithmetic) == result.end()) {
      result.push_back(arithmetic);
    }
  }
  return result;
}

Oracle::Oracle(const OperatorCase& op, const Truth& truth, std::vector<Arithmetic> arithmetics,
               uint64_t seed, int64_t budget)
    : arithmetics_(std::move(arithmetics)) {
  const HeadShape& shape = op.config.shape;
  const AttentionInputs inputs = op.oracle_inputs();
  std::vector<int64_t> rows(op.rows);
  std::iota(rows.begin(), rows.end(), 0);
  Random random(derive_seed(seed, 0x0c));
  random.shuffle(rows);

  int64_t spent = 0;
  for (int64_t row : rows) {
    const RowTruth attended = truth(row);
    const int64_t cost = static_cast<int64_t>(attended.slots.size()) * shape.q_heads;
    if (spent > 0 && spent + cost > budget) continue;  // shorter rows may still fit
    spent += cost;

    std::vector<double> out(static_cast<int64_t>(shape.q_heads) * shape.v_dim);
    std::vector<double> lse(shape.q_heads);
    reference_row(shape, inputs, row, attended.position, attended.slots, out.data(), lse.data());
    for (int64_t head = 0; head < shape.q_heads; ++head) {
      Answer answer;
      answer.row = row;
      answer.head = head;
      answer.out.assign(out.begin() + head * shape.v_dim, out.begin() + (head + 1) * shape.v_dim);
      answer.lse = lse[head];
      const std::vector<double> logits =
          reference_logits(shape, inputs, row, head, attended.position, attended.slots);
      for (const Arithmetic& arithmetic : arithmetics_) {
        answer.bounds.push_back(derive_bounds(arithmetic, op, row, head, attended.position,
                                              attended.slots, logits, answer.out, answer.lse));
      }
      answers_.push_back(std::move(answer));
    }
  }
}

std::string Oracle::compare(const OperatorCase& op, const OutputTensor& output,
                            const Arithmetic& arithmetic, bool statistics) const {
  const auto which = std::find(arithmetics_.begin(), arithmetics_.end(), arithmetic);
  if (which == arithmetics_.end()) return "the oracle was not asked for this arithmetic";
  const size_t index = which - arithmetics_.begin();
  const double u_out = unit_roundoff(output.type());
  const double step = smallest_step(output.type());

  std::ostringstream report;
  const auto offend = [&](const Answer& answer) -> std::ostream& {
    return report << op.config.describe() << "\n  row " << answer.row << ", head " << answer.head
                  << ": ";
  };

  double worst_row = 0;
  const Answer* worst_answer = nullptr;
  double ratios = 0;
  int64_t measured = 0;
  for (const Answer& answer : answers_) {
    const Bounds& bounds = answer.bounds[index];
    double squared_error = 0;
    double variance = 0;
    for (size_t j = 0; j < answer.out.size(); ++j) {
      const double got = output.out(answer.row, answer.head, j);
      const double error = std::fabs(got - answer.out[j]);
      const double allowed =
          bounds.worst[j] * (1 + u_out) + u_out * std::fabs(answer.out[j]) + step;
      if (!(error <= allowed)) {  // also when `got` is NaN
        offend(answer) << "element " << j << " is " << got << ", should be " << answer.out[j]
                       << "; error " << error << ", bound " << allowed;
        return report.str();
      }
      squared_error += error * error;
      variance +=
          bounds.variance[j] + (u_out * u_out * answer.out[j] * answer.out[j] + step * step) / 3;
    }
    if (output.has_lse()) {
      const double got = output.lse(answer.row, answer.head);
      const bool both_empty = std::isinf(answer.lse) && got == answer.lse;
      if (!both_empty && !(std::fabs(got - answer.lse) <= bounds.lse)) {
        offend(answer) << "lse is " << got << ", should be " << answer.lse << "; bound "
                       << bounds.lse;
        return report.str();
      }
    }
    if (bounds.linear && variance > 0) {
      const double ratio = squared_error / variance;
      ratios += ratio;
      ++measured;
      if (ratio > worst_row) {
        worst_row = ratio;
        worst_answer = &answer;
      }
    }
  }

  last_mean_ratio_ = measured > 0 ? ratios / static_cast<double>(measured) : 0;
  if (!statistics || measured == 0) return "";
  if (worst_row > kRowRms * kRowRms) {
    offend(*worst_answer) << "within the worst case, but its rms error is " << std::sqrt(worst_row)
                          << " times the modelled one";
    return report.str();
  }
  const double limit = 2 + 12 / std::sqrt(static_cast<double>(measured));
  if (last_mean_ratio_ > limit) {
    report << op.config.describe() << "\n  mean squared error over " << measured
           << " rows and heads is " << last_mean_ratio_ << " times the modelled one, limit "
           << limit;
    return report.str();
  }
  return "";
}

}  // namespace relay::test
