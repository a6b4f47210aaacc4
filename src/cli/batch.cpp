// relay batch: OpenAI's batch format, JSON lines in and out, through the engine without a server.
#include <fcntl.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <unordered_set>

#include "cli/commands.h"
#include "cli/serve_options.h"
#include "engine/engine.h"
#include "relay/types.h"
#include "server/errors.h"
#include "server/json.h"
#include "server/json_fields.h"
#include "server/service.h"

namespace relay::cli {

namespace {

using server::Json;
using Clock = std::chrono::steady_clock;

struct BatchOptions {
  ServeOptions serve;
  std::string input;
  std::string output;
};

struct Line {
  std::string custom_id;
  std::string url;
  std::string body;
};

/// Throws ApiError.
Line parse_line(const std::string& text) {
  const Json json = server::parse_json(text);
  const server::JsonFields fields(json, "");
  Line line;
  line.custom_id = fields.require_string("custom_id", 1024);
  if (fields.require_string("method", 16) != "POST") {
    throw server::invalid_request("method", "'method' must be POST.");
  }
  line.url = fields.require_string("url", 1024);
  fields.require("body");
  line.body = server::dump(*fields.object("body"));
  return line;
}

/// Line by line, with bounded memory. Blank lines count but are skipped.
class LineReader {
 public:
  LineReader(const std::string& path, size_t max_bytes) : path_(path), max_bytes_(max_bytes) {
    file_.open(path, std::ios::binary);
    if (!file_) throw Error("the batch file '" + path + "' cannot be read");
  }
  bool next(Line& line) {
    std::string text;
    while (std::getline(file_, text)) {
      ++number_;
      if (text.find_first_not_of(" \t\r") == std::string::npos) continue;
      if (text.size() > max_bytes_)
        fail("it is longer than " + std::to_string(max_bytes_) + " bytes");
      try {
        line = parse_line(text);
      } catch (const server::ApiError& error) {
        fail(error.what());
      }
      return true;
    }
    if (file_.bad()) throw Error("the batch file '" + path_ + "' cannot be read to its end");
    return false;
  }
  int64_t number() const { return number_; }
  [[noreturn]] void fail(const std::string& why) const {
    throw Error("line " + std::to_string(number_) + " of '" + path_ + "': " + why);
  }

 private:
  const std::string path_;
  const size_t max_bytes_;
  std::ifstream file_;
  int64_t number_ = 0;
};

/// Where each custom_id stands.
using Lines = std::unordered_map<std::string, int64_t>;

/// Every line is looked at before the long work begins.
Lines check_input(const BatchOptions& options) {
  std::error_code none_yet;
  if (std::filesystem::equivalent(options.input, options.output, none_yet)) {
    throw Error("the result file '" + options.output + "' is the batch file; name another file");
  }
  LineReader reader(options.input, options.serve.server.max_body_bytes);
  Lines lines;
  Line line;
  while (reader.next(line)) {
    const auto [at, is_new] = lines.emplace(line.custom_id, reader.number());
    if (!is_new) {
      reader.fail("the custom_id '" + line.custom_id + "' is that of line " +
                  std::to_string(at->second) + ", too");
    }
  }
  if (lines.empty()) throw Error("the batch file '" + options.input + "' is empty");
  return lines;
}

/// The results: each one line, written at once, so that a killed run leaves whole lines and at most
/// one piece of a line behind.
class Output {
 public:
  explicit Output(const std::string& path) : path_(path) {
    file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (file_ < 0) throw Error("the result file '" + path + "' cannot be written");
    if (::flock(file_, LOCK_EX | LOCK_NB) != 0) {
      throw Error("another run is writing the result file '" + path + "'");
    }
    read_back();
  }
  ~Output() { ::close(file_); }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  bool has(const std::string& custom_id) const { return done_.contains(custom_id); }
  /// Lines of this run.
  int64_t written() const { return written_; }

  void write(const std::string& custom_id, int status, const Json& body) {
    const Json line{
        {"id", server::random_id("batch_req_")},  // kBegin
        {"custom_id", custom_id},
        {"response",
         {{"status_code", status}, {"request_id", server::random_id("req_")}, {"body", body}}},
        {"error", nullptr}};
    const std::string text = server::dump_line(line) + "\n";
    for (size_t at = 0; at < text.size();) {
      const ssize_t count = ::write(file_, text.data() + at, text.size() - at);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) {
        throw Error("the result file '" + path_ +
                    "' cannot be written: is the disk full? Run again to go on");
      }
      at += static_cast<size_t>(count);
    }
    done_.insert(custom_id);
    ++written_;
  }
  void sync() {
    if (::fsync(file_) != 0) throw Error("the result file '" + path_ + "' cannot be written");
  }

