// Prefixes on disk: what comes back is what was stored, and nothing else does, whatever the files
// and the disk are like.
#include "engine/prompt_cache.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <utility>

#include "engine/engine_core.h"
#include "engine/fake_model.h"
#include "engine/kv_state.h"

namespace relay::engine {
namespace {

namespace fs = std::filesystem;
using Tokens = std::vector<Token>;

const std::string kKey(64, 'a');

Tokens sequence_of(int32_t count, unsigned seed) {
  std::mt19937 random(seed);
  Tokens tokens(static_cast<size_t>(count));
  for (Token& t : tokens) t = static_cast<Token>(random() % 61);
  return tokens;
}

class PromptCacheTest : public testing::Test {
 protected:
  PromptCacheTest() { fs::remove_all(folder); }
  ~PromptCacheTest() override { fs::remove_all(folder); }

  PromptCacheOptions options() {
    PromptCacheOptions o;
    o.folder = folder;
    o.max_bytes = 1 << 20;
    o.piece_bytes = 256;  // many pieces, and a last one that is shorter
    o.expected = {.key = kKey,
                  .token_bytes = FakeModel::kBytesPerToken,
                  .most_tokens = 1000,
                  .vocabulary = 61};
    o.notice = [this](const std::string& text) {
      const std::lock_guard lock(mutex);
      notices += text + '\n';
    };
    return o;
  }
  /// An engine, with an adapter for each key, from its start to its end; `use` is what happens in
  /// between.
  EngineStats engine(const std::function<void(FakeModel&, EngineCore&)>& use,
                     const PromptCacheOptions& o, int32_t cells = 2000) {
    FakeModel model(cells);
    PromptCache cache(o);
    CoreOptions c;
    c.step_seconds = 0;
    c.scheduler.adapters = static_cast<int32_t>(o.adapter_keys.size());
    c.adapters = o.adapter_keys;
    c.pin_budget = 0.5;
    EngineCore core(model, model, c, &cache);
    core.restore_prompts({});
    core.kv().validate();
    EXPECT_EQ(core.kv().cells_used(), model.used());
    const EngineStats stats = core.stats();
    if (use) use(model, core);
    core.store_prompts(std::chrono::seconds(10));
    cache.flush();
    core.kv().validate();
    return stats;
  }
  static void pin(EngineCore& core, const Tokens& tokens, const std::string& salt = {},
                  int32_t adapter = 0) {
    PinRequest request;
    request.adapter = adapter;
    request.tokens = tokens;
    request.cache_salt = salt;
    bool pinned = false;
    core.pin(request, {{},
                       [&](const PinnedPrompt&) { pinned = true; },
                       [](ErrorKind, const std::string& why) { ADD_FAILURE() << why; }});
    while (!pinned && core.step()) {
    }
    EXPECT_TRUE(pinned);
  }
  static void submit(EngineCore& core, RequestId id, const Tokens& prompt, const std::string& salt,
                     const std::string& pin_salt = {}) {
    class Quiet : public Sink {
      void on_tokens(int32_t, TokensDelta) override {}
      void on_choice_finish(int32_t, FinishReason, const std::string&) override {}
      void on_done(const Usage&, const RequestTimings&) override {}
      void on_error(ErrorKind, const std::string& why) override { ADD_FAILURE() << why; }
    };
    auto r = std::make_unique<Request>();
    r->id = id;
    r->sink = std::make_shared<Quiet>();
    r->prompt = prompt;
    r->cache_salt = salt;
    r->pin_salt = pin_salt;
    r->max_tokens = 3;
    r->samplers.push_back(std::make_unique<GreedySampler>());
    core.submit(std::move(r));
  }
  static void ask(EngineCore& core, RequestId id, const Tokens& prompt, const std::string& salt,
                  const std::string& pin_salt = {}) {
    submit(core, id, prompt, salt, pin_salt);
    while (!core.idle()) core.step();
  }
  /// So many requests that begin with the same tokens, and go on each in its own way.
  static void ask_over(EngineCore& core, const Tokens& shared, unsigned count) {
    for (unsigned i = 0; i < count; ++i) {
      Tokens prompt = shared;
      for (const Token t : sequence_of(50, 1000 * count + i)) prompt.push_back(t);
      ask(core, i + 1, prompt, "tenant");
    }
  }
  std::vector<fs::path> files() const {
    std::vector<fs::path> paths;
    for (const auto& entry : fs::directory_iterator(folder)) paths.push_back(entry.path());
    std::sort(paths.begin(), paths.end());
    return paths;
  }
  static std::string content(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static void write(const fs::path& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  }

  const fs::path folder =
      fs::temp_directory_path() / ("relay-prompt-cache-test-" + std::to_string(::getpid()));
  std::mutex mutex;
  std::string notices;
};

TEST_F(PromptCacheTest, APinnedPromptNeedsNoPrefillAtTheNextStart) {
  const Tokens prompt = sequence_of(700, 1);
  engine([&](FakeModel&, EngineCore& core) { pin(core, prompt); }, options());
  ASSERT_EQ(files().size(), 1u);
  struct stat info{};
  ASSERT_EQ(::stat(files()[0].c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  ASSERT_EQ(::stat(folder.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  const EngineStats restored = engine(
      [&](FakeModel& model, EngineCore& core) {
        pin(core, prompt);
        EXPECT_EQ(model.rows_computed, 0);
        EXPECT_EQ(core.kv().cells_pinned(), 700);
        bool held = false;
        for (SeqId s = 0; s < kMaxSequences; ++s) held = held || model.tokens_of(s) == prompt;
        EXPECT_TRUE(held) << "each position has its own KV";
      },
      options());
  EXPECT_EQ(restored.restored_tokens, 700);
  EXPECT_EQ(notices, "");
}

TEST_F(PromptCacheTest, WhatManyShareIsKeptAndTheRestIsNot) {
  const Tokens system = sequence_of(100, 2);
  engine(
      [&](FakeModel&, EngineCore& core) {
        ask_over(core, system, 8);
        ask(core, 9, sequence_of(300, 3), "tenant");
      },
      options());
  ASSERT_EQ(files().size(), 1u);
  const std::string bytes = content(files()[0]);
  EXPECT_EQ(bytes.find("tenant"), std::string::npos) << "a salt is a secret";
  engine(
      [&](FakeModel&, EngineCore& core) {
        const auto cached = [&](const std::string& salt) {
          return core.kv().cached_prefix({0, core.kv().salt(salt)}, system, 100);
        };
        EXPECT_EQ(core.stats().restored_tokens, 100);
        EXPECT_EQ(cached("tenant"), 100);
        EXPECT_EQ(cached("another"), 0) << "nothing crosses tenants on disk either";
        EXPECT_EQ(cached(""), 0);
      },
      options());
}

TEST_F(PromptCacheTest, EqualPromptsOfDifferentSaltsShareNothingInMemoryOrOnDisk) {
  constexpr int32_t kTokens = 33;
  constexpr int32_t kStored = 50;
  constexpr int32_t kKept = kTokens + 2;  // and of the completion all but its last token
  const Tokens prompt = sequence_of(kTokens, 41);
  const auto tenant = [](int i) { return "tenant " + std::to_string(i); };
  // Sixty salts at a time, running side by side: each is a pair with each other.
  const auto ask_side_by_side = [&](EngineCore& core, int first, int count) {
    RequestId id = 0;
    for (int i = first; i < first + count; i += 60) {
      for (int s = i; s < std::min(i + 60, first + count); ++s) {
        submit(core, ++id, prompt, tenant(s));
      }
      int32_t most = 0;
      while (!core.idle()) {
        core.step();
        ASSERT_EQ(core.stats().shared_group_size, 0);
        most = std::max(most, core.stats().running);
      }
      ASSERT_GE(most, std::min(60, first + count - i)) << "they did not run together";
    }
    EXPECT_EQ(core.stats().kv_tokens_read_shared, 0);
    EXPECT_EQ(core.stats().kv_tokens_saved, 0);
  };
  const PromptCacheOptions many = options();
  engine(
      [&](FakeModel&, EngineCore& core) {
        ask_side_by_side(core, 0, 2000);
        EXPECT_EQ(core.stats().prefix_queries, 2000 * kTokens);
        EXPECT_EQ(core.stats().prefix_hits, 0);
        core.kv().clear_cache();
        // Often enough to be stored.
        for (int i = 0; i < 4 * kStored; ++i) ask(core, 1, prompt, tenant(i % kStored));
        EXPECT_EQ(core.stats().prefix_hits, 3 * kStored * (kTokens - 1));
      },
      many, 2500);
  EXPECT_EQ(files().size(), size_t{kStored});
  engine(
      [&](FakeModel&, EngineCore& core) {
        EXPECT_EQ(core.stats().restored_tokens, kStored * kKept);
        EXPECT_EQ(core.kv().cells_used(), kStored * kKept) << "each has cells of its own";
        for (int i = 0; i < kStored; ++i) {
          EXPECT_EQ(core.kv().cached_prefix({0, core.kv().salt(tenant(i))}, prompt, kTokens),
                    kTokens);
        }
        ask_side_by_side(core, 2000, 600);
        EXPECT_EQ(core.stats().prefix_hits, 0);
      },
      many, 4500);
}

TEST_F(PromptCacheTest, WhatFewShareAndWhatIsShortIsNotKept) {
  engine([&](FakeModel&, EngineCore& core) { ask_over(core, sequence_of(100, 30), 3); }, options());
  EXPECT_TRUE(files().empty()) << "two others shared it, three would count";
  engine([&](FakeModel&, EngineCore& core) { ask_over(core, sequence_of(31, 31), 8); }, options());
  EXPECT_TRUE(files().empty()) << "31 tokens";
  engine([&](FakeModel&, EngineCore& core) { ask_over(core, sequence_of(32, 32), 4); }, options());
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(PromptCacheTest, EachSaltHasItsOwnFile) {
  const Tokens prompt = sequence_of(200, 33);
  engine([&](FakeModel&, EngineCore& core) { pin(core, prompt, "one"); }, options());
  engine([&](FakeModel&, EngineCore& core) { pin(core, prompt, "two"); }, options());
  EXPECT_EQ(files().size(), 2u);
}

TEST_F(PromptCacheTest, WhatGoesOnFromAPinOfItsSaltComesBackOnTopOfIt) {
  const Tokens pinned = sequence_of(300, 34);
  Tokens prompt = pinned;
  for (const Token t : sequence_of(50, 42)) prompt.push_back(t);
  engine(
      [&](FakeModel&, EngineCore& core) {
        pin(core, pinned, "group");
        for (RequestId id = 1; id <= 4; ++id) ask(core, id, prompt, "tenant", "group");
      },
      options());
  std::vector<fs::path> both = files();
  ASSERT_EQ(both.size(), 2u);
  const auto now = fs::file_time_type::clock::now();
  for (const int newer : {0, 1}) {
    fs::last_write_time(both[static_cast<size_t>(newer)], now);
    fs::last_write_time(both[static_cast<size_t>(1 - newer)], now - std::chrono::hours(1));
    engine(
        [&](FakeModel& model, EngineCore& core) {
          // Of the completion all but its last token.
          EXPECT_EQ(core.kv().cells_used(), 350 + 2) << "the pinned tokens are there once";
          pin(core, pinned, "group");
          EXPECT_EQ(model.rows_computed, 0);
          EXPECT_EQ(core.kv().cells_pinned(), 300);
          EXPECT_EQ(core.kv().cells_used(), 350 + 2);
        },
        options());
  }
  EXPECT_EQ(notices, "");
}

TEST_F(PromptCacheTest, EachAdapterHasItsOwnFilesWhateverItsPlace) {
  const Tokens prompt = sequence_of(200, 35);
  const auto with_adapters = [&](const std::vector<std::string>& keys) {
    PromptCacheOptions o = options();
    o.adapter_keys = keys;
    return o;
  };
  const std::string one(64, 'b');
  const std::string two(64, 'c');
  engine([&](FakeModel&, EngineCore& core) { pin(core, prompt, {}, 2); },
         with_adapters({one, two}));
  ASSERT_EQ(files().size(), 1u);
  const auto cached = [&](EngineCore& core) {
    std::vector<int32_t> tokens;
    for (int32_t a = 0; a <= 2; ++a)
      tokens.push_back(core.kv().cached_prefix({a, {}}, prompt, 200));
    return tokens;
  };
  // In another order, and without it: what was stored belongs to the file, not to its place.
  engine(
      [&](FakeModel& model, EngineCore& core) {
        EXPECT_EQ(cached(core), (std::vector<int32_t>{0, 200, 0}));
        pin(core, prompt, {}, 1);
        EXPECT_EQ(model.rows_computed, 0);
        pin(core, prompt);
        EXPECT_EQ(model.rows_computed, 200) << "the base model's is another";
      },
      with_adapters({two, one}));
  EXPECT_EQ(files().size(), 2u);
  engine([&](FakeModel&,
             EngineCore& core) { EXPECT_EQ(cached(core), (std::vector<int32_t>{200, 0, 0})); },
         with_adapters({one}));
  EXPECT_EQ(notices,
            "prompt cache: 1 file is of other models, KV types or versions, and not used.\n");
}

TEST_F(PromptCacheTest, WhatIsForAllComesBackFirstAndIsShared) {
  const Tokens prompt = sequence_of(300, 34);
  const Tokens shorter(prompt.begin(), prompt.begin() + 200);
  engine([&](FakeModel&, EngineCore& core) { pin(core, prompt, "tenant"); }, options());
  ASSERT_EQ(files().size(), 1u);
  fs::last_write_time(files()[0], fs::file_time_type::clock::now() - std::chrono::hours(1));
  engine([&](FakeModel&, EngineCore& core) { pin(core, shorter); }, options());
  ASSERT_EQ(files().size(), 2u);
  engine([&](FakeModel&, EngineCore& core) { EXPECT_EQ(core.kv().cells_used(), 300); }, options());
}

TEST_F(PromptCacheTest, ADamagedFileIsRefusedAndComputedAnew) {
  const Tokens prompt = sequence_of(300, 4);
  const auto start = [&] {
    const auto use = [&](FakeModel&, EngineCore& core) { pin(core, prompt); };
    return engine(use, options()).restored_tokens;
  };
  start();
  ASSERT_EQ(files().size(), 1u);
  const fs::path path = files()[0];
  const std::string whole = content(path);
  ASSERT_EQ(start(), 300);
  const auto damaged = [&](const std::string& bytes, const std::string& says) {
    write(path, bytes);
    notices.clear();
    EXPECT_EQ(start(), 0) << says;
    EXPECT_NE(notices.find(says), std::string::npos) << notices;
    EXPECT_EQ(content(path), whole) << "stored anew";
  };
  damaged("", "cut short");
  damaged(whole.substr(0, 100), "cut short");
  damaged(whole.substr(0, whole.size() - 1), "cut short");
  damaged(whole + "x", "too long");
  for (const size_t at : {size_t{0}, size_t{10}, size_t{80}, size_t{136}, size_t{200}, size_t{204},
                          size_t{208}, size_t{216}, size_t{224}, whole.size() - 1}) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ 1);
    const bool token = at == 216 || at == 224;
    damaged(changed, token ? "is damaged: its checksum differs" : "is not used: it ");
  }
}

TEST_F(PromptCacheTest, AFileOfOtherTokensIsRefused) {
  engine([&](FakeModel&, EngineCore& core) { pin(core, sequence_of(300, 35)); }, options());
  PromptCacheOptions other = options();
  other.expected.vocabulary = 30;
  EXPECT_EQ(engine({}, other).restored_tokens, 0);
  EXPECT_NE(notices.find("tokens that the vocabulary lacks"), std::string::npos) << notices;
  fs::path renamed = files()[0];
  renamed.replace_filename(std::string(16, 'a') + '-' + std::string(32, '0') + ".kv");
  fs::rename(files()[0], renamed);
  notices.clear();
  EXPECT_EQ(engine({}, options()).restored_tokens, 0);
  EXPECT_NE(notices.find("has the name of another"), std::string::npos) << notices;
}

TEST_F(PromptCacheTest, AFileOfAnotherModelIsRefused) {
  engine([&](FakeModel&, EngineCore& core) { pin(core, sequence_of(300, 5)); }, options());
  PromptCacheOptions other = options();
  other.expected.key = std::string(64, 'b');
  EXPECT_EQ(engine({}, other).restored_tokens, 0);
  // Of its name one sees that it is another's.
  EXPECT_EQ(notices,
            "prompt cache: 1 file is of other models, KV types or versions, and not used.\n");
  fs::path renamed = folder / ("bbbbbbbbbbbbbbbb" + files()[0].filename().string().substr(16));
  fs::rename(files()[0], renamed);
  EXPECT_EQ(engine({}, other).restored_tokens, 0);
  EXPECT_NE(notices.find("another model"), std::string::npos) << notices;
}

TEST_F(PromptCacheTest, WhatOthersCanWriteIsRefused) {
  engine([&](FakeModel&, EngineCore& core) { pin(core, sequence_of(300, 6)); }, options());
  ASSERT_EQ(::chmod(files()[0].c_str(), 0666), 0);
  EXPECT_EQ(engine({}, options()).restored_tokens, 0);
  EXPECT_NE(notices.find("written by others"), std::string::npos) << notices;
  const fs::path moved = folder / "elsewhere";
  const fs::path name = files()[0];
  ASSERT_EQ(::chmod(name.c_str(), 0600), 0);
  fs::rename(name, moved);
  fs::create_symlink(moved, name);
  notices.clear();
  EXPECT_EQ(engine({}, options()).restored_tokens, 0);
  EXPECT_NE(notices.find("cannot be opened"), std::string::npos) << notices;
}

TEST_F(PromptCacheTest, TheOldestGoesWhenTheFolderIsFull) {
  PromptCacheOptions small = options();
  small.max_bytes = 7000;  // two files of 300 tokens
  const auto store = [&](unsigned seed) {
    engine(
        [&](FakeModel&, EngineCore& core) {
          core.kv().clear_cache();  // what was restored is not of interest here
          pin(core, sequence_of(300, seed));
        },
        small);
  };
  store(7);
  const fs::path oldest = files()[0];
  store(8);
  ASSERT_EQ(files().size(), 2u);
  store(9);
  EXPECT_EQ(files().size(), 2u);
  EXPECT_FALSE(fs::exists(oldest));
  small.max_bytes = fs::file_size(files()[0]) - 1;
  const std::vector<fs::path> before = files();
  store(10);
  EXPECT_NE(notices.find("was not written: it needs"), std::string::npos) << notices;
  EXPECT_EQ(files(), before) << "and no room is made for it";
}

TEST_F(PromptCacheTest, TwoProcessesMayWriteTheSameAtOnce) {
  const Tokens prompt = sequence_of(300, 37);
  FakeModel model(2000);
  EngineCore core(model, model, {});
  pin(core, prompt);
  const auto add_piece = [&](PromptCache& cache) {
    const auto [begin, count] = cache.next_piece();
    if (count > 0) cache.add(*core.kv().save({}, prompt, begin, count));
    cache.flush();
    return count > 0;
  };
  {
    PromptCache one(options());
    one.begin(0, "", "", prompt);
    add_piece(one);
    PromptCache other(options());  // leaves alone what the first is writing
    EXPECT_EQ(files().size(), 1u);
    other.begin(0, "", "", prompt);
    add_piece(other);
    EXPECT_EQ(files().size(), 2u);
    while (add_piece(one)) {
    }
    while (add_piece(other)) {
    }
  }
  EXPECT_EQ(files().size(), 1u);
  EXPECT_EQ(engine({}, options()).restored_tokens, 300);
  EXPECT_EQ(notices, "");
}

TEST_F(PromptCacheTest, WhatAProcessLeftBehindIsRemoved) {
  engine({}, options());
  const fs::path left = folder / "aaaaaaaaaaaaaaaa-0.kv.0123456789abcdef.kv.tmp";
  write(left, "half");
  engine({}, options());
  EXPECT_FALSE(fs::exists(left));
}

TEST_F(PromptCacheTest, WhatIsBeingWrittenTakesRoomToo) {
  PromptCacheOptions small = options();
  small.max_bytes = 7000;  // two files of 300 tokens
  const auto pin_one = [&](unsigned seed) {
    engine([&](FakeModel&, EngineCore& core) { pin(core, sequence_of(300, seed)); }, small);
  };
  pin_one(38);
  ASSERT_EQ(files().size(), 1u);
  const fs::path oldest = files()[0];
  PromptCache other(small);
  other.begin(0, "", "", sequence_of(300, 39));
  while (other.next_piece().second > 0 && other.next_piece().first < 256) {
    other.add(std::vector<uint8_t>(other.next_piece().second * FakeModel::kBytesPerToken));
  }
  other.flush();
  EXPECT_TRUE(fs::exists(oldest));
  pin_one(40);
  EXPECT_FALSE(fs::exists(oldest));
}

TEST_F(PromptCacheTest, ALongerPrefixTakesThePlaceOfTheShorter) {
  const Tokens prompt = sequence_of(400, 11);
  const Tokens shorter(prompt.begin(), prompt.begin() + 200);
  engine([&](FakeModel&, EngineCore& core) { pin(core, shorter); }, options());
  engine([&](FakeModel&, EngineCore& core) { pin(core, prompt); }, options());
  EXPECT_EQ(files().size(), 1u);
  engine(
      [&](FakeModel& model, EngineCore& core) {
        pin(core, prompt);
        pin(core, shorter);
        EXPECT_EQ(model.rows_computed, 0);
      },
      options());
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(PromptCacheTest, AFullDiskDisturbsNothing) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit tight{1000, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  engine([&](FakeModel&, EngineCore& core) { pin(core, sequence_of(300, 12)); }, options());
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_NE(notices.find("was not written"), std::string::npos) << notices;
  EXPECT_TRUE(files().empty()) << "no half of a file is left";
}

TEST_F(PromptCacheTest, AfterAFailureItWaitsBeforeItTriesAgain) {
  PromptCacheOptions small = options();
  small.max_bytes = 100;
  PromptCache cache(small);
  const Tokens prompt = sequence_of(32, 36);
  ASSERT_TRUE(cache.wants(0, "", prompt));
  cache.begin(0, "", "", prompt);
  cache.add(std::vector<uint8_t>(cache.next_piece().second * FakeModel::kBytesPerToken));
  cache.flush();
  EXPECT_NE(notices.find("was not written"), std::string::npos) << notices;
  EXPECT_FALSE(cache.wants(0, "", prompt));
}

TEST_F(PromptCacheTest, AnExceptionWhileWritingEndsThatFileAlone) {
  PromptCacheOptions o = options();
  o.max_bytes = 100;
  o.notice = [told = false, notice = o.notice](const std::string& text) mutable {
    if (!std::exchange(told, true)) throw std::runtime_error("nobody listens");
    notice(text);
  };
  engine([&](FakeModel&, EngineCore& core) { pin(core, sequence_of(300, 41)); }, o);
  EXPECT_NE(notices.find("was not written: nobody listens"), std::string::npos) << notices;
  EXPECT_TRUE(files().empty());
}

TEST_F(PromptCacheTest, AFolderThatCannotBeUsedIsAnError) {
  PromptCacheOptions o = options();
  o.folder = folder / "not" / "there";
  EXPECT_THROW(PromptCache cache(o), EngineError);
  write(folder, "a file");
  EXPECT_THROW(PromptCache cache(options()), EngineError);
}

TEST_F(PromptCacheTest, OnlyWhatFitsComesBackTheLastUsedFirst) {
  std::vector<Tokens> prompts;
  for (unsigned i = 0; i < 4; ++i) {
    prompts.push_back(sequence_of(200, 20 + i));
    const std::vector<fs::path> before = i == 0 ? std::vector<fs::path>() : files();
    engine([&](FakeModel&, EngineCore& core) { pin(core, prompts.back()); }, options());
    for (const fs::path& file : files()) {
      if (std::find(before.begin(), before.end(), file) != before.end()) continue;
      fs::last_write_time(file, fs::file_time_type::clock::now() - std::chrono::hours(4 - i));
    }
  }
  ASSERT_EQ(files().size(), 4u);
  engine(
      [&](FakeModel&, EngineCore& core) {
        EXPECT_EQ(core.stats().restored_tokens, 400);
        for (size_t i = 0; i < 4; ++i) {
          EXPECT_EQ(core.kv().cached_prefix({}, prompts[i], 200) == 200, i >= 2) << i;
        }
      },
      options(), 500);
}

// --- llama.cpp's form

std::string bytes_of(std::initializer_list<uint32_t> words) {
  std::string bytes;
  for (const uint32_t w : words) bytes.append(reinterpret_cast<const char*>(&w), 4);
  return bytes;
}

std::span<const uint8_t> view(const std::string& bytes) {
  return {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()};
}

TEST(KvState, RowsComeInTheOrderOfPositions) {
  // One layer: keys of 4 bytes, values of 8.
  const std::string one =
      bytes_of({0xaf143cd8, 5, 1, 1, 0, 1, 5, 0, 1, 1, 4, 0, 11, 1, 8, 0, 21, 22});
  const KvLayout layout = read_kv_layout(view(one));
  EXPECT_EQ(layout.layers, 1u);
  EXPECT_EQ(layout.bytes_per_token(), 12u);
  const std::string two = bytes_of({0xaf143cd8, 5, 1, 2,   8,   1, 5, 7, 1,   5,   0,   1,  //
                                    1,          4, 0, 800, 700, 1, 8, 0, 801, 802, 701, 702});
  const std::vector<uint8_t> kv = take_kv(layout, view(two), 7, 2);
  const std::string expected = bytes_of({700, 800, 701, 702, 801, 802});
  EXPECT_EQ(std::string(kv.begin(), kv.end()), expected);
  const std::vector<uint8_t> state = make_kv_state(layout, 7, kv);
  EXPECT_EQ(take_kv(layout, state, 7, 2), kv) << "and back";

  EXPECT_THROW(take_kv(layout, view(two), 6, 2), std::runtime_error);
  EXPECT_THROW(take_kv(layout, view(two), 7, 3), std::runtime_error);
  for (size_t length = 0; length < two.size(); ++length) {
    EXPECT_THROW(take_kv(layout, view(two).first(length), 7, 2), std::runtime_error);
  }
  for (size_t length = 0; length < one.size(); ++length) {
    if (length == 52) continue;  // keys alone are a form that there is
    EXPECT_THROW(read_kv_layout(view(one).first(length)), std::runtime_error) << length;
  }
  EXPECT_THROW(read_kv_layout(view(one + "x")), std::runtime_error);
}

}  // namespace
}  // namespace relay::engine
