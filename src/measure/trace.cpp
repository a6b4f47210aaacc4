#include "measure/trace.h"

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <queue>

#include "cpu/plan/cost_model.h"
#include "cpu/plan/plan.h"
#include "cpu/plan/schedule.h"
#include "relay/attention.h"
#include "relay/forest.h"

namespace relay::measure {
namespace {

int64_t whole_number(const nlohmann::json& object, const char* name, int64_t least) {
  const auto found = object.find(name);
  if (found == object.end() || !found->is_number_integer() || found->get<int64_t>() < least) {
    throw Error(std::string("'") + name + "' has to be a whole number from " +
                std::to_string(least));
  }
  return found->get<int64_t>();
}

TraceRequest request_of(const nlohmann::json& object, int64_t block_size) {
  if (!object.is_object()) throw Error("this is no JSON object");
  TraceRequest request;
  request.arrival = 1e-3 * static_cast<double>(whole_number(object, "timestamp", 0));
  request.prompt = whole_number(object, "input_length", 1);
  request.answer = whole_number(object, "output_length", 1);
  const auto ids = object.find("hash_ids");
  if (ids == object.end() || !ids->is_array()) throw Error("'hash_ids' has to be an array");
  for (const nlohmann::json& id : *ids) {
    if (!id.is_number_integer() || id < 0 || id > INT32_MAX / 2) {
      throw Error("'hash_ids' has to hold whole numbers from 0 to 2^30");
    }
    request.blocks.push_back(id.get<int32_t>());
  }
  const int64_t needed = (request.prompt + block_size - 1) / block_size;
  if (static_cast<int64_t>(request.blocks.size()) != needed) {
    throw Error("'hash_ids' has " + std::to_string(request.blocks.size()) + " blocks, but " +
                std::to_string(request.prompt) + " tokens are " + std::to_string(needed) +
                " blocks of " + std::to_string(block_size));
  }
  return request;
}

/// When each request begins to decode: at once, or when one before it has ended.
std::vector<double> starts_of(const Trace& trace, const TraceProblem& problem) {
  std::priority_queue<double, std::vector<double>, std::greater<>> ends;
  std::vector<double> starts;
  for (const TraceRequest& request : trace.requests) {
    double start = request.arrival;
    if (problem.max_batch > 0 && ends.size() == static_cast<size_t>(problem.max_batch)) {
      start = std::max(start, ends.top());
      ends.pop();
    }
    starts.push_back(start);
    ends.push(start + static_cast<double>(request.answer) * problem.token_seconds);
  }
  return starts;
}

/// The block tables of the requests that decode in one step.
class Batch {
 public:
  Batch(int64_t block_size, int32_t first_own_block)
      : block_size_(block_size), next_own_(first_own_block) {}

  void add(const TraceRequest& request, int64_t generated) {
    // Tokens answered follow the prompt, so its last block is the request's own if it is not full.
    std::vector<int32_t> table(request.blocks.begin(),
                               request.blocks.begin() + request.prompt / block_size_);
    lengths_.push_back(request.prompt + generated);
    const int64_t blocks = (lengths_.back() + block_size_ - 1) / block_size_;
    while (static_cast<int64_t>(table.size()) < blocks) table.push_back(next_own_++);
    tables_.push_back(std::move(table));
  }
  bool empty() const { return tables_.empty(); }
  int32_t size() const { return static_cast<int32_t>(tables_.size()); }

  void build(Sharing sharing, Forest& forest) const {
    size_t stride = 0;
    for (const auto& table : tables_) stride = std::max(stride, table.size());
    std::vector<int32_t> flat(stride * tables_.size());
    std::vector<int32_t> rows(tables_.size() + 1);
    for (size_t i = 0; i < tables_.size(); ++i) {
      std::copy(tables_[i].begin(), tables_[i].end(),
                flat.begin() + static_cast<ptrdiff_t>(i * stride));
      rows[i + 1] = static_cast<int32_t>(i + 1);
    }
    build_from_block_tables({.requests = size(),
                             .row_offsets = rows,
                             .kv_lengths = lengths_,
                             .table = flat.data(),
                             .table_stride = static_cast<int64_t>(stride),
                             .block_size = block_size_},
                            sharing, forest);
  }

