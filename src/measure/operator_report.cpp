// The two faces of an operator benchmark: a table for people, JSON for machines.
#include <nlohmann/json.hpp>
#include <utility>

#include "measure/format.h"
#include "measure/operator.h"
#include "measure/problem_json.h"
#include "relay_commit.h"

namespace relay::measure {
namespace {

/// Shares of the rooflines that a measurement reached.
struct Shares {
  double gflops, gbytes, compute, memory, floor;
};

Shares shares_of(const OpReport& report, const OpResult& result, const OpMeasurement& m) {
  const Roofline& roofline = report.roofline;
  const bool bf16 = uses_bf16(result.problem, report.isa);
  const double peak = bf16 && roofline.bf16_flops > 0 ? roofline.bf16_flops : roofline.f32_flops;
  const double seconds = m.time.median;
  return {.gflops = m.flops / seconds * 1e-9,
          .gbytes = m.bytes_read / seconds * 1e-9,
          .compute = m.flops / seconds / peak,
          .memory = m.bytes_read / seconds / roofline.read_bytes,
          // Against the least that the problem needs, not what this way of running it reads.
          .floor = roofline.time_floor(m.flops, result.ideal_bytes, bf16) / seconds};
}

std::string row(const OpReport& report, const OpResult& result, const OpMeasurement& m,
                const char* name) {
  const Shares shares = shares_of(report, result, m);
  return format(
      "  %-8s %11s %5.1f%% %8.1f %7.2f %9.1f %6.2fx %7.0f%% %7.0f%% %7.0f%% %6.1f%%   %s\n", name,
      duration(m.time.median).c_str(), 100 * m.time.spread(), shares.gflops, shares.gbytes,
      m.bytes_read / 1048576, m.bytes_read / result.ideal_bytes, 100 * shares.compute,
      100 * shares.memory, 100 * shares.floor, 100 * m.idle_share,
      duration(m.build_seconds + m.plan_seconds).c_str());
}

nlohmann::json json_of(const OpReport& report, const OpResult& result, const OpMeasurement& m) {
  const Shares shares = shares_of(report, result, m);
  return {{"seconds_median", m.time.median},
          {"seconds_quartile_low", m.time.low},
          {"seconds_quartile_high", m.time.high},
          {"seconds_best", m.time.best},
          {"seconds_predicted", m.predicted_seconds},
          {"build_seconds", m.build_seconds},
          {"plan_seconds", m.plan_seconds},
          {"flops", m.flops},
          {"kv_bytes_read", m.bytes_read},
          {"kv_bytes_read_per_ideal", m.bytes_read / result.ideal_bytes},
          {"gflops_per_second", shares.gflops},
          {"gbytes_per_second", shares.gbytes},
          {"share_of_compute_peak", shares.compute},
          {"share_of_read_peak", shares.memory},
          {"share_of_roofline", shares.floor},
          {"idle_share", m.idle_share},
          {"idle_share_predicted", m.predicted_idle_share},
          {"items", m.plan.items},
          {"partials", m.plan.partials},
          {"workspace_bytes", m.plan.workspace_bytes},
          {"kv_slots_read", m.plan.kv_slots_read},
          {"kv_slots_attended", m.plan.kv_slots_attended}};
}

}  // namespace

std::string to_table(const OpReport& report) {
  const Roofline& roofline = report.roofline;
  std::string text = format("%s, %d threads, kernels %s, commit %s\n", cpu_model().c_str(),
                            roofline.threads, report.isa.c_str(), kCommit);
  text += format("roofline of this run: f32 %.0f GFLOP/s", roofline.f32_flops * 1e-9);
  if (roofline.bf16_flops > 0) text += format(", bf16 %.0f GFLOP/s", roofline.bf16_flops * 1e-9);
  text += format(", read %.1f GB/s (%lld MiB streamed, cache %lld MiB)\n",
                 roofline.read_bytes * 1e-9, static_cast<long long>(roofline.buffer_bytes >> 20),
                 static_cast<long long>(roofline.cache_bytes >> 20));
  if (report.load > 0.5) {
    text += format("load average %.1f before the run: others were at work, mistrust the numbers\n",
                   report.load);
  }
  for (const OpResult& result : report.results) {
    const OpProblem& p = result.problem;
    text += format("\n%s", to_string(p.shape).c_str());
    text += format(
        ", %s KV%s, prefix %lld, context %lld, batch %d; KV %.1f MiB a layer, %d layers, "
        "%d rounds\n",
        to_string(p.kv_type), p.layout == KvLayout::kTiles ? " in tiles" : "",
        static_cast<long long>(p.prefix), static_cast<long long>(p.context), p.batch,
        result.ideal_bytes / 1048576, result.layers, result.rounds);
    text += format("  %-8s %11s %6s %8s %7s %9s %7s %8s %8s %8s %7s   %s\n", "sharing", "median",
                   "iqr", "GFLOP/s", "GB/s", "KV MiB", "reads", "compute", "memory", "roof", "idle",
                   "build+plan");
    text += row(report, result, result.on, "on");
    text += row(report, result, result.off, "off");
    text += format(
        "  speed-up %.2fx, predicted for memory-bound decode %.2fx; outputs differ by at "
        "most %.1e of their rms\n",
        result.speedup(), result.predicted, result.difference);
  }
  text +=
      "\n"
      "iqr: quartile distance over median. KV MiB: what the plan reads of the cache, reads: over\n"
      "one read of every slot.\n"
      "compute, memory: share of the measured peaks; KV that the kernels multiply as bf16 counts\n"
      "against the bf16 peak.\n"
      "roof: the least time the problem needs on this machine (one read, or all flops) over the\n"
      "time taken.\n"
      "idle: share of the threads' time that they waited for the last one.\n";
  return text;
}

std::string to_json(const OpReport& report) {
  const Roofline& roofline = report.roofline;
  nlohmann::json results = nlohmann::json::array();
  for (const OpResult& result : report.results) {
    nlohmann::json json = json_of(result.problem);
    json.update({{"layout", result.problem.layout == KvLayout::kTiles ? "tiles" : "rows"},
                 {"layers", result.layers},
                 {"rounds", result.rounds},
                 {"kv_bytes_ideal", result.ideal_bytes},
                 {"sharing_on", json_of(report, result, result.on)},
                 {"sharing_off", json_of(report, result, result.off)},
                 {"speedup", result.speedup()},
                 {"predicted_speedup", result.predicted},
                 {"outputs_differ_by", result.difference}});
    results.push_back(std::move(json));
  }
  const nlohmann::json json = {
      {"benchmark", "op"},
      {"machine",
       {{"cpu", cpu_model()}, {"threads", roofline.threads}, {"llc_bytes", roofline.cache_bytes}}},
      {"isa", report.isa},
      {"commit", kCommit},
      {"load_average_before", report.load},
      {"roofline",
       {{"f32_flops_per_second", roofline.f32_flops},
        {"bf16_flops_per_second", roofline.bf16_flops},
        {"read_bytes_per_second", roofline.read_bytes},
        {"streamed_bytes", roofline.buffer_bytes}}},
      {"results", results}};
  return json.dump(2);
}

}  // namespace relay::measure
