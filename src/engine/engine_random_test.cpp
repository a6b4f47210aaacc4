// Random walks of the KV's books and of the whole core, against a plain account of what must hold.
// RELAY_TEST_STEPS: steps of each walk (default 10,000); RELAY_TEST_SEED: the first one's seed.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <optional>
#include <random>

#include "engine/engine_core.h"
#include "engine/fake_model.h"
#include "engine/kv_memory.h"

namespace relay::engine {
namespace {

using Tokens = std::vector<Token>;

int64_t setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoll(text);
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int32_t below(int32_t n) { return static_cast<int32_t>(engine_() % static_cast<uint64_t>(n)); }
  bool chance(int32_t one_in) { return below(one_in) == 0; }
  /// Few different tokens and a few ways to begin: prefixes meet, part and end within each other.
  Tokens prompt(int32_t most) {
    Tokens tokens;
    const int32_t way = below(4);
    const int32_t common = below(most / 2);
    for (int32_t i = 0; i < common; ++i) tokens.push_back((i * (way + 3) + way) % 7);
    const int32_t own = 1 + below(most / 2);
    for (int32_t i = 0; i < own; ++i) tokens.push_back(below(3));
    return tokens;
  }

 private:
  std::mt19937_64 engine_;
};

/// Prefixes as a prompt cache would have them.
struct Store {
  struct Entry {
    int32_t adapter = 0;
    std::string salt;    // its digest; empty: for all
    std::string within;  // likewise; empty: nothing
    Tokens tokens;
    std::vector<uint8_t> kv;
  };
  std::vector<Entry> entries;

  void save(KvMemory& kv, uint32_t hits) {
    for (const PrefixTree::Prefix& prefix : kv.lasting(hits)) {
      const auto& [adapter, salt] = prefix.scope;
      const std::string within = salt && salt->within ? salt->within->digest : "";
      Entry entry{adapter, salt ? salt->digest : "", within, prefix.tokens, {}};
      const auto length = static_cast<int32_t>(prefix.tokens.size());
      for (int32_t at = 0; at < length; at += 5) {
        const auto piece =
            kv.save(prefix.scope, prefix.tokens, at, std::min<int32_t>(5, length - at));
        if (!piece) return;
        entry.kv.insert(entry.kv.end(), piece->begin(), piece->end());
      }
      if (entries.size() > 20) entries.erase(entries.begin());
      entries.push_back(std::move(entry));
    }
  }
  void restore(KvMemory& kv, Random& random) {
    if (entries.empty()) return;
    const Entry& e =
        entries[static_cast<size_t>(random.below(static_cast<int32_t>(entries.size())))];
    const size_t breaks_at = random.chance(5) ? e.kv.size() / 2 : e.kv.size();
    size_t at = 0;
    const auto next = [&]() -> std::optional<std::vector<uint8_t>> {
      if (at >= breaks_at) return std::nullopt;
      const size_t count = std::min(e.kv.size() - at, 3 * FakeModel::kBytesPerToken);
      at += count;
      return std::vector<uint8_t>(e.kv.begin() + static_cast<std::ptrdiff_t>(at - count),
                                  e.kv.begin() + static_cast<std::ptrdiff_t>(at));
    };
    Scope scope{e.adapter, nullptr};
    if (!e.salt.empty()) scope.salt = kv.salt_of_digest(e.salt, e.within);
    kv.restore(scope, e.tokens, FakeModel::kBytesPerToken, next);
  }
};

// --- the books: joining, forking, leaving, evicting, pinning, storing

class Books {
 public:
  explicit Books(uint64_t seed)
      : random_(seed), model_(60 + random_.below(80), 6 + random_.below(12)), kv_(model_, true) {}

  void step() {
    switch (random_.below(12)) {
      case 0:
      case 1:
      case 2:
        return join();
      case 3:
      case 4:
        return compute();
      case 5:
        return leave();
      case 6:
        return pin();
      case 7:
        if (!pinned_.empty() && random_.chance(2)) {
          kv_.unpin(pinned_.back());
          pinned_.pop_back();
        }
        return;
      case 8: {
        const int32_t wanted = random_.below(kv_.cells_total());
        const bool possible = wanted <= kv_.cells_free() + kv_.cells_evictable();
        EXPECT_EQ(kv_.make_room(wanted), possible);
        return;
      }
      case 9:
        if (random_.chance(4)) store_.save(kv_, 1 + static_cast<uint32_t>(random_.below(3)));
        return;
      case 10:
        if (random_.chance(2)) store_.restore(kv_, random_);
        return;
      default:
        if (random_.chance(200)) kv_.clear_cache();
    }
  }

