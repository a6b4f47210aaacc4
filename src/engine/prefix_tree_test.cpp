#include "engine/prefix_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

namespace relay::engine {
namespace {

using Tokens = std::vector<Token>;

SeqSet set_of(std::initializer_list<SeqId> ids) {
  SeqSet set;
  for (const SeqId s : ids) set.set(static_cast<size_t>(s));
  return set;
}

void insert(PrefixTree& tree, SeqId seq, const Scope& scope, const Tokens& tokens) {
  const auto match = tree.match(scope, tokens, static_cast<int32_t>(tokens.size()));
  const int32_t length = match.length;
  tree.attach(seq, match);
  tree.extend(seq, scope, std::span(tokens).subspan(static_cast<size_t>(length)));
}

TEST(PrefixTree, FindsTheLongestPrefixAndSplitsInsideANode) {
  PrefixTree tree;
  insert(tree, 0, {}, {1, 2, 3, 4, 5});
  EXPECT_EQ(tree.match({}, Tokens{1, 2, 3, 9}, 4).length, 3);
  EXPECT_EQ(tree.match({}, Tokens{1, 2, 3, 9}, 2).length, 2);
  EXPECT_EQ(tree.match({}, Tokens{7}, 1).length, 0);
  insert(tree, 1, {}, {1, 2, 3, 9});
  tree.validate();
  EXPECT_EQ(tree.tokens(), 6);
  EXPECT_EQ(tree.nodes(), 3u);
  EXPECT_EQ(tree.match({}, Tokens{1, 2, 3, 4, 5, 6}, 6).holder(), 0);
  EXPECT_EQ(tree.detach(1), 1);
  EXPECT_EQ(tree.nodes(), 1u) << "a split is undone when the branch goes";
  EXPECT_EQ(tree.detach(0), 5);
  EXPECT_EQ(tree.tokens(), 0);
  tree.validate();
}

TEST(PrefixTree, AGrowingPromptIsOneNode) {
  PrefixTree tree;
  insert(tree, 3, {}, {1});
  for (Token t = 2; t < 50; ++t) tree.extend(3, {}, Tokens{t});
  EXPECT_EQ(tree.nodes(), 1u);
  EXPECT_EQ(tree.length(3), 49);
}

TEST(PrefixTree, SaltsDoNotSeeEachOtherButAllSeeThePublic) {
  PrefixTree tree;
  SaltTable salts;
  const Scope a{0, salts.intern("a")};
  const Scope b{0, salts.intern("b")};
  EXPECT_EQ(a.salt, salts.intern("a"));
  insert(tree, 0, a, {1, 2, 3});
  EXPECT_EQ(tree.match(b, Tokens{1, 2, 3}, 3).length, 0);
  EXPECT_EQ(tree.match({}, Tokens{1, 2, 3}, 3).length, 0);
  insert(tree, 1, {}, {1, 2});
  EXPECT_EQ(tree.match(b, Tokens{1, 2, 3}, 3).length, 2);
  EXPECT_EQ(tree.match(a, Tokens{1, 2, 3}, 3).length, 3) << "the longer of own and public";
  insert(tree, 2, b, {1, 2, 9});
  EXPECT_EQ(tree.tokens(), 3 + 2 + 1);
  EXPECT_EQ(tree.match({}, Tokens{1, 2, 9}, 3).length, 2) << "below a public node, still b's";
  EXPECT_EQ(tree.match(a, Tokens{1, 2, 9}, 3).length, 2);
  tree.validate();
}

TEST(PrefixTree, SaltsWithinOneSeeWhatIsItsButNotEachOther) {
  PrefixTree tree;
  SaltTable salts;
  const Scope group{0, salts.intern("group")};
  const Scope a{0, salts.intern("a", group.salt)};
  const Scope b{0, salts.intern("b", group.salt)};
  const Scope other{0, salts.intern("other")};
  insert(tree, 0, {}, {1});
  insert(tree, 1, group, {1, 2, 3});
  for (const Scope& scope : {group, a, b}) {
    EXPECT_EQ(tree.match(scope, Tokens{1, 2, 3, 4}, 4).length, 3);
  }
  EXPECT_EQ(tree.match(other, Tokens{1, 2, 3, 4}, 4).length, 1);
  EXPECT_EQ(tree.match({}, Tokens{1, 2, 3, 4}, 4).length, 1);
  insert(tree, 2, a, {1, 2, 3, 4});
  EXPECT_EQ(tree.tokens(), 4);
  EXPECT_EQ(tree.match(a, Tokens{1, 2, 3, 4}, 4).length, 4);
  for (const Scope& scope : {group, b}) {
    EXPECT_EQ(tree.match(scope, Tokens{1, 2, 3, 4}, 4).length, 3);
  }
  tree.validate();
}

TEST(PrefixTree, ASaltKnownByItsDigestAloneLearnsWhatItIsWithin) {
  PrefixTree tree;
  SaltTable salts;
  const Salt group = salts.intern("group");
  const Salt restored = salts.intern_digest(SaltTable().intern("a")->digest, "");
  insert(tree, 0, {0, group}, {1, 2, 3});
  EXPECT_EQ(tree.match({0, restored}, Tokens{1, 2, 3}, 3).length, 0);
  EXPECT_EQ(salts.intern("a", group), restored);
  EXPECT_EQ(salts.intern("group", restored)->within, nullptr) << "no circle";
  EXPECT_EQ(salts.intern_digest(group->digest, restored->digest)->within, nullptr) << "no circle";
  EXPECT_EQ(salts.intern_digest(group->digest, group->digest)->within, nullptr) << "no circle";
  EXPECT_EQ(tree.match({0, restored}, Tokens{1, 2, 3}, 3).length, 3);
  const Salt other = salts.intern_digest(SaltTable().intern("b")->digest, group->digest);
  EXPECT_EQ(tree.match({0, other}, Tokens{1, 2, 3}, 3).length, 3) << "it says so itself";
}

TEST(PrefixTree, NothingCrossesAdapters) {
  PrefixTree tree;
  SaltTable salts;
  const Salt salt = salts.intern("a");
  insert(tree, 0, {0, nullptr}, {1, 2, 3});
  for (const Scope& scope : {Scope{1, nullptr}, Scope{1, salt}}) {
    EXPECT_EQ(tree.match(scope, Tokens{1, 2, 3}, 3).length, 0) << "not what is for all, either";
  }
  insert(tree, 1, {1, nullptr}, {1, 2});
  insert(tree, 2, {1, salt}, {1, 2, 3});
  EXPECT_EQ(tree.tokens(), 3 + 2 + 1);
  EXPECT_EQ(tree.match({1, salt}, Tokens{1, 2, 3}, 3).length, 3);
  EXPECT_EQ(tree.match({1, nullptr}, Tokens{1, 2, 3}, 3).length, 2);
  EXPECT_EQ(tree.match({0, salt}, Tokens{1, 2, 3}, 3).holder(), 0);
  EXPECT_EQ(tree.match({2, salt}, Tokens{1, 2, 3}, 3).length, 0);
  tree.validate();
}

TEST(PrefixTree, SaltEntriesGoWithTheirLastUser) {
  SaltTable salts;
  for (int i = 0; i < 10000; ++i) salts.intern("tenant " + std::to_string(i));
  EXPECT_LE(salts.size(), 200u);
}

TEST(PrefixTree, DepthFirstOrderKeepsSharersTogether) {
  PrefixTree tree;
  insert(tree, 0, {}, {1, 2, 3});
  insert(tree, 1, {}, {7, 8});
  insert(tree, 2, {}, {1, 2, 4});
  insert(tree, 3, {}, {7, 9});
  insert(tree, 4, {}, {1, 5});
  const auto order = tree.depth_first(set_of({0, 1, 2, 3, 4}));
  ASSERT_EQ(order.size(), 5u);
  const auto place = [&](SeqId s) {
    return std::find(order.begin(), order.end(), s) - order.begin();
  };
  EXPECT_EQ(std::abs(place(0) - place(2)), 1);
  EXPECT_EQ(std::abs(place(1) - place(3)), 1);
  EXPECT_LE(std::max({place(0), place(2), place(4)}) - std::min({place(0), place(2), place(4)}), 2);
}

TEST(PrefixTree, CountsWhatSharingSaves) {
  PrefixTree tree;
  insert(tree, 0, {}, {1, 2, 3, 4, 10});
  insert(tree, 1, {}, {1, 2, 3, 4, 11});
  insert(tree, 2, {}, {1, 2, 9});
  const auto sharing = tree.sharing(set_of({0, 1, 2}));
  EXPECT_EQ(sharing.shared_tokens, 4);
  EXPECT_EQ(sharing.saved_tokens, 2 * 2 + 2);
  EXPECT_EQ(sharing.single_tokens, 3);
  EXPECT_EQ(sharing.prefix * (sharing.group - 1), 4);
  EXPECT_EQ(tree.tokens_only_of(set_of({0, 1})), 2 + 2);
  EXPECT_EQ(tree.tokens_only_of(set_of({0, 1}), tree.tail(0)), 1);
  EXPECT_EQ(tree.tokens_touched_by(set_of({2})), 3);
}

// Against a plain map from sequence to tokens.
class Naive {
 public:
  std::map<SeqId, std::pair<Scope, Tokens>> paths;
  std::map<SeqId, int32_t> public_part;  // leading tokens that lie in public nodes

