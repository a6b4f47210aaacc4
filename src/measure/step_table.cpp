#include "measure/step_table.h"

#include "measure/format.h"

namespace relay::measure {

std::string step_heading(const ExplainProblem& p) {
  const OpProblem& op = p.op;
  std::string text = p.name.empty() ? "" : p.name + ": ";
  text += to_string(op.shape);
  text +=
      format(", %d layer%s, %s KV\n", p.layers, p.layers == 1 ? "" : "s", to_string(op.kv_type));
  text += format("%d request%s behind a prefix of %lld tokens, each with %lld of its own\n",
                 op.batch, op.batch == 1 ? "" : "s", static_cast<long long>(op.prefix),
                 static_cast<long long>(op.context));
  return text;
}

std::string step_columns() {
  return format("  %-24s %13s %13s %10s\n", "attention of one step", "sharing", "without", "ratio");
}

std::string step_line(const char* name, const std::string& on, const std::string& off) {
  return format("  %-24s %13s %13s\n", name, on.c_str(), off.c_str());
}

std::string step_line(const char* name, const std::string& on, const std::string& off,
                      double ratio) {
  return format("  %-24s %13s %13s %9.2fx\n", name, on.c_str(), off.c_str(), ratio);
}

std::string formula_line(double speedup) {
  return format(
      "\nThe paper's formula, b(s + c) / (s + bc): %.2fx, where reading KV is all that counts.\n",
      speedup);
}

}  // namespace relay::measure