  void check() {
    ASSERT_NO_THROW(kv_.validate());
    ASSERT_EQ(kv_.cells_used(), model_.used());
    for (const auto& [seq, r] : running_) {
      ASSERT_EQ(model_.tokens_of(seq), Tokens(r.tokens.begin(), r.tokens.begin() + r.computed));
    }
  }

  void end() {
    for (const auto& [seq, r] : running_) kv_.release(seq);
    for (const SeqId seq : pinned_) kv_.unpin(seq);
    kv_.clear_cache();
    kv_.validate();
    EXPECT_EQ(model_.used(), 0);
    EXPECT_EQ(kv_.tree().nodes(), 0u);
  }

 private:
  struct Running {
    Scope scope;
    Tokens tokens;
    int32_t computed = 0;
  };

  Scope any_scope() {
    const int32_t which = random_.below(4);
    const Salt group = kv_.salt("group");
    const Salt salt = which == 0   ? kv_.salt("")
                      : which == 1 ? group
                                   : kv_.salt(which == 2 ? "a" : "b", group);
    return {random_.below(2), salt};
  }

  /// The longest prefix of these tokens that somebody holds who may share: by looking at everyone.
  int32_t longest(const Scope& scope, const Tokens& tokens) const {
    int32_t best = 0;
    for (SeqId s = 0; s < model_.max_sequences(); ++s) {
      if (kv_.tree().empty(s)) continue;
      int32_t open = 0;  // so much of its path lies in nodes of ours
      std::vector<const PrefixTree::Node*> path;
      for (const PrefixTree::Node* n = kv_.tree().tail(s); n != kv_.tree().root(); n = n->parent) {
        path.insert(path.begin(), n);
      }
      for (const PrefixTree::Node* n : path) {
        if (n->scope.adapter != scope.adapter) break;
        const Salt& salt = n->scope.salt;
        if (salt && salt != scope.salt && salt != scope.salt->within) break;
        open = n->end();
      }
      const Tokens held = model_.tokens_of(s);
      int32_t same = 0;
      while (same < std::min(open, static_cast<int32_t>(tokens.size())) &&
             held[static_cast<size_t>(same)] == tokens[static_cast<size_t>(same)]) {
        ++same;
      }
      best = std::max(best, same);
    }
    return best;
  }

  void join() {
    Running r;
    r.scope = any_scope();
    r.tokens = random_.prompt(40);
    if (random_.chance(3) && !running_.empty()) {  // a fork of what somebody has computed
      const Running& other =
          std::next(running_.begin(), random_.below(static_cast<int32_t>(running_.size())))->second;
      r.scope = other.scope;
      r.tokens = other.tokens;
      r.tokens.push_back(random_.below(3));
    }
    const auto limit = static_cast<int32_t>(r.tokens.size()) - 1;
    const int32_t expected = longest(r.scope, Tokens(r.tokens.begin(), r.tokens.begin() + limit));
    ASSERT_EQ(kv_.cached_prefix(r.scope, r.tokens, limit), expected);
    const auto admission = kv_.admit(r.scope, r.tokens, limit, 0, 0);
    if (!admission) return;
    // (To have an id for it, a part of what would match may have gone.)
    ASSERT_LE(admission->cached, expected);
    r.computed = admission->cached;
    running_[admission->seq] = std::move(r);
  }

  void compute() {
    if (running_.empty()) return;
    auto& [seq, r] =
        *std::next(running_.begin(), random_.below(static_cast<int32_t>(running_.size())));
    const int32_t left = static_cast<int32_t>(r.tokens.size()) - r.computed;
    const int32_t count = std::min(left, 1 + random_.below(12));
    if (count == 0 || !kv_.make_room(count)) return;
    Batch batch;
    batch.adapter = r.scope.adapter;
    for (int32_t i = 0; i < count; ++i) {
      batch.add(r.tokens[static_cast<size_t>(r.computed + i)], r.computed + i, seq, false);
    }
    ASSERT_EQ(model_.decode(batch), DecodeStatus::kOk);
    kv_.grow(seq, count);
    r.computed += count;
    if (!random_.chance(4)) {
      kv_.publish(seq, r.scope, std::span(r.tokens).first(static_cast<size_t>(r.computed)));
    }
  }

