// Who holds which KV cells: sequence ids, the prefix tree, and the exact count of free cells.
//
// A sequence id is, at any time, one of
//   free      no cells
//   running   a request's: its published part is a path of the tree, the rest are private cells
//   cached    a path kept for later requests, evicted from its end, first what was not used for
//             long, where what many have shared stays longer
//   pinned    a path kept until unpinned
// and the cells in use are those of the tree (each node once) plus the private ones. llama.cpp
// keeps the same cells, but nothing here asks it; tests compare the two.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "engine/model.h"
#include "engine/prefix_tree.h"

namespace relay::engine {

class KvMemory {
 public:
  /// prefix_caching false: no lookups, nothing published or kept.
  KvMemory(Model& model, bool prefix_caching);

  Salt salt(const std::string& text, const Salt& within = nullptr) {
    return salts_.intern(text, within);
  }
  Salt salt_of_digest(const std::string& digest, const std::string& within) {
    return salts_.intern_digest(digest, within);
  }
  bool prefix_caching() const { return prefix_caching_; }

  /// Tokens of the longest cached prefix, at most `limit`. Changes nothing.
  int32_t cached_prefix(const Scope& scope, std::span<const Token> tokens, int32_t limit) const;

  /// The same, of pinned prompts alone.
  int32_t pinned_prefix(const Scope& scope, std::span<const Token> tokens) const;

  struct Admission {
    SeqId seq = -1;
    int32_t cached = 0;  ///< its first positions are there already
  };
  /// A running sequence for these tokens, sharing what is cached of the first `limit`. None if the
  /// cells for the rest and `headroom` more cannot be had beside `promised` cells that others will
  /// still need, or no sequence id is left. Evicts as needed.
  std::optional<Admission> admit(const Scope& scope, std::span<const Token> tokens, int32_t limit,
                                 int32_t headroom, int32_t promised);

  /// Makes `cells` cells free, evicting as needed. False: not possible.
  bool make_room(int32_t cells);
  /// `count` further cells of a running sequence were computed; they are private.
  void grow(SeqId seq, int32_t count);
  /// The first tokens.size() tokens of a running sequence are computed: others may share them.
  /// Private cells for which the tree has the same tokens are given up in favour of those.
  void publish(SeqId seq, const Scope& scope, std::span<const Token> tokens);

  /// running -> free; what nobody else holds is gone.
  void release(SeqId seq);
  /// running -> cached: the published part. The private cells go.
  void retain(SeqId seq);
  /// running -> pinned, likewise.
  void pin(SeqId seq);
  /// pinned -> cached.
  void unpin(SeqId seq);

  /// What is worth keeping beyond this process: pinned prompts, and what so many have shared.
  std::vector<PrefixTree::Prefix> lasting(uint32_t hits) const {
    return tree_.prefixes(pinned_, hits);
  }
  /// The KV of a part of a prefix. None if it is no longer there, or no sequence id is free.
  std::optional<std::vector<uint8_t>> save(const Scope& scope, std::span<const Token> tokens,
                                           int32_t begin, int32_t count);
  /// Hands over the KV of the next tokens, how many it likes; nothing: there is no more.
  using NextKv = std::function<std::optional<std::vector<uint8_t>>()>;
  /// A cached path for these tokens, from saved KV of so many bytes a token, unless it is there.
  /// False if there are no free cells or ids for it, or not all KV comes: then nothing has changed.
  bool restore(const Scope& scope, std::span<const Token> tokens, size_t token_bytes,
               const NextKv& next);

  /// Drops every cached (not pinned) path.
  void clear_cache();

  int32_t length(SeqId seq) const { return tree_.length(seq) + private_[index(seq)]; }
  int32_t published(SeqId seq) const { return tree_.length(seq); }
  int32_t pinned_sequences() const { return static_cast<int32_t>(pinned_.count()); }

  int32_t cells_total() const { return model_.cells(); }
  int32_t cells_used() const { return tree_.tokens() + private_total_; }
  int32_t cells_free() const { return cells_total() - cells_used(); }
  /// Of those in use: what eviction could free.
  int32_t cells_evictable() const { return tree_.tokens_only_of(cached_); }
  int32_t cells_pinned() const { return tree_.tokens_touched_by(pinned_); }
  int64_t evicted_tokens() const { return evicted_; }

  const PrefixTree& tree() const { return tree_; }
  /// For people to look at.
  std::vector<PrefixNode> nodes() const;
  /// Throws std::logic_error if the counts do not add up. For tests.
  void validate() const;

 private:
  static size_t index(SeqId seq) { return static_cast<size_t>(seq); }
  SeqId stalest() const;  // of those cached; -1: there is none
  SeqId acquire_id();
  void free_id(SeqId seq);
  void drop(SeqId seq);            // any -> free
  void evict_some(int32_t cells);  // at least one cell or one sequence id
  void drop_redundant(SeqId seq);  // cached paths that end on seq's path

  Model& model_;
  bool prefix_caching_;
  SaltTable salts_;
  PrefixTree tree_;
  std::vector<SeqId> free_ids_;
  std::vector<int32_t> private_;  // by SeqId
  std::vector<Salt> salt_of_;     // by SeqId: keeps the entry alive
  SeqSet running_, cached_, pinned_;
  int32_t private_total_ = 0;
  int64_t evicted_ = 0;
};

}  // namespace relay::engine
