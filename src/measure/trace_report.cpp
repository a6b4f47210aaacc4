// What a trace shares, as a table for people and as JSON for machines.
#include <nlohmann/json.hpp>

#include "measure/format.h"
#include "measure/trace.h"
#include "relay_commit.h"

namespace relay::measure {
namespace {

nlohmann::json json_of(const TraceStep& step) {
  nlohmann::json levels = nlohmann::json::array();
  for (const SlotReads& level : step.levels) {
    levels.push_back({{"kv_slots_attended", level.attended}, {"kv_slots_read", level.read}});
  }
  return {{"time", step.time},
          {"batch", step.batch},
          {"kv_slots_attended", step.all.attended},
          {"kv_slots_read", step.all.read},
          {"levels", std::move(levels)},
          {"seconds_on", step.seconds_on},
          {"seconds_off", step.seconds_off}};
}

}  // namespace

std::string to_table(const TraceReport& report) {
  const TraceStep& mean = report.mean;
  std::string text =
      format("%lld requests, %zu steps looked at; %.1f requests decode at once, mean\n",
             static_cast<long long>(report.requests), report.steps.size(), mean.batch);
  text += format("%-10s %16s %14s %10s\n", "", "KV attended", "KV read", "of all");
  const auto line = [&](const std::string& name, const SlotReads& reads) {
    return format("%-10s %16.0f %14.0f %9.1f%%\n", name.c_str(), reads.attended, reads.read,
                  100 * reads.attended / mean.all.attended);
  };
  SlotReads own = mean.all;
  for (size_t i = 0; i < mean.levels.size(); ++i) {
    text += line(format("level %zu", i + 1), mean.levels[i]);
    own.attended -= mean.levels[i].attended;
    own.read -= mean.levels[i].read;
  }
  text += line("own", own) + line("all", mean.all);
  text += format("attention of a step: %s with sharing, %s without: %.2fx; reads alone: %.2fx\n",
                 duration(mean.seconds_on).c_str(), duration(mean.seconds_off).c_str(),
                 mean.seconds_off / mean.seconds_on, mean.all.attended / mean.all.read);
  text += "KV in slots of one layer, mean of the steps; times by the cost model, all layers.\n";
  return text;
}

std::string to_json(const TraceReport& report) {
  const TraceProblem& p = report.problem;
  nlohmann::json steps = nlohmann::json::array();
  for (const TraceStep& step : report.steps) steps.push_back(json_of(step));
  return nlohmann::json{{"benchmark", "trace"},
                        {"cpu", cpu_model()},
                        {"isa", report.isa},
                        {"commit", kCommit},
                        {"threads", p.threads},
                        {"heads", p.shape.q_heads},
                        {"kv_heads", p.shape.kv_heads},
                        {"head_dim", p.shape.qk_dim},
                        {"kv_type", to_string(p.kv_type)},
                        {"layers", p.layers},
                        {"token_seconds", p.token_seconds},
                        {"every", p.every},
                        {"max_batch", p.max_batch},
                        {"requests", report.requests},
                        {"read_bytes_per_second", report.roofline.read_bytes},
                        {"mean", json_of(report.mean)},
                        {"steps", std::move(steps)}}
      .dump(1);
}

}  // namespace relay::measure
