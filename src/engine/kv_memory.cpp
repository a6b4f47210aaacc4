#include "engine/kv_memory.h"

#include <algorithm>
#include <stdexcept>

namespace relay::engine {

namespace {

// Evicting cell by cell would walk the tree for every token generated; a little more at a time
// costs nearly nothing of the cache.
constexpr int32_t kEvictAtOnce = 64;

}  // namespace

KvMemory::KvMemory(Model& model, bool prefix_caching)
    : model_(model),
      prefix_caching_(prefix_caching),
      private_(kMaxSequences, 0),
      salt_of_(kMaxSequences) {
  const int32_t ids = model.max_sequences();
  for (SeqId s = ids - 1; s >= 0; --s) free_ids_.push_back(s);
}

int32_t KvMemory::cached_prefix(const Scope& scope, std::span<const Token> tokens,
                                int32_t limit) const {
  return prefix_caching_ ? tree_.match(scope, tokens, limit).length : 0;
}

int32_t KvMemory::pinned_prefix(const Scope& scope, std::span<const Token> tokens) const {
  const PrefixTree::Match match = tree_.match(scope, tokens, static_cast<int32_t>(tokens.size()));
  for (const PrefixTree::Node* node = match.node; node != tree_.root(); node = node->parent) {
    if ((node->members & pinned_).any()) return std::min(node->end(), match.length);
  }
  return 0;
}

std::optional<KvMemory::Admission> KvMemory::admit(const Scope& scope,
                                                   std::span<const Token> tokens, int32_t limit,
                                                   int32_t headroom, int32_t promised) {
  const auto count = static_cast<int32_t>(tokens.size());
  // The id first: getting one may evict a path, perhaps the very one that would match.
  const SeqId seq = acquire_id();
  if (seq < 0) return std::nullopt;
  const PrefixTree::Match match = tree_.match(scope, tokens, prefix_caching_ ? limit : 0);
  const int32_t need = count - match.length + headroom + promised;
  int32_t evictable = 0;
  if (need > cells_free()) {
    evictable = tree_.tokens_only_of(cached_, match.node);
    // What lies beyond the match in its last node can go as well.
    if ((match.node->members & ~cached_).none()) evictable += match.node->size() - match.in_node;
  }
  if (need > cells_free() + evictable) {
    free_id(seq);
    return std::nullopt;
  }
  const int32_t cached = match.length;
  const SeqId holder = match.holder();
  running_.set(index(seq));
  salt_of_[index(seq)] = scope.salt;
  if (cached > 0) {
    tree_.attach(seq, match);
    model_.share(holder, seq, 0, cached);
  }
  if (!make_room(need)) throw std::logic_error("kv memory: eviction freed less than counted");
  return Admission{seq, cached};
}

bool KvMemory::make_room(int32_t cells) {
  while (cells_free() < cells) {
    if (cached_.none()) return false;
    evict_some(cells - cells_free());
  }
  return true;
}

SeqId KvMemory::stalest() const {
  SeqId found = -1;
  double most = -1;
  for (SeqId s = 0; s < kMaxSequences; ++s) {
    if (!cached_.test(index(s))) continue;
    const double staleness = tree_.staleness(s);
    if (staleness > most) {
      most = staleness;
      found = s;
    }
  }
  return found;
}

void KvMemory::evict_some(int32_t cells) {
  const SeqId seq = stalest();
  const PrefixTree::Node* tail = tree_.tail(seq);
  if (tail->members.count() > 1) {
    drop(seq);  // another path holds all of it: this one is of no use
    return;
  }
  const int32_t end = tail->end();
  const int32_t count = tree_.trim(seq, std::max(cells, kEvictAtOnce));
  model_.remove(seq, end - count, end);
  evicted_ += count;
  if (tree_.empty(seq) || tree_.tail(seq)->members.count() > 1) drop(seq);
}

SeqId KvMemory::acquire_id() {
  if (free_ids_.empty()) {
    const SeqId seq = stalest();
    if (seq < 0) return -1;
    const int32_t before = cells_used();
    drop(seq);
    evicted_ += before - cells_used();
  }
  const SeqId seq = free_ids_.back();
  free_ids_.pop_back();
  return seq;
}

void KvMemory::free_id(SeqId seq) {
  salt_of_[index(seq)] = nullptr;
  free_ids_.push_back(seq);
}

void KvMemory::drop(SeqId seq) {
  model_.remove(seq, 0, kToTheEnd);  // a step that failed may have left more than is counted
  tree_.detach(seq);
  private_total_ -= private_[index(seq)];
  private_[index(seq)] = 0;
  running_.reset(index(seq));
  cached_.reset(index(seq));
  pinned_.reset(index(seq));
  free_id(seq);
}

void KvMemory::grow(SeqId seq, int32_t count) {
  private_[index(seq)] += count;
  private_total_ += count;
}

void KvMemory::publish(SeqId seq, const Scope& scope, std::span<const Token> tokens) {
  if (!prefix_caching_) return;
  int32_t begin = tree_.length(seq);
  const auto end = static_cast<int32_t>(tokens.size());
  if (end > length(seq)) throw std::logic_error("kv memory: publish beyond what is computed");
  if (begin >= end) return;
  const PrefixTree::Match match =
      tree_.match_below(seq, scope, tokens.subspan(static_cast<size_t>(begin)));
  const int32_t published = end - begin;
  if (match.length > 0) {
    const SeqId holder = match.holder();
    model_.remove(seq, begin, begin + match.length);
    model_.share(holder, seq, begin, begin + match.length);
    begin += match.length;
    tree_.attach(seq, match);
  }
  tree_.extend(seq, scope, tokens.subspan(static_cast<size_t>(begin)));
  private_[index(seq)] -= published;
  private_total_ -= published;
}

void KvMemory::release(SeqId seq) { drop(seq); }

void KvMemory::drop_redundant(SeqId seq) {
  for (const PrefixTree::Node* node = tree_.tail(seq); node != tree_.root(); node = node->parent) {
    for (SeqId other = 0; other < kMaxSequences; ++other) {
      if (other != seq && cached_.test(index(other)) && tree_.tail(other) == node) {
        drop(other);  // may merge `node` with the one below: start again from the end
        drop_redundant(seq);
        return;
      }
    }
  }
}

void KvMemory::retain(SeqId seq) {
  const int32_t kept = tree_.length(seq);
  const SeqSet keepers = cached_ | pinned_;
  if (kept == 0 || (tree_.tail(seq)->members & keepers).any()) {
    drop(seq);
    return;
  }
  if (private_[index(seq)] > 0) model_.remove(seq, kept, kept + private_[index(seq)]);
  private_total_ -= private_[index(seq)];
  private_[index(seq)] = 0;
  running_.reset(index(seq));
  cached_.set(index(seq));
  drop_redundant(seq);
}

void KvMemory::pin(SeqId seq) {
  const int32_t kept = tree_.length(seq);
  if (private_[index(seq)] > 0) model_.remove(seq, kept, kept + private_[index(seq)]);
  private_total_ -= private_[index(seq)];
  private_[index(seq)] = 0;
  running_.reset(index(seq));
  pinned_.set(index(seq));
  drop_redundant(seq);
}

void KvMemory::unpin(SeqId seq) {
  pinned_.reset(index(seq));
  running_.set(index(seq));
  retain(seq);
}

std::optional<std::vector<uint8_t>> KvMemory::save(const Scope& scope,
                                                   std::span<const Token> tokens, int32_t begin,
                                                   int32_t count) {
  const auto length = static_cast<int32_t>(tokens.size());
  const PrefixTree::Match match = tree_.match(scope, tokens, length);
  if (match.length < length || free_ids_.empty()) return std::nullopt;
  return model_.save(match.holder(), begin, begin + count, free_ids_.back());
}

bool KvMemory::restore(const Scope& scope, std::span<const Token> tokens, size_t token_bytes,
                       const NextKv& next) {
  const auto length = static_cast<int32_t>(tokens.size());
  if (!prefix_caching_ || free_ids_.size() < 2 || length > cells_free()) return false;
  if (tree_.match(scope, tokens, length).length == length) return true;
  const SeqId seq = acquire_id();
  running_.set(index(seq));
  salt_of_[index(seq)] = scope.salt;
  while (this->length(seq) < length) {
    const int32_t begin = this->length(seq);
    const auto kv = next();
    const auto count = kv ? static_cast<int32_t>(kv->size() / token_bytes) : 0;
    if (count <= 0 || count > length - begin ||
        !model_.restore(seq, begin, *kv, free_ids_.back())) {
      drop(seq);
      return false;
    }
    grow(seq, count);
  }
  publish(seq, scope, tokens);
  retain(seq);
  return true;
}

void KvMemory::clear_cache() {
  for (SeqId s = 0; s < kMaxSequences; ++s) {
    if (cached_.test(index(s))) drop(s);
  }
}

std::vector<PrefixNode> KvMemory::nodes() const {
  std::vector<PrefixNode> nodes;
  const auto visit = [&](const auto& self, const PrefixTree::Node& node, int32_t parent) -> void {
    for (const auto& [key, child] : node.children) {
      PrefixNode shown;
      shown.parent = parent;
      shown.tokens = child->size();
      shown.running = static_cast<int32_t>((child->members & running_).count());
      shown.pinned = (child->members & pinned_).any();
      shown.hits = child->hits;
      shown.adapter = child->scope.adapter;
      nodes.push_back(shown);
      self(self, *child, static_cast<int32_t>(nodes.size()) - 1);
    }
  };
  visit(visit, *tree_.root(), -1);
  return nodes;
}

void KvMemory::validate() const {
  const auto check = [](bool ok, const char* what) {
    if (!ok) throw std::logic_error(std::string("kv memory: ") + what);
  };
  tree_.validate();
  int32_t total = 0;
  const SeqSet live = running_ | cached_ | pinned_;
  check((running_ & cached_).none() && (running_ & pinned_).none() && (cached_ & pinned_).none(),
        "a sequence in two states");
  for (SeqId s = 0; s < kMaxSequences; ++s) {
    total += private_[index(s)];
    check(private_[index(s)] >= 0, "negative count");
    check(private_[index(s)] == 0 || running_.test(index(s)), "private cells of no request");
    check(tree_.empty(s) || live.test(index(s)), "path of a free id");
  }
  check(total == private_total_, "private total");
  check(live.count() + free_ids_.size() == static_cast<size_t>(model_.max_sequences()),
        "sequence ids leaked");
  check(cells_free() >= 0, "more cells than there are");
}

}  // namespace relay::engine
