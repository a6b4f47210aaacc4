// Prefixes in a folder on disk, for the next start. Files are written by a thread of their own,
// each to a temporary file that is then renamed; whatever goes wrong with the disk is told once and
// disturbs nobody. The size of the folder is bounded, and the files used longest ago go first.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/kv_file.h"

namespace relay::engine {

struct PromptCacheOptions {
  std::filesystem::path folder;                    ///< is made if it is not there
  uint64_t max_bytes = 0;                          ///< of all files, those of other models included
  uint64_t piece_bytes = uint64_t{8} << 20;        ///< of KV, copied between two steps
  KvFileExpected expected;                         ///< its key is the base model's
  std::vector<std::string> adapter_keys;           ///< those of adapters 1, 2, ...
  std::function<void(const std::string&)> notice;  ///< from any thread; for people
};

class PromptCache {
 public:
  /// Throws EngineError (kInvalidRequest) if the folder cannot be used.
  explicit PromptCache(PromptCacheOptions options);
  /// Ends what is being written.
  ~PromptCache();
  PromptCache(const PromptCache&) = delete;
  PromptCache& operator=(const PromptCache&) = delete;

  struct Stored {
    std::filesystem::path path;
    KvFileHeader header;
    int32_t adapter = 0;
    std::filesystem::file_time_type used;
  };
  /// The files for this model, the last used first. Those that cannot be used are told and left,
  /// and so is how many are for others.
  std::vector<Stored> list();
  /// Each call hands over the next piece of a file; nothing, told, if it is broken.
  std::function<std::optional<std::vector<uint8_t>>()> read(const Stored& stored);

  /// Whether this prefix should be stored: it is not there yet. If it is, it counts as used.
  bool wants(int32_t adapter, const std::string& salt, const std::vector<Token>& tokens);

  // Storing: one prefix at a time, its KV in pieces.
  /// `within`: as in KvFileHeader.
  void begin(int32_t adapter, const std::string& salt, const std::string& within,
             const std::vector<Token>& tokens);
  /// A piece can be taken without waiting for the disk.
  bool ready() const;
  /// ready(), or the time is over.
  bool wait_ready(std::chrono::milliseconds time) const;
  /// The first token of the next piece, and how many it has; 0: all are there, or the disk failed.
  std::pair<int32_t, int32_t> next_piece() const;
  void add(std::vector<uint8_t> kv);
  /// The prefix is no longer there: what was written is removed.
  void abandon();
  /// Says that nothing more will be stored, and why.
  void give_up(const std::string& why);
  /// Waits until all that was added is on disk or has failed.
  void flush();

 private:
  struct File;  // being written
  struct Task {
    std::shared_ptr<File> file;
    std::vector<uint8_t> kv;
    bool abandon = false;
  };

  void run();
  void write(const Task& task);
  void make_room(uint64_t bytes, const std::filesystem::path& replaced);
  void forget_prefixes_of(const KvFileHeader& header);
  void fail(File& file, const std::string& what);
  void tell(const std::string& message) const { options_.notice("prompt cache: " + message); }
  const std::string& key_of(int32_t adapter) const;
  std::filesystem::path path_of(const std::string& key, const std::string& salt,
                                const std::vector<Token>& tokens) const;

  PromptCacheOptions options_;
  std::shared_ptr<File> current_;
  int32_t added_ = 0;  // pieces of it

  mutable std::mutex mutex_;  // guards what follows
  mutable std::condition_variable changed_;
  std::deque<Task> tasks_;
  bool writing_ = false;
  bool stopping_ = false;
  // What this process knows to be stored, to tell prefixes of each other.
  struct Known {
    std::string key;
    std::string salt;
    std::vector<Token> tokens;
  };
  std::map<std::filesystem::path, Known> known_;
  std::chrono::steady_clock::time_point paused_until_{};  // after a failure
  std::thread thread_;
};

}  // namespace relay::engine