 private:
  static constexpr std::string_view kBegin = R"({"id":"batch_req_)";

  /// What earlier runs have done; the piece of a line at the end, if any, is cut off.
  void read_back() {
    std::ifstream file(path_, std::ios::binary);
    std::string text;
    off_t end = 0;
    while (std::getline(file, text)) {
      if (file.eof()) {  // no line feed: the run was killed here
        // Behind results anything: after a loss of power the end of a file may read as zeros.
        const size_t both = std::min(text.size(), kBegin.size());
        const bool may_be_ours = text.substr(0, both) == kBegin.substr(0, both);
        if (done_.empty() && !may_be_ours) refuse("its only line is none");
        break;
      }
      try {
        const Json json = server::parse_json(text);
        const server::JsonFields fields(json, "");
        fields.require("response");
        done_.insert(fields.require_string("custom_id", 1024));
      } catch (const server::ApiError& error) {
        refuse(error.what());
      }
      end += static_cast<off_t>(text.size()) + 1;
    }
    if (::ftruncate(file_, end) != 0 || ::lseek(file_, end, SEEK_SET) != end) {
      throw Error("the result file '" + path_ + "' cannot be written");
    }
  }
  [[noreturn]] void refuse(const std::string& why) const {
    throw Error("'" + path_ + "' holds something other than results of relay batch (" + why +
                "); name another file");
  }

  const std::string path_;
  int file_ = -1;
  std::unordered_set<std::string> done_;  // those of other batches, too
  int64_t written_ = 0;
};

/// A bar on a terminal, now and then a line elsewhere.
class Progress {
 public:
  Progress(int64_t total, int64_t before) : total_(total), before_(before) {}

  /// `here`: lines done by this run.
  void show(int64_t here, int64_t tokens, bool last) {
    const Clock::time_point now = Clock::now();
    if (!last && now < next_) return;
    next_ = now + (terminal_ ? std::chrono::milliseconds(200) : std::chrono::seconds(10));
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    const double speed = seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
    const int64_t done = before_ + here;
    const double left =
        here > 0 ? seconds / static_cast<double>(here) * static_cast<double>(total_ - done) : 0;
    constexpr int kWidth = 30;
    const int filled = static_cast<int>(done * kWidth / total_);
    std::fprintf(stderr, "%s[%s%s] %lld/%lld  %.0f tokens/s  %.0f s left%s", terminal_ ? "\r" : "",
                 std::string(static_cast<size_t>(filled), '#').c_str(),
                 std::string(static_cast<size_t>(kWidth - filled), '.').c_str(),
                 static_cast<long long>(done), static_cast<long long>(total_), speed, left,
                 terminal_ && !last ? "   " : "\n");
    std::fflush(stderr);
  }

 private:
  const int64_t total_;
  const int64_t before_;
  const bool terminal_ = ::isatty(STDERR_FILENO) == 1;
  const Clock::time_point begin_ = Clock::now();
  Clock::time_point next_ = begin_;
};

/// Many threads ring, one waits.
class Bell {
 public:
  void ring() {
    const std::lock_guard lock(mutex_);
    rung_ = true;
    changed_.notify_one();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return rung_; });
    rung_ = false;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool rung_ = false;
};

class Runner {
 public:
  Runner(server::Service& service, LineReader& input, Output& output, Progress& progress,
         size_t most)
      : service_(service), input_(input), output_(output), progress_(progress), most_(most) {}

  void run() {
    bool more = true;
    while (more || !jobs_.empty()) {
      while (more && !held_ && jobs_.size() < most_) more = start_next();
      progress_.show(output_.written(), tokens_, false);
      if (!jobs_.empty()) bell_->wait();
      collect();
    }
    output_.sync();
    progress_.show(output_.written(), tokens_, true);
  }
  int64_t failures() const { return failures_; }

 private:
  struct Job {
    std::string custom_id;
    std::unique_ptr<server::Generation> generation;
    server::ErrorForm error_form;
  };

