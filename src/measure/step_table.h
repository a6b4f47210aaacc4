// The lines of a decode step's table, with sharing beside without.
#pragma once

#include <string>

#include "measure/explain.h"

namespace relay::measure {

/// The model, its heads and layers; the batch.
std::string step_heading(const ExplainProblem& problem);
std::string step_columns();
std::string step_line(const char* name, const std::string& on, const std::string& off);
std::string step_line(const char* name, const std::string& on, const std::string& off,
                      double ratio);
std::string formula_line(double speedup);

}  // namespace relay::measure