  int32_t match(const Scope& scope, const Tokens& tokens, int32_t limit) const {
    int32_t best = 0;
    for (const auto& [seq, path] : paths) {
      if (path.first.adapter != scope.adapter) continue;
      int32_t same = 0;
      const auto end = std::min<int32_t>(
          limit, static_cast<int32_t>(std::min(tokens.size(), path.second.size())));
      while (same < end &&
             tokens[static_cast<size_t>(same)] == path.second[static_cast<size_t>(same)]) {
        ++same;
      }
      if (path.first != scope) same = std::min(same, public_part.at(seq));
      best = std::max(best, same);
    }
    return best;
  }
};

class PrefixTreeRandom : public testing::TestWithParam<int> {};

TEST_P(PrefixTreeRandom, AgreesWithANaiveMap) {
  std::mt19937 random(static_cast<unsigned>(GetParam()));
  const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  SaltTable salts;
  const Salt salt_list[] = {salts.intern("a"), salts.intern("b"), nullptr};
  PrefixTree tree;
  Naive naive;
  for (int round = 0; round < 1500; ++round) {
    const SeqId seq = pick(24);
    const auto known = naive.paths.find(seq);
    if (known == naive.paths.end()) {
      // Two letters make common prefixes likely.
      Tokens tokens(static_cast<size_t>(1 + pick(12)));
      for (Token& t : tokens) t = pick(2);
      const Scope scope{pick(2), salt_list[pick(3)]};
      const int32_t limit = pick(14);
      const auto match = tree.match(scope, tokens, limit);
      ASSERT_EQ(match.length, naive.match(scope, tokens, limit)) << "round " << round;
      int32_t reached = match.length;
      if (reached > 0) {
        const SeqId holder = match.holder();
        ASSERT_GE(holder, 0);
        const Tokens& held = naive.paths.at(holder).second;
        ASSERT_TRUE(std::equal(tokens.begin(), tokens.begin() + reached, held.begin()));
      }
      tree.attach(seq, match);
      // How much of the path is public: walk up.
      const auto rest = std::span(std::as_const(tokens)).subspan(static_cast<size_t>(reached));
      const auto below = tree.match_below(seq, scope, rest);
      reached += below.length;
      tree.attach(seq, below);
      tree.extend(seq, scope,
                  std::span(std::as_const(tokens)).subspan(static_cast<size_t>(reached)));
      int32_t public_part = 0;
      for (const auto* n = tree.tail(seq); n != tree.root(); n = n->parent) {
        if (n->scope.salt == nullptr) public_part = std::max(public_part, n->end());
      }
      naive.paths[seq] = {scope, tokens};
      naive.public_part[seq] = public_part;
    } else if (pick(3) == 0 && tree.tail(seq)->members.count() == 1) {
      const auto before = tree.tokens();
      const int32_t wish = 1 + pick(3);
      const int32_t cut = tree.trim(seq, wish);
      ASSERT_GE(cut, 1);
      ASSERT_LE(cut, wish);
      ASSERT_EQ(tree.tokens(), before - cut);
      auto& tokens = known->second.second;
      tokens.resize(tokens.size() - static_cast<size_t>(cut));
      auto& part = naive.public_part[seq];
      part = std::min(part, static_cast<int32_t>(tokens.size()));
      if (tokens.empty()) naive.paths.erase(known);
    } else {
      const auto before = tree.tokens();
      const int32_t freed = tree.detach(seq);
      ASSERT_EQ(freed, before - tree.tokens());
      naive.paths.erase(known);
    }
    ASSERT_NO_THROW(tree.validate()) << "round " << round;
    // Each path reads back as its tokens.
    for (const auto& [s, path] : naive.paths) {
      ASSERT_EQ(tree.length(s), static_cast<int32_t>(path.second.size()));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, PrefixTreeRandom, testing::Range(1, 9));

}  // namespace
}  // namespace relay::engine
