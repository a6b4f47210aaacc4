#include "engine/prefix_tree.h"

#include <algorithm>
#include <stdexcept>

#include "engine/sha256.h"

namespace relay::engine {

namespace {

PrefixTree::ChildKey key_of(int32_t adapter, const SaltEntry* salt, Token first) {
  return {adapter, salt != nullptr ? salt->id : 0, first};
}

PrefixTree::ChildKey key_of(const Scope& scope, Token first) {
  return key_of(scope.adapter, scope.salt.get(), first);
}

bool is_within(const SaltEntry* salt, const SaltEntry* other) {
  while (salt != nullptr && salt != other) salt = salt->within.get();
  return salt == other;
}

int32_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  const auto end = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first;
  return static_cast<int32_t>(end - a.begin());
}

SeqId first_of(const SeqSet& set) {
  for (int32_t i = 0; i < kMaxSequences; ++i) {
    if (set.test(static_cast<size_t>(i))) return i;
  }
  return -1;
}

template <typename Visit>
void for_each_node(const PrefixTree::Node* node, const Visit& visit) {
  for (const auto& [key, child] : node->children) {
    visit(child.get());
    for_each_node(child.get(), visit);
  }
}

}  // namespace

Salt SaltTable::intern(const std::string& text, const Salt& within) {
  return put_within(entry_of(sha256_hex(text)), within);
}

Salt SaltTable::intern_digest(const std::string& digest, const std::string& within) {
  return put_within(entry_of(digest), within.empty() ? nullptr : entry_of(within));
}

Salt SaltTable::put_within(const std::shared_ptr<SaltEntry>& entry, const Salt& within) {
  // Never in a circle.
  if (within && !is_within(within.get(), entry.get())) entry->within = within;
  return entry;
}

std::shared_ptr<SaltEntry> SaltTable::entry_of(const std::string& digest) {
  if (entries_.size() >= sweep_at_) {
    std::erase_if(entries_, [](const auto& entry) { return entry.second.expired(); });
    sweep_at_ = std::max<size_t>(64, 2 * entries_.size());
  }
  auto& slot = entries_[digest];
  std::shared_ptr<SaltEntry> salt = slot.lock();
  if (!salt) {
    salt = std::make_shared<SaltEntry>(SaltEntry{next_id_++, digest, nullptr});
    slot = salt;
  }
  return salt;
}

SeqId PrefixTree::Match::holder() const { return length == 0 ? -1 : first_of(node->members); }

PrefixTree::PrefixTree() : root_(std::make_unique<Node>()), tails_(kMaxSequences, root_.get()) {}

PrefixTree::Match PrefixTree::walk(Node* node, int32_t skip, const Scope& scope,
                                   std::span<const Token> tokens, int32_t limit) const {
  Match best{node, node->size(), skip};
  if (skip >= limit) return best;
  const Token first = tokens[static_cast<size_t>(skip)];
  const auto try_child = [&](const SaltEntry* salt) {
    const auto it = node->children.find(key_of(scope.adapter, salt, first));
    if (it == node->children.end()) return;
    Node* child = it->second.get();
    const int32_t same =
        common_prefix(child->tokens,
                      tokens.subspan(static_cast<size_t>(skip), static_cast<size_t>(limit - skip)));
    const Match found = same == child->size() ? walk(child, skip + same, scope, tokens, limit)
                                              : Match{child, same, skip + same};
    if (found.length > best.length) best = found;
  };
  try_child(nullptr);
  for (const SaltEntry* salt = scope.salt.get(); salt != nullptr; salt = salt->within.get()) {
    try_child(salt);
  }
  return best;
}

PrefixTree::Match PrefixTree::match(const Scope& scope, std::span<const Token> tokens,
                                    int32_t limit) const {
  limit = std::min(limit, static_cast<int32_t>(tokens.size()));
  return walk(root_.get(), 0, scope, tokens, limit);
}

PrefixTree::Match PrefixTree::match_below(SeqId seq, const Scope& scope,
                                          std::span<const Token> tokens) const {
  return walk(tails_[static_cast<size_t>(seq)], 0, scope, tokens,
              static_cast<int32_t>(tokens.size()));
}

