// The two faces of an accuracy report: a table for people, JSON for machines.
#include <nlohmann/json.hpp>

#include "bench/accuracy/accuracy.h"
#include "measure/format.h"
#include "measure/roofline.h"

namespace relay::bench {

using measure::cpu_model;
using measure::format;

namespace {

std::string cell(const std::optional<OutputError>& error) {
  if (!error) return format("  %17s", "-");
  return format("  %8.1e %8.1e", error->rms, error->max);
}

nlohmann::json json_of(const OutputError& error) {
  return {{"rms", error.rms}, {"max", error.max}};
}

}  // namespace

std::string to_table(const AccuracyReport& report) {
  std::string text = format("%s, %d threads, kernels %s\n\n", cpu_model().c_str(), report.threads,
                            report.isa.c_str());
  text += format("%-4s %7s %8s %8s %5s %-9s  %17s  %17s  %17s\n", "KV", "heads", "head dim",
                 "slots", "rows", "values", "ggml flash attn", "ggml without", "Relay");
  text += format("%46s  %8s %8s  %8s %8s  %8s %8s\n", "", "rms", "max", "rms", "max", "rms", "max");
  for (const AccuracyResult& result : report.results) {
    const AccuracyCase& c = result.problem;
    text += format("%-4s %7s %8d %8lld %5s %-9s", to_string(c.kv_type),
                   format("%d/%d", c.kv_heads * c.group, c.kv_heads).c_str(), c.head_dim,
                   static_cast<long long>(c.slots),
                   format("%lld%s", static_cast<long long>(c.rows), c.causal ? "c" : "").c_str(),
                   to_string(c.values));
    text += cell(result.ggml_flash) + cell(result.ggml_softmax) + cell(result.relay) + "\n";
  }
  text +=
      "\nErrors against double precision over the KV as stored, relative to the rms of the "
      "output.\n"
      "rows: c causal, the last tokens of a prompt; others decode over one shared prefix.\n";
  return text;
}

std::string to_json(const AccuracyReport& report) {
  nlohmann::json results = nlohmann::json::array();
  for (const AccuracyResult& result : report.results) {
    const AccuracyCase& c = result.problem;
    results.push_back({{"kv_type", to_string(c.kv_type)},
                       {"heads", c.kv_heads * c.group},
                       {"kv_heads", c.kv_heads},
                       {"head_dim", c.head_dim},
                       {"slots", c.slots},
                       {"rows", c.rows},
                       {"causal", c.causal},
                       {"values", to_string(c.values)},
                       {"ggml_flash", json_of(result.ggml_flash)},
                       {"relay", json_of(result.relay)}});
    if (result.ggml_softmax) results.back()["ggml_softmax"] = json_of(*result.ggml_softmax);
  }
  return nlohmann::json{
      {"cpu", cpu_model()}, {"isa", report.isa}, {"threads", report.threads}, {"results", results}}
      .dump(2);
}

}  // namespace relay::bench
