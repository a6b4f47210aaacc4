#include "engine/prompt_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <exception>
#include <random>
#include <system_error>

#include "engine/sha256.h"

namespace relay::engine {

namespace fs = std::filesystem;

namespace {

constexpr const char* kSuffix = ".kv";
constexpr const char* kTemporary = ".kv.tmp";
constexpr size_t kMostTasks = 4;
constexpr auto kPause = std::chrono::minutes(5);  // after a failure of the disk

std::string error_text() { return std::system_category().message(errno); }

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

bool write_all(int fd, const void* data, size_t size, uint64_t offset) {
  const auto* at = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const ssize_t written = ::pwrite(fd, at, size, static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    if (written == 0) {
      errno = ENOSPC;
      return false;
    }
    at += written;
    size -= static_cast<size_t>(written);
    offset += static_cast<uint64_t>(written);
  }
  return true;
}

bool read_all(int fd, std::span<uint8_t> to, uint64_t offset) {
  while (!to.empty()) {
    const ssize_t count = ::pread(fd, to.data(), to.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    to = to.subspan(static_cast<size_t>(count));
    offset += static_cast<uint64_t>(count);
  }
  return true;
}

/// What the names of a key's files begin with.
std::string name_of(const std::string& key) { return key.substr(0, 16) + '-'; }

/// Throws KvFileError.
KvFileSource open_source(const fs::path& path, std::optional<Descriptor>& holder) {
  holder.emplace(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  struct stat info{};
  if (holder->get() < 0 || ::fstat(holder->get(), &info) != 0) {
    throw KvFileError("cannot be opened: " + error_text());
  }
  if (!S_ISREG(info.st_mode)) throw KvFileError("is no file");
  if (info.st_uid != ::geteuid() || (info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    throw KvFileError("can be written by others");
  }
  return {static_cast<uint64_t>(info.st_size),
          [fd = holder->get()](uint64_t offset, std::span<uint8_t> to) {
            return read_all(fd, to, offset);
          }};
}

/// Processes share a folder, and in containers each may have the same number.
std::string random_name() {
  std::random_device source;
  char text[17];
  std::snprintf(text, sizeof(text), "%08x%08x", source(), source());
  return text;
}

/// A file that was not there, locked as long as it is open: whose lock can be had, nobody writes.
/// -1: see errno.
int create_locked(const fs::path& path) {
  for (;;) {
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    struct stat info{};
    if (fd < 0 || ::flock(fd, LOCK_EX) != 0 || ::fstat(fd, &info) != 0 || info.st_nlink > 0) {
      return fd;
    }
    ::close(fd);  // before it was locked, another process took it for abandoned
  }
}

void remove_abandoned(const fs::path& path) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (file.get() >= 0 && ::flock(file.get(), LOCK_EX | LOCK_NB) == 0) ::unlink(path.c_str());
}

bool begins_with(const std::vector<Token>& tokens, const std::vector<Token>& prefix) {
  return prefix.size() <= tokens.size() && std::equal(prefix.begin(), prefix.end(), tokens.begin());
}

}  // namespace

struct PromptCache::File {
  KvFileHeader header;
  fs::path path;
  fs::path temporary;
  int fd = -1;
  std::atomic<bool> failed = false;

  ~File() {
    if (fd < 0) return;  // renamed, or never made
    ::close(fd);
    ::unlink(temporary.c_str());
  }
};

PromptCache::PromptCache(PromptCacheOptions options) : options_(std::move(options)) {
  const fs::path& folder = options_.folder;
  const auto refuse = [&](const std::string& why) {
    throw EngineError(ErrorKind::kInvalidRequest,
                      "The prompt cache " + folder.string() + " cannot be used: " + why + ".");
  };
  // What is in it can be read back as text: it is for this user alone.
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) refuse(error_text());
  std::error_code error;
  if (!fs::is_directory(folder, error)) refuse("it is no folder");
  if (::access(folder.c_str(), R_OK | W_OK | X_OK) != 0) refuse(error_text());
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    if (entry.path().string().ends_with(kTemporary)) remove_abandoned(entry.path());
  }
  if (error) refuse(error.message());
  thread_ = std::thread([this] { run(); });
}

PromptCache::~PromptCache() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

const std::string& PromptCache::key_of(int32_t adapter) const {
  return adapter == 0 ? options_.expected.key
                      : options_.adapter_keys.at(static_cast<size_t>(adapter) - 1);
}

fs::path PromptCache::path_of(const std::string& key, const std::string& salt,
                              const std::vector<Token>& tokens) const {
  std::string bytes = salt + '\n';
  bytes.append(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(Token));
  const std::string id = sha256_hex(bytes);
  return options_.folder / (name_of(key) + id.substr(0, 32) + kSuffix);
}

// --- reading

std::vector<PromptCache::Stored> PromptCache::list() {
  std::vector<Stored> stored;
  std::error_code error;
  const auto adapters = static_cast<int32_t>(options_.adapter_keys.size());
  int foreign = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(options_.folder, error)) {
    const std::string name = entry.path().filename().string();
    int32_t adapter = 0;
    while (adapter <= adapters && !name.starts_with(name_of(key_of(adapter)))) ++adapter;
    if (!name.ends_with(kSuffix)) continue;
    if (adapter > adapters) {
      ++foreign;
      continue;
    }
    try {
      std::optional<Descriptor> holder;
      const KvFileSource source = open_source(entry.path(), holder);
      KvFileExpected expected = options_.expected;
      expected.key = key_of(adapter);
      Stored s{entry.path(), read_kv_header(source, expected), adapter, {}};
      s.used = entry.last_write_time(error);
      if (entry.path() != path_of(s.header.key, s.header.salt, s.header.tokens)) {
        throw KvFileError("has the name of another");
      }
      stored.push_back(std::move(s));
    } catch (const KvFileError& e) {
      tell(name + " is not used: it " + e.what() + ".");
    }
  }
  if (error) tell("the folder cannot be read: " + error.message());
  if (foreign > 0) {
    tell(std::to_string(foreign) + (foreign == 1 ? " file is" : " files are") +
         " of other models, KV types or versions, and not used.");
  }
  std::sort(stored.begin(), stored.end(),
            [](const Stored& a, const Stored& b) { return a.used > b.used; });
  const std::lock_guard lock(mutex_);
  for (const Stored& s : stored) known_[s.path] = {s.header.key, s.header.salt, s.header.tokens};
  return stored;
}