void PrefixTree::split(Node* node, int32_t at) {
  auto lower = std::make_unique<Node>();
  lower->parent = node;
  lower->scope = node->scope;
  lower->begin = node->begin + at;
  lower->tokens.assign(node->tokens.begin() + at, node->tokens.end());
  lower->members = node->members;
  lower->last_used = node->last_used;
  lower->hits = node->hits;
  lower->children = std::move(node->children);
  for (auto& [key, child] : lower->children) child->parent = lower.get();
  for (Node*& tail : tails_) {
    if (tail == node) tail = lower.get();
  }
  node->tokens.resize(static_cast<size_t>(at));
  node->children.clear();
  node->children.emplace(key_of(lower->scope, lower->tokens.front()), std::move(lower));
}

void PrefixTree::attach(SeqId seq, const Match& match) {
  if (match.in_node < match.node->size()) split(match.node, match.in_node);
  ++clock_;
  for (Node* node = match.node; node != root_.get(); node = node->parent) {
    if (!node->members.test(static_cast<size_t>(seq))) ++node->hits;
    node->members.set(static_cast<size_t>(seq));
    node->last_used = clock_;
  }
  tails_[static_cast<size_t>(seq)] = match.node;
}

void PrefixTree::extend(SeqId seq, const Scope& scope, std::span<const Token> tokens) {
  if (tokens.empty()) return;
  Node* node = tails_[static_cast<size_t>(seq)];
  tokens_ += static_cast<int32_t>(tokens.size());
  // A growing prompt stays one node: nobody else has looked at it yet.
  if (node != root_.get() && node->scope == scope && node->children.empty() &&
      node->members.count() == 1) {
    node->tokens.insert(node->tokens.end(), tokens.begin(), tokens.end());
    node->last_used = ++clock_;
    return;
  }
  auto child = std::make_unique<Node>();
  child->parent = node;
  child->scope = scope;
  child->begin = node->end();
  child->tokens.assign(tokens.begin(), tokens.end());
  child->members.set(static_cast<size_t>(seq));
  child->last_used = ++clock_;
  tails_[static_cast<size_t>(seq)] = child.get();
  const bool inserted =
      node->children.emplace(key_of(scope, tokens.front()), std::move(child)).second;
  if (!inserted) throw std::logic_error("prefix tree: extend over an existing child");
}

void PrefixTree::merge_with_child(Node* node) {
  // Undoes a split that nobody needs any more: else a long-lived prefix would end in small pieces.
  if (node == root_.get() || node->children.size() != 1) return;
  std::unique_ptr<Node>& slot = node->children.begin()->second;
  if (slot->members != node->members || slot->scope != node->scope) return;
  const std::unique_ptr<Node> child = std::move(slot);
  if (child->size() > node->size()) {  // the longer part says how much both are worth
    node->last_used = child->last_used;
    node->hits = child->hits;
  }
  node->tokens.insert(node->tokens.end(), child->tokens.begin(), child->tokens.end());
  node->children = std::move(child->children);
  for (auto& [key, grandchild] : node->children) grandchild->parent = node;
  for (Node*& tail : tails_) {
    if (tail == child.get()) tail = node;
  }
}

double PrefixTree::staleness(SeqId seq) const {
  constexpr uint32_t kMostHits = 15;  // what was popular once is forgotten some day
  const Node* node = tail(seq);
  return static_cast<double>(clock_ - node->last_used) / (1 + std::min(node->hits, kMostHits));
}

int32_t PrefixTree::detach(SeqId seq) {
  int32_t freed = 0;
  Node* node = tails_[static_cast<size_t>(seq)];
  tails_[static_cast<size_t>(seq)] = root_.get();
  while (node != root_.get()) {
    Node* parent = node->parent;
    node->members.reset(static_cast<size_t>(seq));
    if (node->members.none()) {
      freed += node->size();
      parent->children.erase(key_of(node->scope, node->tokens.front()));
    } else {
      merge_with_child(node);
    }
    node = parent;
  }
  tokens_ -= freed;
  return freed;
}

int32_t PrefixTree::trim(SeqId seq, int32_t count) {
  Node* node = tails_[static_cast<size_t>(seq)];
  if (node == root_.get()) return 0;
  if (node->members.count() != 1 || !node->children.empty()) {
    throw std::logic_error("prefix tree: trim of a shared node");
  }
  count = std::min(count, node->size());
  tokens_ -= count;
  if (count < node->size()) {
    node->tokens.resize(node->tokens.size() - static_cast<size_t>(count));
    return count;
  }
  Node* parent = node->parent;
  tails_[static_cast<size_t>(seq)] = parent;
  parent->children.erase(key_of(node->scope, node->tokens.front()));
  // The parent may now be the same run as its remaining child.
  merge_with_child(parent);
  return count;
}

