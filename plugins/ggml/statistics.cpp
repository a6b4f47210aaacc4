#include "statistics.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "relay/attention.h"

namespace relay::ggml {
namespace {

constexpr size_t kMaxRemembered = 1000;  // kinds of nodes; a host's are a handful

int64_t nanoseconds(Clock::duration d) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(d).count();
}

}  // namespace

Statistics& Statistics::instance() {
  static NeverDestroyed<Statistics> statistics;
  return statistics.get();
}

Statistics::Statistics() {
  const char* verbose = std::getenv("RELAY_VERBOSE");
  verbose_ = verbose != nullptr && std::strcmp(verbose, "0") != 0 && *verbose != '\0';
}

bool Statistics::first_time(const std::string& text) {
  const std::lock_guard lock(mutex_);
  return seen_.size() < kMaxRemembered && seen_.insert(text).second;
}

void Statistics::count_node(const ggml_tensor& node, Verdict verdict) {
  nodes_[static_cast<size_t>(verdict)].fetch_add(1, std::memory_order_relaxed);
  if (!verbose_) return;
  const std::string line = std::string(verdict == Verdict::kServed ? "served" : "handed on (") +
                           (verdict == Verdict::kServed ? "" : to_string(verdict)) +
                           (verdict == Verdict::kServed ? ": " : "): ") + describe(node);
  if (first_time(line)) std::fprintf(stderr, "relay: %s\n", line.c_str());
}

void Statistics::refused(const ggml_tensor& node, const char* message) {
  const std::string line = std::string(message) + " [" + describe(node) + "]";
  if (first_time(line)) std::fprintf(stderr, "relay: left to ggml: %s\n", line.c_str());
}

void Statistics::count_graph(Clock::duration total) {
  graphs_.fetch_add(1, std::memory_order_relaxed);
  graph_ns_.fetch_add(nanoseconds(total), std::memory_order_relaxed);
}

void Statistics::count_planning(Clock::duration spent) {
  plans_.fetch_add(1, std::memory_order_relaxed);
  planning_ns_.fetch_add(nanoseconds(spent), std::memory_order_relaxed);
}

std::string Statistics::json() const {
  std::string isa;
  try {
    isa = current_isa();
  } catch (const Error&) {  // RELAY_ISA changed since the module was loaded
    isa = "none";
  }
  std::string text = "{\n  \"version\": \"" RELAY_VERSION "\",\n  \"isa\": \"" + isa + "\"";
  const auto add = [&text](const char* name, int64_t value) {
    text += ",\n  \"" + std::string(name) + "\": " + std::to_string(value);
  };
  add("graphs", graphs_);
  add("graph_ns", graph_ns_);
  add("plans", plans_);
  add("planning_ns", planning_ns_);
  add("served", nodes_[static_cast<size_t>(Verdict::kServed)]);
  text += ",\n  \"handed_on\": {";
  const char* separator = "";
  for (size_t i = 1; i < nodes_.size(); ++i) {
    if (nodes_[i] == 0) continue;
    text += std::string(separator) + "\"" + to_string(static_cast<Verdict>(i)) +
            "\": " + std::to_string(nodes_[i]);
    separator = ", ";
  }
  return text + "}\n}\n";
}

void Statistics::report() {
  {
    const std::lock_guard lock(mutex_);
    seen_.clear();
  }
  if (verbose_) {
    int64_t handed_on = 0;
    std::string reasons;
    for (size_t i = 1; i < nodes_.size(); ++i) {
      if (nodes_[i] == 0) continue;
      handed_on += nodes_[i];
      reasons += std::string(reasons.empty() ? " (" : ", ") + to_string(static_cast<Verdict>(i)) +
                 " " + std::to_string(nodes_[i]);
    }
    if (!reasons.empty()) reasons += ')';
    std::fprintf(stderr, "relay: %lld attention nodes served, %lld handed on%s\n",
                 static_cast<long long>(nodes_[0]), static_cast<long long>(handed_on),
                 reasons.c_str());
    if (graphs_ > 0 && graph_ns_ > 0) {
      const double graphs = static_cast<double>(graphs_);
      std::fprintf(stderr,
                   "relay: planning took %.1f us for each of %lld graphs with attention "
                   "(%.2f plans each), %.2f %% of their time\n",
                   static_cast<double>(planning_ns_) / graphs / 1e3,
                   static_cast<long long>(graphs_), static_cast<double>(plans_) / graphs,
                   100.0 * static_cast<double>(planning_ns_) / static_cast<double>(graph_ns_));
    }
  }
  const char* path = std::getenv("RELAY_STATS_FILE");
  if (path == nullptr || *path == '\0') return;
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) {
    std::fprintf(stderr, "relay: RELAY_STATS_FILE=%s: %s\n", path, std::strerror(errno));
    return;
  }
  const std::string text = json();
  std::fwrite(text.data(), 1, text.size(), file);
  std::fclose(file);
}

}  // namespace relay::ggml