 private:
  int64_t block_size_;
  int32_t next_own_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<int64_t> lengths_;
};

/// A forest names parents before their children.
void count(const Forest& forest, TraceStep& step) {
  std::vector<size_t> depth(static_cast<size_t>(forest.rows));
  for (const Segment& segment : forest.segments) {
    const SlotReads reads = {.attended = static_cast<double>(segment.slots) * segment.rows(),
                             .read = static_cast<double>(segment.slots)};
    step.all.attended += reads.attended;
    step.all.read += reads.read;
    if (segment.rows() < 2) continue;
    const size_t level = depth[forest.rows_of(segment)[0]];
    for (uint32_t row : forest.rows_of(segment)) depth[row] = level + 1;
    if (step.levels.size() <= level) step.levels.resize(level + 1);
    step.levels[level].attended += reads.attended;
    step.levels[level].read += reads.read;
  }
}

void add(TraceStep& sum, const TraceStep& step) {
  sum.batch += step.batch;
  sum.all.attended += step.all.attended;
  sum.all.read += step.all.read;
  sum.levels.resize(std::max(sum.levels.size(), step.levels.size()));
  for (size_t i = 0; i < step.levels.size(); ++i) {
    sum.levels[i].attended += step.levels[i].attended;
    sum.levels[i].read += step.levels[i].read;
  }
  sum.seconds_on += step.seconds_on;
  sum.seconds_off += step.seconds_off;
}

TraceStep divided(TraceStep sum, double by) {
  for (double* value :
       {&sum.batch, &sum.all.attended, &sum.all.read, &sum.seconds_on, &sum.seconds_off}) {
    *value /= by;
  }
  for (SlotReads& level : sum.levels) {
    level.attended /= by;
    level.read /= by;
  }
  return sum;
}

void check(const Trace& trace, const TraceProblem& p) {
  if (trace.requests.empty()) throw Error("bench trace: there is no request in the trace");
  if (p.layers < 1 || p.threads < 1) throw Error("bench trace: needs a layer and a thread");
  if (!(p.token_seconds > 0)) throw Error("bench trace: a token takes more than 0 s");
  if (!(p.every > 0)) throw Error("bench trace: steps lie more than 0 s apart");
  if (p.max_batch < 0) throw Error("bench trace: --max-batch is 0 or more");
}

}  // namespace

Trace read_trace(std::istream& lines, int64_t block_size) {
  if (block_size < 1) throw Error("bench trace: a block has at least one token");
  Trace trace{.block_size = block_size, .requests = {}};
  std::string line;
  for (int64_t number = 1; std::getline(lines, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      trace.requests.push_back(request_of(nlohmann::json::parse(line), block_size));
    } catch (const std::exception& error) {
      throw Error("trace, line " + std::to_string(number) + ": " + error.what());
    }
  }
  std::stable_sort(trace.requests.begin(), trace.requests.end(),
                   [](const auto& a, const auto& b) { return a.arrival < b.arrival; });
  return trace;
}

TraceReport analyse(const Trace& trace, const TraceProblem& problem, const Roofline& roofline) {
  check(trace, problem);
  const PlanOptions options = {.shape = problem.shape,
                               .k_type = problem.kv_type,
                               .v_type = problem.kv_type,
                               .threads = problem.threads};
  check_options(options);
  const CostModel costs = measured_costs(options, roofline.read_bytes);
  const std::vector<double> starts = starts_of(trace, problem);
  int32_t last_block = 0;
  double end = 0;
  for (size_t i = 0; i < starts.size(); ++i) {
    const TraceRequest& request = trace.requests[i];
    for (int32_t block : request.blocks) last_block = std::max(last_block, block);
    end = std::max(end, starts[i] + static_cast<double>(request.answer) * problem.token_seconds);
  }

  TraceReport report{.problem = problem,
                     .roofline = roofline,
                     .isa = current_isa(),
                     .requests = static_cast<int64_t>(starts.size()),
                     .steps = {},
                     .mean = {}};
  const double first = trace.requests.front().arrival;
  const auto count_of_steps = static_cast<int64_t>((end - first) / problem.every) + 1;
  Forest forest;
  for (int64_t number = 0; number < count_of_steps; ++number) {
    const double time = first + static_cast<double>(number) * problem.every;
    Batch batch(trace.block_size, last_block + 1);
    for (size_t i = 0; i < starts.size() && trace.requests[i].arrival <= time; ++i) {
      const auto generated = static_cast<int64_t>((time - starts[i]) / problem.token_seconds);
      if (time >= starts[i] && generated < trace.requests[i].answer) {
        batch.add(trace.requests[i], generated + 1);
      }
    }
    if (batch.empty()) continue;
    TraceStep step;
    step.time = time - first;
    step.batch = batch.size();
    for (Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
      batch.build(sharing, forest);
      if (sharing == Sharing::kOn) count(forest, step);
      const double seconds = simulate(*make_plan(forest, options), costs).seconds;
      (sharing == Sharing::kOn ? step.seconds_on : step.seconds_off) = problem.layers * seconds;
    }
    add(report.mean, step);
    report.steps.push_back(std::move(step));
  }
  if (report.steps.empty()) {
    throw Error("bench trace: no request decodes in any of the steps looked at; lower --every");
  }
  report.mean = divided(report.mean, static_cast<double>(report.steps.size()));
  return report;
}

}  // namespace relay::measure