  void leave() {
    if (running_.empty()) return;
    const auto it =
        std::next(running_.begin(), random_.below(static_cast<int32_t>(running_.size())));
    random_.chance(2) ? kv_.retain(it->first) : kv_.release(it->first);
    running_.erase(it);
  }

  void pin() {
    if (running_.empty() || pinned_.size() >= 3) return;
    const SeqId seq = running_.begin()->first;
    if (kv_.published(seq) == 0) return;
    kv_.pin(seq);
    pinned_.push_back(seq);
    running_.erase(seq);
  }

  Random random_;
  FakeModel model_;
  KvMemory kv_;
  Store store_;
  std::map<SeqId, Running> running_;
  std::vector<SeqId> pinned_;
};

class RandomWalk : public testing::TestWithParam<int> {
 protected:
  uint64_t seed() const {
    return static_cast<uint64_t>(setting("RELAY_TEST_SEED", 1) + GetParam());
  }
  const int64_t steps = setting("RELAY_TEST_STEPS", 10000);
};

TEST_P(RandomWalk, TheBooksOfKvAgreeWithItsCells) {
  std::optional<Books> books;
  for (int64_t i = 0; i < steps; ++i) {
    if (i % 2000 == 0) {
      if (books) books->end();
      books.emplace(seed() * 1000003 + static_cast<uint64_t>(i));
    }
    books->step();
    if (HasFatalFailure()) FAIL() << "in step " << i;
    books->check();
    if (HasFatalFailure()) FAIL() << "after step " << i;
  }
  books->end();
}

// --- the core: requests with several choices, priorities, salts and adapters, preemption, failures

struct Asked {
  Tokens prompt;
  int32_t max_tokens = 0;
  int32_t n = 1;
  int32_t adapter = 0;
  std::map<int32_t, Tokens> tokens;
  bool cancelled = false;
  bool ended = false;
  bool failed = false;
};

class Listener : public Sink {
 public:
  explicit Listener(std::shared_ptr<Asked> asked) : asked_(std::move(asked)) {}
  void on_tokens(int32_t choice, TokensDelta delta) override {
    EXPECT_FALSE(asked_->ended);
    for (const auto& t : delta.tokens) asked_->tokens[choice].push_back(t.self.token);
  }
  void on_choice_finish(int32_t, FinishReason, const std::string&) override {}
  void on_done(const Usage&, const RequestTimings&) override {
    EXPECT_FALSE(asked_->ended);
    asked_->ended = true;
  }
  void on_error(ErrorKind, const std::string&) override {
    EXPECT_FALSE(asked_->ended);
    asked_->ended = asked_->failed = true;
  }

 private:
  std::shared_ptr<Asked> asked_;
};

class Core {
 public:
  explicit Core(uint64_t seed)
      : random_(seed),
        model_(120 + random_.below(150), 12 + random_.below(30)),
        core_(model_, model_, options()) {
    model_.end_token = 60;
    model_.on_decode = [this](const Batch&) {
      return random_.chance(500)   ? DecodeStatus::kFailed
             : random_.chance(300) ? DecodeStatus::kNoCells
                                   : DecodeStatus::kOk;
    };
  }

  void step() {
    const int32_t what = random_.below(24);
    if (what < 4 && core_.scheduler().waiting() < 40) {
      submit();
    } else if (what == 4 && !asked_.empty()) {
      const auto it = std::next(asked_.begin(), random_.below(static_cast<int32_t>(asked_.size())));
      it->second->cancelled = true;
      core_.cancel(it->first);
    } else if (what == 5) {
      PinRequest pin;
      pin.tokens = random_.prompt(30);
      pin.adapter = random_.below(adapters_ + 1);
      if (random_.chance(3)) pin.cache_salt = "a";
      core_.pin(pin, {{}, [](const PinnedPrompt&) {}, [](ErrorKind, const std::string&) {}});
    } else if (what == 6 && !core_.pinned().empty()) {
      core_.unpin(core_.pinned().front().id);
    } else if (what == 7 && random_.chance(4)) {
      store_.save(core_.kv(), 1 + static_cast<uint32_t>(random_.below(3)));
    } else if (what == 8 && random_.chance(4)) {
      store_.restore(core_.kv(), random_);
    } else {
      core_.step();
    }
    std::erase_if(asked_, [&](const auto& entry) {
      if (!entry.second->ended) return false;
      judge(*entry.second);
      return true;
    });
  }