std::function<std::optional<std::vector<uint8_t>>()> PromptCache::read(const Stored& stored) {
  struct Open {
    std::optional<Descriptor> holder;
    KvFileSource source;
    uint32_t next = 0;
  };
  return [this, stored, open = std::make_shared<Open>()]() -> std::optional<std::vector<uint8_t>> {
    try {
      if (!open->holder) {
        open->source = open_source(stored.path, open->holder);
        if (open->source.size != stored.header.offset_of(stored.header.pieces())) {
          throw KvFileError("has changed");
        }
      }
      return read_kv_piece(open->source, stored.header, open->next++);
    } catch (const KvFileError& e) {
      tell(stored.path.filename().string() + " is not used: it " + e.what() + ".");
      const std::lock_guard lock(mutex_);
      known_.erase(stored.path);  // the prefix will be computed, and stored anew
      return std::nullopt;
    }
  };
}

// --- storing, for the engine thread

bool PromptCache::wants(int32_t adapter, const std::string& salt,
                        const std::vector<Token>& tokens) {
  if (tokens.size() > options_.expected.most_tokens) return false;
  const std::lock_guard lock(mutex_);
  for (auto it = known_.begin(); it != known_.end();) {
    const auto& [path, known] = *it;
    if (known.key != key_of(adapter) || known.salt != salt || !begins_with(known.tokens, tokens)) {
      ++it;
    } else if (::utimensat(AT_FDCWD, path.c_str(), nullptr, 0) == 0) {
      return false;
    } else {
      it = known_.erase(it);  // another process has made room
    }
  }
  return std::chrono::steady_clock::now() >= paused_until_;
}

void PromptCache::begin(int32_t adapter, const std::string& salt, const std::string& within,
                        const std::vector<Token>& tokens) {
  current_ = std::make_shared<File>();
  KvFileHeader& header = current_->header;
  header.key = key_of(adapter);
  header.salt = salt;
  header.within = within;
  header.tokens = tokens;
  header.token_bytes = options_.expected.token_bytes;
  const uint64_t piece =
      std::max<uint64_t>(1, options_.piece_bytes / std::max<uint64_t>(1, header.token_bytes));
  header.piece_tokens = static_cast<uint32_t>(std::min<uint64_t>(piece, tokens.size()));
  current_->path = path_of(header.key, salt, tokens);
  current_->temporary = current_->path.string() + '.' + random_name() + kTemporary;
  added_ = 0;
}

bool PromptCache::ready() const {
  const std::lock_guard lock(mutex_);
  return tasks_.size() < kMostTasks;
}

bool PromptCache::wait_ready(std::chrono::milliseconds time) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, time, [this] { return tasks_.size() < kMostTasks; });
}

std::pair<int32_t, int32_t> PromptCache::next_piece() const {
  const auto piece = static_cast<uint32_t>(added_);
  if (!current_ || current_->failed || piece >= current_->header.pieces()) return {0, 0};
  return {static_cast<int32_t>(piece * current_->header.piece_tokens),
          static_cast<int32_t>(current_->header.tokens_of(piece))};
}

