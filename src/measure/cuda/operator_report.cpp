// The two faces of the operator's measurement on a GPU: a table for people, JSON for machines.
#include <nlohmann/json.hpp>
#include <utility>

#include "measure/cuda/operator.h"
#include "measure/cuda/plan_json.h"
#include "measure/format.h"
#include "measure/problem_json.h"
#include "relay_commit.h"

namespace relay::measure {
namespace {

/// Of the measured bandwidth: by what the plan reads, and by the least that the problem needs.
struct Shares {
  double gbytes, memory, ideal;
};

Shares shares_of(const GpuOpReport& report, const GpuOpResult& result, const GpuMeasurement& m) {
  const double seconds = m.time.median;
  return {.gbytes = m.bytes_read / seconds * 1e-9,
          .memory = m.bytes_read / seconds / report.limits.read_bytes,
          .ideal = result.ideal_bytes / seconds / report.limits.read_bytes};
}

std::string row(const GpuOpReport& report, const GpuOpResult& result, const GpuMeasurement& m,
                const char* name) {
  const Shares shares = shares_of(report, result, m);
  return format("  %-8s %11s %5.1f%% %8.1f %8.1f %9.1f %6.2fx %7.0f%% %7.0f%% %11s\n", name,
                duration(m.time.median).c_str(), 100 * m.time.spread(),
                m.plan.flops / m.time.median * 1e-12, shares.gbytes, m.bytes_read / 1048576,
                m.bytes_read / result.ideal_bytes, 100 * shares.memory, 100 * shares.ideal,
                duration(m.plan_time.median).c_str());
}

nlohmann::json json_of(const GpuOpReport& report, const GpuOpResult& result,
                       const GpuMeasurement& m) {
  const Shares shares = shares_of(report, result, m);
  return {{"seconds_median", m.time.median},
          {"seconds_quartile_low", m.time.low},
          {"seconds_quartile_high", m.time.high},
          {"seconds_best", m.time.best},
          {"plan_seconds", m.plan_time.median},
          {"flops", m.plan.flops},
          {"kv_bytes_read", m.bytes_read},
          {"kv_bytes_read_per_ideal", m.bytes_read / result.ideal_bytes},
          {"gbytes_per_second", shares.gbytes},
          {"share_of_read_peak", shares.memory},
          {"share_of_ideal", shares.ideal},
          {"plan", plan_json(m.plan)}};
}

}  // namespace

std::string to_table(const GpuOpReport& report) {
  const GpuLimits& limits = report.limits;
  std::string text = format("%s, commit %s\n", limits.gpu.c_str(), kCommit);
  text += format("limit of this run: read %.1f GB/s (%lld MiB streamed, cache %lld MiB)\n",
                 limits.read_bytes * 1e-9, static_cast<long long>(limits.stream_bytes >> 20),
                 static_cast<long long>(limits.l2_bytes >> 20));
  for (const GpuOpResult& result : report.results) {
    text += format("\n%s, %s; KV %.1f MiB a layer, kernels %s, %d rounds\n",
                   to_string(result.problem.shape).c_str(), to_string(result.problem).c_str(),
                   result.ideal_bytes / 1048576, result.path.c_str(), result.rounds);
    text += format("  %-8s %11s %6s %8s %8s %9s %7s %8s %8s %11s\n", "sharing", "median", "iqr",
                   "TFLOP/s", "GB/s", "KV MiB", "reads", "memory", "ideal", "plan");
    text += row(report, result, result.on, "on");
    text += row(report, result, result.off, "off");
    text += format(
        "  speed-up %.2fx, predicted for memory-bound decode %.2fx; outputs differ by at "
        "most %.1e of their rms\n",
        result.speedup(), relay_speedup(result.problem), result.difference);
  }
  text +=
      "\n"
      "iqr: quartile distance over median. KV MiB: what the plan reads of the cache, reads: over\n"
      "one read of every slot.\n"
      "memory: share of the measured bandwidth, more than all of it where requests that read the\n"
      "same KV find it in the L2 cache; ideal: the same, had every slot been read once.\n"
      "plan: finding the sharing and planning, once per step of a model.\n";
  return text;
}

std::string to_json(const GpuOpReport& report) {
  nlohmann::json results = nlohmann::json::array();
  for (const GpuOpResult& result : report.results) {
    nlohmann::json json = json_of(result.problem);
    json.update({{"kernels", result.path},
                 {"rounds", result.rounds},
                 {"kv_bytes_ideal", result.ideal_bytes},
                 {"sharing_on", json_of(report, result, result.on)},
                 {"sharing_off", json_of(report, result, result.off)},
                 {"speedup", result.speedup()},
                 {"predicted_speedup", relay_speedup(result.problem)},
                 {"outputs_differ_by", result.difference}});
    results.push_back(std::move(json));
  }
  const nlohmann::json json = {{"benchmark", "op"},
                               {"device", "cuda"},
                               {"commit", kCommit},
                               {"machine", json_of(report.limits)},
                               {"results", results}};
  return json.dump(2);
}

}  // namespace relay::measure
