// A radix tree over the tokens whose KV is in the cache. Every sequence, running or kept for later,
// is a path from the root; a node is a run of tokens that the same sequences pass through, and its
// cells exist once. So the tree answers both questions: which cached prefix does this prompt start
// with, and how many cells would go if that sequence went.
//
// Pure bookkeeping: it knows tokens and sequence ids, no model and no cells. Hits need no hash: a
// walk compares the tokens themselves.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/model.h"

namespace relay::engine {

/// Separates tenants. Compared by pointer; see SaltTable.
struct SaltEntry;
using Salt = std::shared_ptr<const SaltEntry>;  ///< null: public
struct SaltEntry {
  uint64_t id;  ///< > 0, never used again
  std::string digest;
  Salt within;  ///< paths may enter this one's nodes, too, and so on; null: only what is public
};

/// Whoever may share with whom: paths of one scope share their nodes; nodes without a salt (pinned
/// for all) may be entered by paths of every salt, those of a salt by paths of the salts within it.
/// Nothing crosses adapters: the same tokens have other keys and values there.
struct Scope {
  int32_t adapter = 0;  ///< 0: the base model; i: the i-th adapter
  Salt salt;

  bool operator==(const Scope&) const = default;
};

/// One SaltEntry for each digest in use.
class SaltTable {
 public:
  /// Salts are known by the SHA-256 of their texts: what is kept on disk does not show these.
  Salt intern(const std::string& text, const Salt& within = nullptr);
  /// The same of their digests; `within` empty: of no other.
  Salt intern_digest(const std::string& digest, const std::string& within);
  size_t size() const { return entries_.size(); }

 private:
  std::shared_ptr<SaltEntry> entry_of(const std::string& digest);
  Salt put_within(const std::shared_ptr<SaltEntry>& entry, const Salt& within);

  std::unordered_map<std::string, std::weak_ptr<SaltEntry>> entries_;
  size_t sweep_at_ = 64;
  uint64_t next_id_ = 1;
};

class PrefixTree {
 public:
  using ChildKey = std::tuple<int32_t, uint64_t, Token>;  ///< adapter, salt, first token

  struct Node {
    Node* parent = nullptr;
    Scope scope;
    int32_t begin = 0;  ///< position of its first token
    std::vector<Token> tokens;
    SeqSet members;  ///< sequences whose path includes this node; never empty but the root's
    uint64_t last_used = 0;  ///< clock of the last attach
    uint32_t hits = 0;       ///< sequences that have joined its first
    std::map<ChildKey, std::unique_ptr<Node>> children;

    int32_t size() const { return static_cast<int32_t>(tokens.size()); }
    int32_t end() const { return begin + size(); }
  };

  /// The longest cached prefix of some tokens: all of the path to `node`, and of that node itself
  /// the first `in_node` tokens.
  struct Match {
    Node* node = nullptr;
    int32_t in_node = 0;
    int32_t length = 0;

    /// Some sequence that holds all of it; -1 if length is 0.
    SeqId holder() const;
  };

  PrefixTree();

  /// At most `limit` tokens are matched. All nodes that may be entered alike; the longest match
  /// wins.
  Match match(const Scope& scope, std::span<const Token> tokens, int32_t limit) const;
  /// The same for tokens that follow the end of seq's path. length counts from there.
  Match match_below(SeqId seq, const Scope& scope, std::span<const Token> tokens) const;

  /// seq's path (empty so far, or the path that `match` continues) now ends where the match does.
  void attach(SeqId seq, const Match& match);
  /// Tokens with cells of seq's own follow its path. The caller has made sure (match_below) that no
  /// child begins with tokens[0].
  void extend(SeqId seq, const Scope& scope, std::span<const Token> tokens);

  /// The path of seq ends. Returns how many tokens thereby belong to nobody.
  int32_t detach(SeqId seq);
  /// Takes up to `count` tokens from the end of seq's path, never more than its last node, which
  /// must be seq's alone. Returns how many.
  int32_t trim(SeqId seq, int32_t count);

  int32_t length(SeqId seq) const { return tail(seq)->end(); }
  const Node* tail(SeqId seq) const { return tails_[static_cast<size_t>(seq)]; }
  const Node* root() const { return root_.get(); }
  bool empty(SeqId seq) const { return tail(seq) == root_.get(); }

  /// For how long nobody has used the end of seq's path, in uses of the tree, divided by how often
  /// others have joined it: of what is kept, the greatest is the least of a loss.
  double staleness(SeqId seq) const;

  /// Tokens of all nodes: the cells the tree stands for.
  int32_t tokens() const { return tokens_; }
  /// Tokens of nodes whose members are all in `set`, leaving out the path that ends at `except`.
  int32_t tokens_only_of(const SeqSet& set, const Node* except = nullptr) const;
  /// Tokens of nodes with at least one member in `set`.
  int32_t tokens_touched_by(const SeqSet& set) const;

  /// Depth-first order of the sequences in `set`: those that share a prefix are adjacent.
  std::vector<SeqId> depth_first(const SeqSet& set) const;

  /// How much sharing there is among `readers`.
  struct Sharing {
    int32_t group = 0;          ///< readers of the most worthwhile shared prefix (0 or >= 2)
    int32_t prefix = 0;         ///< its length
    int64_t shared_tokens = 0;  ///< tokens with two or more readers
    int64_t single_tokens = 0;  ///< tokens with one reader
    int64_t saved_tokens = 0;   ///< further readers of the shared ones
  };
  Sharing sharing(const SeqSet& readers) const;

  struct Prefix {
    Scope scope;
    std::vector<Token> tokens;
  };
  /// The prefixes whose nodes have members in `set` or so many hits: of each scope those that no
  /// longer one includes.
  std::vector<Prefix> prefixes(const SeqSet& set, uint32_t hits) const;

  size_t nodes() const;
  /// Throws std::logic_error if an invariant is broken. For tests.
  void validate() const;

 private:
  Match walk(Node* node, int32_t skip, const Scope& scope, std::span<const Token> tokens,
             int32_t limit) const;
  void split(Node* node, int32_t at);
  void merge_with_child(Node* node);

  std::unique_ptr<Node> root_;
  std::vector<Node*> tails_;  // by SeqId; the root for an empty path
  int32_t tokens_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace relay::engine