  /// False: that was the last line.
  bool start_next() {
    if (!pending_) {
      Line line;
      do {
        if (!input_.next(line)) return false;
      } while (output_.has(line.custom_id));
      pending_ = std::move(line);
    }
    server::ErrorForm error_form = server::ErrorForm::kOpenAi;
    try {
      const server::Route route = server::find_route("POST", pending_->url);
      error_form = route.error_form;
      if (route.work != server::Work::kGeneration) {
        throw server::invalid_request(
            "url", "relay batch runs what generates, not " + pending_->url + ".");
      }
      std::unique_ptr<server::Generation> generation = service_.generate(
          route.endpoint, pending_->body, server::Caller(), [bell = bell_] { bell->ring(); });
      if (generation->stream()) {
        throw server::unsupported("stream", "A batch has whole answers only.");
      }
      jobs_.push_back({pending_->custom_id, std::move(generation), error_form});
    } catch (const server::ApiError& error) {
      if (error.status() == 429 && !jobs_.empty()) {
        held_ = true;  // until one of those that run is done
        return true;
      }
      fail(pending_->custom_id, error, error_form);
    }
    pending_.reset();
    return true;
  }

  void collect() {
    std::string unused;
    for (auto job = jobs_.begin(); job != jobs_.end();) {
      const server::Generation::State state = job->generation->advance(unused);
      if (state == server::Generation::State::kRunning) {
        ++job;
        continue;
      }
      if (state == server::Generation::State::kFailed) {
        fail(job->custom_id, job->generation->error(), job->error_form);
      } else {
        tokens_ += job->generation->usage().completion_tokens;
        output_.write(job->custom_id, 200, Json::parse(job->generation->body()));
      }
      job = jobs_.erase(job);
      held_ = false;
    }
  }

  void fail(const std::string& custom_id, const server::ApiError& error,
            server::ErrorForm error_form) {
    ++failures_;
    output_.write(custom_id, error.status(),
                  Json::parse(server::answer_error(error, error_form).body));
  }

  server::Service& service_;
  LineReader& input_;
  Output& output_;
  Progress& progress_;
  const size_t most_;
  const std::shared_ptr<Bell> bell_ = std::make_shared<Bell>();
  std::list<Job> jobs_;
  std::optional<Line> pending_;  // read, not yet taken by the engine
  bool held_ = false;
  int64_t tokens_ = 0;
  int64_t failures_ = 0;
};

void batch(BatchOptions options) {
  spdlog::set_default_logger(spdlog::stderr_color_mt("relay"));
  spdlog::set_level(spdlog::level::warn);
  prepare_engine_options(options.serve);
  const Lines lines = check_input(options);
  Output output(options.output);
  const auto total = static_cast<int64_t>(lines.size());
  const int64_t before = std::count_if(lines.begin(), lines.end(),
                                       [&](const auto& line) { return output.has(line.first); });
  if (before > 0) {
    std::fprintf(stderr, "%lld of %lld lines are done already\n", static_cast<long long>(before),
                 static_cast<long long>(total));
  }

  // What a single reader falls behind is this program's own memory.
  options.serve.server.max_queued_bytes = size_t{64} << 20;
  const std::shared_ptr<engine::Engine> engine = engine::Engine::load(options.serve.engine);
  server::Service service(options.serve.server);
  service.set_engine(engine);
  LineReader input(options.input, options.serve.server.max_body_bytes);
  Progress progress(total, before);
  // Twice as many as run, so that the engine never waits for us and still can choose.
  const auto most = size_t{2} * static_cast<size_t>(options.serve.engine.parallel);
  Runner runner(service, input, output, progress, most);
  runner.run();
  engine->stop();
  if (runner.failures() > 0) {
    std::fprintf(stderr, "%lld lines failed; their status_code is not 200\n",
                 static_cast<long long>(runner.failures()));
  }
}

}  // namespace

void add_batch(CLI::App& app) {
  const auto options = std::make_shared<BatchOptions>();
  CLI::App* batch_app = app.add_subcommand(
      "batch", "Answers a file of requests in OpenAI's batch format; goes on where it was ended");
  add_engine_options(*batch_app, options->serve);
  batch_app->add_option("input", options->input, "JSON lines {custom_id, method, url, body}")
      ->required()
      ->option_text("FILE");
  batch_app
      ->add_option("output", options->output,
                   "Results, a JSON line each, as they are done; what it holds is not done again")
      ->required()
      ->option_text("FILE");
  batch_app->footer(
      "Example:\n"
      "  relay batch -m model.gguf requests.jsonl results.jsonl\n"
      "Ended in any way and started again, it loses and repeats no line. The exit status is 0 "
      "when\n"
      "every line has its result, also if that is an error.");
  batch_app->callback([options] { batch(*options); });
}

}  // namespace relay::cli