int32_t PrefixTree::tokens_only_of(const SeqSet& set, const Node* except) const {
  std::vector<const Node*> path;
  for (; except != nullptr && except != root_.get(); except = except->parent) {
    path.push_back(except);
  }
  int32_t count = 0;
  for_each_node(root_.get(), [&](const Node* node) {
    if ((node->members & ~set).any()) return;
    if (std::find(path.begin(), path.end(), node) == path.end()) count += node->size();
  });
  return count;
}

int32_t PrefixTree::tokens_touched_by(const SeqSet& set) const {
  int32_t count = 0;
  for_each_node(root_.get(), [&](const Node* node) {
    if ((node->members & set).any()) count += node->size();
  });
  return count;
}

std::vector<SeqId> PrefixTree::depth_first(const SeqSet& set) const {
  std::vector<SeqId> order;
  const auto emit_tails = [&](const Node* node) {
    for (int32_t s = 0; s < kMaxSequences; ++s) {
      if (set.test(static_cast<size_t>(s)) && tail(s) == node) order.push_back(s);
    }
  };
  emit_tails(root_.get());
  for_each_node(root_.get(), [&](const Node* node) {
    if ((node->members & set).any()) emit_tails(node);
  });
  return order;
}

PrefixTree::Sharing PrefixTree::sharing(const SeqSet& readers) const {
  Sharing result;
  int64_t best = 0;
  for_each_node(root_.get(), [&](const Node* node) {
    const auto count = static_cast<int64_t>((node->members & readers).count());
    if (count == 1) result.single_tokens += node->size();
    if (count < 2) return;
    result.shared_tokens += node->size();
    result.saved_tokens += (count - 1) * node->size();
    if ((count - 1) * node->end() > best) {
      best = (count - 1) * node->end();
      result.group = static_cast<int32_t>(count);
      result.prefix = node->end();
    }
  });
  return result;
}

std::vector<PrefixTree::Prefix> PrefixTree::prefixes(const SeqSet& set, uint32_t hits) const {
  const auto chosen = [&](const Node* node) {
    return (node->members & set).any() || node->hits >= hits;
  };
  std::vector<Prefix> result;
  for_each_node(root_.get(), [&](const Node* node) {
    if (!chosen(node)) return;
    for (const auto& [key, child] : node->children) {
      if (child->scope == node->scope && chosen(child.get())) return;
    }
    Prefix prefix;
    prefix.scope = node->scope;
    prefix.tokens.resize(static_cast<size_t>(node->end()));
    for (const Node* n = node; n != root_.get(); n = n->parent) {
      std::copy(n->tokens.begin(), n->tokens.end(), prefix.tokens.begin() + n->begin);
    }
    result.push_back(std::move(prefix));
  });
  return result;
}

size_t PrefixTree::nodes() const {
  size_t count = 0;
  for_each_node(root_.get(), [&](const Node*) { ++count; });
  return count;
}

void PrefixTree::validate() const {
  const auto check = [](bool ok, const char* what) {
    if (!ok) throw std::logic_error(std::string("prefix tree: ") + what);
  };
  int32_t total = 0;
  SeqSet with_tail;
  for (int32_t s = 0; s < kMaxSequences; ++s) {
    if (!empty(s)) with_tail.set(static_cast<size_t>(s));
    for (const Node* n = tail(s); n != root_.get(); n = n->parent) {
      check(n->members.test(static_cast<size_t>(s)), "a path leaves its nodes");
    }
  }
  for_each_node(root_.get(), [&](const Node* node) {
    total += node->size();
    check(!node->tokens.empty(), "empty node");
    check(node->members.any(), "node of nobody");
    check((node->members & ~with_tail).none(), "member without a path");
    check(node->begin == node->parent->end(), "positions do not follow");
    for (int32_t s = 0; s < kMaxSequences; ++s) {
      if (!node->members.test(static_cast<size_t>(s))) continue;
      const Node* n = tail(s);
      while (n != root_.get() && n != node) n = n->parent;
      check(n == node, "member whose path does not pass");
    }
    for (const auto& [key, child] : node->children) {
      check(child->parent == node, "wrong parent");
      check(key == key_of(child->scope, child->tokens.front()), "wrong key");
      check((child->members & ~node->members).none(), "child with a member of its own");
      check(is_within(child->scope.salt.get(), node->scope.salt.get()),
            "below a salted node one of another salt");
      check(child->scope.adapter == node->scope.adapter, "adapter changes on a path");
    }
  });
  check(total == tokens_, "token count");
}

}  // namespace relay::engine