  void check() {
    ASSERT_NO_THROW(core_.kv().validate());
    ASSERT_EQ(core_.kv().cells_used(), model_.used());
    for (const Sequence* s : core_.scheduler().running_sequences()) {
      ASSERT_EQ(model_.tokens_of(s->kv),
                Tokens(s->tokens.begin(), s->tokens.begin() + s->computed));
    }
  }

  /// Everything asked comes to an end, and all that was taken comes back.
  void end() {
    model_.on_decode = {};
    int limit = 100000;
    while (core_.step()) ASSERT_GT(--limit, 0) << "does not come to an end";
    for (const auto& [id, asked] : asked_) {
      EXPECT_TRUE(asked->ended);
      judge(*asked);
    }
    for (const PinnedPrompt& p : core_.pinned()) core_.unpin(p.id);
    core_.kv().clear_cache();
    core_.kv().validate();
    EXPECT_TRUE(core_.idle());
    EXPECT_EQ(model_.used(), 0);
    EXPECT_EQ(core_.kv().tree().nodes(), 0u);
  }
  int64_t finished() const { return finished_; }
  int64_t preemptions() const { return core_.stats().preemptions; }

 private:
  CoreOptions options() {
    CoreOptions o;
    o.scheduler.parallel = 1 + random_.below(20);
    o.scheduler.batch_tokens = 24 + random_.below(40);
    o.scheduler.min_follow_tokens = 1 + random_.below(20);
    o.scheduler.adapters = adapters_ = random_.below(3);
    o.adapters = {"one", "two"};
    o.pin_budget = 0.3;
    o.step_seconds = random_.chance(2) ? 0 : 1e-4;
    return o;
  }
  void submit() {
    auto asked = std::make_shared<Asked>();
    asked->prompt = random_.prompt(60);
    asked->max_tokens = 1 + random_.below(30);
    asked->n = random_.chance(6) ? 1 + random_.below(4) : 1;
    auto r = std::make_unique<Request>();
    r->id = ++last_id_;
    r->sink = std::make_shared<Listener>(asked);
    r->prompt = asked->prompt;
    r->adapter = asked->adapter = random_.below(adapters_ + 1);
    r->max_tokens = asked->max_tokens;
    r->priority = random_.chance(4) ? random_.below(3) : 0;
    r->cache_salt = random_.chance(3) ? "a" : "";
    for (int32_t i = 0; i < asked->n; ++i) {
      r->samplers.push_back(std::make_unique<GreedySampler>());
    }
    asked_[r->id] = asked;
    core_.submit(std::move(r));
  }
  void judge(const Asked& asked) {
    for (const auto& [choice, tokens] : asked.tokens) {
      const Tokens whole = model_.completion(asked.prompt, asked.max_tokens, asked.adapter);
      if (!asked.cancelled && !asked.failed) {
        // Shorter only if prompts were pinned meanwhile that leave it no more cells.
        EXPECT_LE(tokens.size(), whole.size());
        ++finished_;
      }
      ASSERT_TRUE(std::equal(tokens.begin(), tokens.end(), whole.begin()))
          << "an answer from cells that were not its own";
    }
  }

  Random random_;
  int32_t adapters_ = 0;
  FakeModel model_;
  EngineCore core_;
  Store store_;
  std::map<RequestId, std::shared_ptr<Asked>> asked_;
  RequestId last_id_ = 0;
  int64_t finished_ = 0;
};

TEST_P(RandomWalk, TheCoreAnswersFromTheRightCells) {
  std::optional<Core> core;
  int64_t finished = 0;
  int64_t preemptions = 0;
  const auto end = [&] {
    core->end();
    finished += core->finished();
    preemptions += core->preemptions();
  };
  for (int64_t i = 0; i < steps; ++i) {
    if (i % 5000 == 0) {
      if (core) end();
      core.emplace(seed() * 1000003 + static_cast<uint64_t>(i));
    }
    core->step();
    if (HasFatalFailure()) FAIL() << "in step " << i;
    core->check();
    if (HasFatalFailure()) FAIL() << "after step " << i;
  }
  end();
  EXPECT_GT(finished, steps / 100);
  EXPECT_GT(preemptions, 0);
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomWalk, testing::Range(0, 2));

}  // namespace
}  // namespace relay::engine