void PromptCache::add(std::vector<uint8_t> kv) {
  ++added_;
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back({current_, std::move(kv), false});
  }
  changed_.notify_all();
}

void PromptCache::abandon() {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back({std::move(current_), {}, true});
  }
  changed_.notify_all();
}

void PromptCache::give_up(const std::string& why) {
  if (current_) abandon();
  tell("nothing more is stored: " + why);
}

void PromptCache::flush() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return tasks_.empty() && !writing_; });
}

// --- the thread that writes

void PromptCache::run() {
  // A limit on the size of files is an error like others, not the end of the process.
  sigset_t too_large;
  sigemptyset(&too_large);
  sigaddset(&too_large, SIGXFSZ);
  pthread_sigmask(SIG_BLOCK, &too_large, nullptr);
  for (;;) {
    Task task;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
      writing_ = true;
    }
    changed_.notify_all();
    try {
      if (!task.file->failed) write(task);
    } catch (const std::exception& e) {  // a folder that cannot be read to its end, for one
      fail(*task.file, e.what());
    }
    task = {};
    {
      const std::lock_guard lock(mutex_);
      writing_ = false;
    }
    changed_.notify_all();
  }
}

void PromptCache::fail(File& file, const std::string& what) {
  file.failed = true;
  {
    const std::lock_guard lock(mutex_);
    paused_until_ = std::chrono::steady_clock::now() + kPause;
  }
  tell(file.path.filename().string() + " was not written: " + what +
       ". Serving goes on without it.");
}

void PromptCache::write(const Task& task) {
  File& file = *task.file;
  if (task.abandon) {
    file.failed = true;
    return;
  }
  KvFileHeader& header = file.header;
  const uint64_t size = header.offset_of(header.pieces());
  if (header.digests.empty()) {
    if (size > options_.max_bytes) {
      fail(file, "it needs " + std::to_string(size) + " bytes, the prompt cache may have " +
                     std::to_string(options_.max_bytes));
      return;
    }
    make_room(size, file.path);
    file.fd = create_locked(file.temporary);
    if (file.fd < 0) return fail(file, error_text());
  }
  const auto piece = static_cast<uint32_t>(header.digests.size());
  if (task.kv.size() != header.tokens_of(piece) * header.token_bytes) {
    return fail(file, "a piece has another size");
  }
  header.digests.push_back(sha256_hex(task.kv));
  if (!write_all(file.fd, task.kv.data(), task.kv.size(), header.offset_of(piece))) {
    return fail(file, error_text());
  }
  if (piece + 1 < header.pieces()) return;
  const std::string head = encode_kv_header(header);
  if (!write_all(file.fd, head.data(), head.size(), 0) || ::fsync(file.fd) != 0 ||
      ::rename(file.temporary.c_str(), file.path.c_str()) != 0) {
    return fail(file, error_text());
  }
  ::close(std::exchange(file.fd, -1));
  const Descriptor folder(::open(options_.folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() >= 0) ::fsync(folder.get());
  {
    const std::lock_guard lock(mutex_);
    known_[file.path] = {header.key, header.salt, header.tokens};
  }
  forget_prefixes_of(header);
}

void PromptCache::make_room(uint64_t bytes, const fs::path& replaced) {
  struct Entry {
    fs::path path;
    uint64_t bytes;
    fs::file_time_type used;
  };
  std::vector<Entry> entries;
  uint64_t total = bytes;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(options_.folder, error)) {
    const std::string name = entry.path().filename().string();
    const bool temporary = name.ends_with(kTemporary);
    if (temporary) remove_abandoned(entry.path());
    if ((!temporary && !name.ends_with(kSuffix)) || entry.path() == replaced) continue;
    const uint64_t size = fs::file_size(entry.path(), error);
    if (error) continue;
    total += size;
    if (!temporary) entries.push_back({entry.path(), size, entry.last_write_time(error)});
  }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.used < b.used; });
  for (const Entry& entry : entries) {
    if (total <= options_.max_bytes) return;
    if (!fs::remove(entry.path, error)) continue;
    total -= entry.bytes;
    const std::lock_guard lock(mutex_);
    known_.erase(entry.path);
  }
}

void PromptCache::forget_prefixes_of(const KvFileHeader& header) {
  std::vector<fs::path> shorter;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [path, known] : known_) {
      if (known.key == header.key && known.salt == header.salt &&
          known.tokens.size() < header.tokens.size() && begins_with(header.tokens, known.tokens)) {
        shorter.push_back(path);
      }
    }
    for (const fs::path& path : shorter) known_.erase(path);
  }
  std::error_code ignored;
  for (const fs::path& path : shorter) fs::remove(path, ignored);
}

}  // namespace relay::engine
