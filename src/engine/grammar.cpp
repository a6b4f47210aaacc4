#include "engine/grammar.h"

#include <algorithm>
#include <map>

#include "base/utf8.h"

namespace relay::engine {

namespace {

constexpr size_t kMaxElements = 1 << 20;
constexpr uint64_t kMaxRepetitions = 100'000;
constexpr int kMaxNesting = 200;
// What following a grammar may hold in memory, some 100 MB at worst. The last three are what can be
// found again, at most 17 MB of it.
constexpr size_t kMaxNodes = 1 << 20;
constexpr size_t kMaxStateEntries = 1 << 22;
constexpr size_t kMaxAsciiRows = 1 << 13;
constexpr size_t kMaxOthers = 1 << 17;
constexpr size_t kMaxMaskBytes = 8 << 20;

constexpr uint32_t kLastCharacter = 0x10FFFF;

bool is_name_char(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
}

uint64_t mix(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15u + (hash << 6) + (hash >> 2);
  return hash * 0xff51afd7ed558ccdu;
}

[[noreturn]] void throw_memory_full() {
  throw GrammarMemoryFull("the grammars of all requests together take too much memory");
}

[[noreturn]] void too_large() {
  throw GrammarTooCostly("the grammar is too large: its repetitions written out have more than " +
                         std::to_string(kMaxElements) + " symbols");
}

}  // namespace

void GrammarMemory::resize(int64_t bytes) {
  const int64_t more = bytes - bytes_;
  const int64_t all = total_ += more;
  if (more > 0 && all > limit_ && bytes > kFree) {
    total_ -= more;
    throw_memory_full();
  }
  bytes_ = bytes;
}

// --- Token texts

TokenTexts::TokenTexts(std::vector<std::string> texts, std::vector<bool> ends)
    : texts_(std::move(texts)), ends_(std::move(ends)) {
  std::vector<Token> order;
  for (size_t t = 0; t < texts_.size(); ++t) {
    const bool usable = !texts_[t].empty() && texts_[t][0] != '\0' && !ends_[t];
    (usable ? order : others_).push_back(static_cast<Token>(t));
  }
  std::sort(order.begin(), order.end(), [&](Token a, Token b) {
    const int by_text = text(a).compare(text(b));
    return by_text != 0 ? by_text < 0 : a < b;
  });
  std::string_view before;
  for (const Token token : order) {
    const std::string_view now = text(token);
    const size_t most = std::min(before.size(), now.size());
    const auto common =
        std::mismatch(before.begin(), before.begin() + static_cast<std::ptrdiff_t>(most),
                      now.begin())
            .first -
        before.begin();
    sorted_.push_back({token, static_cast<uint32_t>(common)});
    before = now;
  }
}

Token TokenTexts::find(std::string_view text) const {
  const auto is_it = [&](Token t) { return this->text(t) == text; };
  const auto other = std::find_if(others_.begin(), others_.end(), is_it);
  if (other != others_.end()) return *other;
  const auto at = std::lower_bound(
      sorted_.begin(), sorted_.end(), text,
      [&](const Entry& entry, std::string_view t) { return this->text(entry.token) < t; });
  return at != sorted_.end() && is_it(at->token) ? at->token : -1;
}

// --- Compiling

bool Grammar::Set::has(uint32_t c) const {
  for (const auto& [low, high] : ranges) {
    if (low <= c && c <= high) return !negated;
  }
  return negated;
}

bool Grammar::Set::meets(uint32_t low, uint32_t high) const {
  if (!negated) {
    return std::any_of(ranges.begin(), ranges.end(),
                       [&](const auto& r) { return r.first <= high && low <= r.second; });
  }
  // Whether the ranges, which are sorted, leave a gap.
  uint32_t at = low;
  for (const auto& [first, last] : ranges) {
    if (first > at) return true;
    at = std::max(at, last + 1);
    if (at > high) return false;
  }
  return true;
}

class GrammarParser {
 public:
  GrammarParser(std::string_view text, const TokenTexts& tokens) : text_(text), tokens_(tokens) {}

  std::shared_ptr<const Grammar> run() {
    skip_space(true);
    while (!at_end()) rule();
    const auto root = names_.find("root");
    if (root == names_.end() || alternatives_[root->second].empty()) {
      throw std::runtime_error("there is no rule named root");
    }
    for (const auto& [name, id] : names_) {
      if (alternatives_[id].empty()) {
        throw std::runtime_error("the rule " + name.substr(0, 100) + " is not defined");
      }
    }
    check_left_recursion();
    grammar_->root_ = root->second;
    lay_out();
    return grammar_;
  }

 private:
  using Element = Grammar::Element;
  using Type = Grammar::Type;
  using Sequence = std::vector<Element>;

  void lay_out() {
    Grammar& g = *grammar_;
    size_t begins = 0;
    size_t elements = 0;
    for (const auto& rule : alternatives_) {
      begins += rule.size();
      for (const Sequence& sequence : rule) elements += sequence.size() + 1;
    }
    size_t ranges = 0;
    for (const Grammar::Set& set : g.sets_) ranges += sizeof(set) / 8 + set.ranges.size();
    g.memory_.resize(static_cast<int64_t>(elements * sizeof(Element) + 8 * ranges +
                                          (begins + alternatives_.size()) * sizeof(uint32_t)));
    g.elements_.reserve(elements);
    g.begins_.reserve(begins);
    g.rules_.reserve(alternatives_.size() + 1);
    for (const auto& rule : alternatives_) {
      g.rules_.push_back(static_cast<uint32_t>(g.begins_.size()));
      for (const Sequence& sequence : rule) {
        g.begins_.push_back(static_cast<uint32_t>(g.elements_.size()));
        g.elements_.insert(g.elements_.end(), sequence.begin(), sequence.end());
        g.elements_.emplace_back();
      }
    }
    g.rules_.push_back(static_cast<uint32_t>(g.begins_.size()));
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(what + " at byte " + std::to_string(at_));
  }

  bool at_end() const { return at_ >= text_.size(); }
  char peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }

  void skip_space(bool newlines) {
    for (; !at_end(); ++at_) {
      const char c = peek();
      if (c == '#') {
        while (!at_end() && peek() != '\n' && peek() != '\r') ++at_;
        if (at_end()) return;
        --at_;
      } else if (c != ' ' && c != '\t' && !(newlines && (c == '\n' || c == '\r'))) {
        return;
      }
    }
  }

  void count(size_t elements) {
    size_ += elements;
    if (size_ > kMaxElements) too_large();
  }

  uint32_t new_rule() {
    count(1);
    alternatives_.emplace_back();
    return static_cast<uint32_t>(alternatives_.size() - 1);
  }
  uint32_t rule_named(std::string_view name) {
    const auto [it, is_new] = names_.try_emplace(std::string(name), 0);
    if (is_new) it->second = new_rule();
    return it->second;
  }
  std::string_view name() {
    const size_t begin = at_;
    while (is_name_char(peek())) ++at_;
    if (at_ == begin) fail("a name is expected");
    return text_.substr(begin, at_ - begin);
  }

  void rule() {
    const uint32_t id = rule_named(name());
    skip_space(false);
    if (text_.substr(at_, 3) != "::=") fail("::= is expected");
    at_ += 3;
    skip_space(true);
    alternatives_[id] = choice(false);
    if (!at_end() && peek() != '\n' && peek() != '\r') fail("an unexpected character");
    skip_space(true);
  }

  std::vector<Sequence> choice(bool nested) {
    std::vector<Sequence> result = {sequence(nested)};
    while (peek() == '|') {
      ++at_;
      skip_space(true);
      result.push_back(sequence(nested));
    }
    return result;
  }

  Sequence sequence(bool nested) {
    Sequence result;
    size_t last = 0;  // where the last item begins, for what repeats it
    bool repeatable = false;
    const auto begin_item = [&] {
      last = result.size();
      repeatable = true;
    };
    while (!at_end()) {
      const char c = peek();
      if (c == '"') {
        begin_item();
        ++at_;
        while (peek() != '"' || at_end()) result.push_back(single(character()));
        ++at_;
      } else if (c == '[') {
        begin_item();
        ++at_;
        result.push_back(character_class());
      } else if (c == '.') {
        begin_item();
        ++at_;
        result.push_back(set({false, {{0, kLastCharacter}}}));
      } else if (c == '<' || c == '!') {
        begin_item();
        result.push_back(token());
      } else if (is_name_char(c)) {
        begin_item();
        result.push_back({Type::kRule, rule_named(name())});
      } else if (c == '(') {
        begin_item();
        ++at_;
        skip_space(true);
        if (++depth_ > kMaxNesting) {
          fail("parentheses nested deeper than " + std::to_string(kMaxNesting) + " levels");
        }
        std::vector<Sequence> inner = choice(true);
        --depth_;
        if (peek() != ')') fail(") is expected");
        ++at_;
        const uint32_t id = new_rule();
        alternatives_[id] = std::move(inner);
        result.push_back({Type::kRule, id});
      } else if (c == '*' || c == '+' || c == '?' || c == '{') {
        if (!repeatable) fail("there is nothing to repeat");
        const auto [least, most] = repetition();
        repeat(result, last, least, most);
      } else {
        break;
      }
      skip_space(nested);
    }
    count(result.size() + 1);
    return result;
  }

  std::pair<uint64_t, uint64_t> repetition() {
    const char c = peek();
    ++at_;
    if (c == '*') return {0, UINT64_MAX};
    if (c == '+') return {1, UINT64_MAX};
    if (c == '?') return {0, 1};
    skip_space(false);
    const uint64_t least = number();
    uint64_t most = least;
    skip_space(false);
    if (peek() == ',') {
      ++at_;
      skip_space(false);
      most = peek() == '}' ? UINT64_MAX : number();
      skip_space(false);
    }
    if (peek() != '}') fail("} is expected");
    ++at_;
    if (most < least) fail("a repetition ends below its beginning");
    return {least, most};
  }

  uint64_t number() {
    uint64_t value = 0;
    const size_t begin = at_;
    for (; peek() >= '0' && peek() <= '9'; ++at_) {
      value = value * 10 + static_cast<uint64_t>(peek() - '0');
      if (value > kMaxRepetitions) {
        fail("more than " + std::to_string(kMaxRepetitions) + " repetitions are not supported");
      }
    }
    if (at_ == begin) fail("a number is expected");
    return value;
  }

  /// The items from `last` on, as often as that.
  void repeat(Sequence& result, size_t last, uint64_t least, uint64_t most) {
    Sequence item(result.begin() + static_cast<std::ptrdiff_t>(last), result.end());
    result.resize(last);
    if (item.empty()) return;  // the empty text, as often as one likes
    if (item.size() > 1) {
      const uint32_t id = new_rule();
      count(item.size() + 1);
      alternatives_[id] = {std::move(item)};
      item = {{Type::kRule, id}};
    }
    count(least);
    result.insert(result.end(), least, item.front());
    if (most == UINT64_MAX) {
      // rest ::= item rest |
      const uint32_t rest = new_rule();
      count(4);
      alternatives_[rest] = {{item.front(), {Type::kRule, rest}}, {}};
      result.push_back({Type::kRule, rest});
      return;
    }
    // rest ::= item (one less) |
    uint32_t rest = 0;
    for (uint64_t i = 0; i < most - least; ++i) {
      const uint32_t id = new_rule();
      count(4);
      alternatives_[id] = {{item.front()}, {}};
      if (i > 0) alternatives_[id][0].push_back({Type::kRule, rest});
      rest = id;
    }
    if (most > least) result.push_back({Type::kRule, rest});
  }

  /// One character, escapes read.
  uint32_t character() {
    if (at_end()) fail("an unexpected end");
    if (peek() == '\\') {
      const char kind = peek(1);
      at_ += 2;
      switch (kind) {
        case 'x':
          return hex(2);
        case 'u':
          return hex(4);
        case 'U':
          return hex(8);
        case 't':
          return '\t';
        case 'r':
          return '\r';
        case 'n':
          return '\n';
        case '\\':
        case '"':
        case '[':
        case ']':
        case '-':
          return static_cast<unsigned char>(kind);
        default:
          fail("an unknown escape");
      }
    }
    const int length = utf8_length(text_, at_);
    if (length <= 0) fail("text that is not UTF-8");
    const uint32_t value = utf8_code_point(text_, at_, length);
    at_ += static_cast<size_t>(length);
    return value;
  }

  uint32_t hex(int digits) {
    uint32_t value = 0;
    for (int i = 0; i < digits; ++i, ++at_) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail(std::to_string(digits) + " hexadecimal digits are expected");
      value = value << 4 | static_cast<uint32_t>(digit);
    }
    return value;
  }

  Element single(uint32_t c) { return set({false, {{c, c}}}); }

  Element character_class() {
    Grammar::Set result;
    if (peek() == '^') {
      result.negated = true;
      ++at_;
    }
    while (peek() != ']' || at_end()) {
      const uint32_t low = character();
      uint32_t high = low;
      if (peek() == '-' && peek(1) != ']') {
        ++at_;
        high = character();
      }
      if (low > high) fail("a range that ends below its beginning");
      result.ranges.emplace_back(low, high);
    }
    if (result.ranges.empty()) fail("an empty set of characters");
    ++at_;
    std::sort(result.ranges.begin(), result.ranges.end());
    count(result.ranges.size());
    return set(std::move(result));
  }

  Element set(Grammar::Set set) {
    const auto key = std::make_pair(set.negated, set.ranges);
    const auto [it, is_new] = sets_.try_emplace(key, static_cast<uint32_t>(sets_.size()));
    if (is_new) grammar_->sets_.push_back(std::move(set));
    return {Type::kSet, it->second};
  }

  Element token() {
    Type type = Type::kToken;
    if (peek() == '!') {
      type = Type::kNotToken;
      ++at_;
    }
    if (peek() != '<') fail("< is expected");
    const size_t end = text_.find('>', at_);
    if (end == std::string_view::npos) fail("a token without its >");
    Token id = -1;
    if (peek(1) == '[') {
      at_ += 2;
      const size_t begin = at_;
      uint64_t value = 0;
      for (; peek() >= '0' && peek() <= '9' && value < tokens_.size(); ++at_) {
        value = value * 10 + static_cast<uint64_t>(peek() - '0');
      }
      if (at_ == begin || peek() != ']' || peek(1) != '>' || value >= tokens_.size()) {
        fail("the number of a token, and ]> behind it, is expected");
      }
      id = static_cast<Token>(value);
    } else {
      id = tokens_.find(text_.substr(at_, end + 1 - at_));
      if (id < 0) fail("a token that the vocabulary does not have");
    }
    at_ = end + 1;
    return {type, static_cast<uint32_t>(id)};
  }

  /// A rule that begins with itself would grow for ever.
  void check_left_recursion() const {
    const size_t count = alternatives_.size();
    // Rules that may be empty, found from those that plainly are.
    std::vector<bool> may_be_empty(count);
    std::vector<std::vector<std::pair<uint32_t, uint32_t>>> users(count);
    std::vector<std::vector<size_t>> missing(count);  // symbols of an alternative not known empty
    std::vector<uint32_t> found;
    const auto mark = [&](uint32_t rule) {
      if (may_be_empty[rule]) return;
      may_be_empty[rule] = true;
      found.push_back(rule);
    };
    for (uint32_t r = 0; r < count; ++r) {
      for (const Sequence& s : alternatives_[r]) {
        missing[r].push_back(s.size());
        const auto index = static_cast<uint32_t>(missing[r].size() - 1);
        const bool only_rules =
            std::all_of(s.begin(), s.end(), [](const Element& e) { return e.type == Type::kRule; });
        if (s.empty()) mark(r);
        if (!only_rules) continue;
        for (const Element& e : s) users[e.value].emplace_back(r, index);
      }
    }
    while (!found.empty()) {
      const uint32_t rule = found.back();
      found.pop_back();
      for (const auto& [user, index] : users[rule]) {
        if (--missing[user][index] == 0) mark(user);
      }
    }
    // Where a rule may begin, and whether something then still comes behind.
    struct Edge {
      uint32_t to;
      bool grows;
    };
    std::vector<std::vector<Edge>> edges(count);
    for (uint32_t r = 0; r < count; ++r) {
      for (const Sequence& s : alternatives_[r]) {
        for (size_t i = 0; i < s.size() && s[i].type == Type::kRule; ++i) {
          edges[r].push_back({s[i].value, i + 1 < s.size()});
          if (!may_be_empty[s[i].value]) break;
        }
      }
    }
    // Rules that begin with one another (Tarjan's components), without recursion.
    std::vector<uint32_t> order(count), low(count), component(count);
    std::vector<uint32_t> open;
    uint32_t visited = 0;
    uint32_t components = 0;
    std::vector<std::pair<uint32_t, size_t>> path;
    for (uint32_t start = 0; start < count; ++start) {
      if (order[start] != 0) continue;
      path.emplace_back(start, 0);
      while (!path.empty()) {
        auto& [r, at] = path.back();
        if (at == 0) {
          order[r] = low[r] = ++visited;
          open.push_back(r);
        }
        if (at < edges[r].size()) {
          const uint32_t to = edges[r][at++].to;
          if (order[to] == 0) {
            path.emplace_back(to, 0);
          } else if (component[to] == 0) {
            low[r] = std::min(low[r], order[to]);
          }
          continue;
        }
        const uint32_t done = r;
        if (low[done] == order[done]) {
          ++components;
          uint32_t member = 0;
          do {
            member = open.back();
            open.pop_back();
            component[member] = components;
          } while (member != done);
        }
        path.pop_back();
        if (!path.empty()) low[path.back().first] = std::min(low[path.back().first], low[done]);
      }
    }
    for (uint32_t r = 0; r < count; ++r) {
      for (const Edge& edge : edges[r]) {
        if (!edge.grows || component[edge.to] != component[r]) continue;
        for (const auto& [name, id] : names_) {
          if (component[id] == component[r]) {
            throw std::runtime_error("the rule " + name.substr(0, 100) +
                                     " begins with itself (left recursion)");
          }
        }
        throw std::runtime_error("a rule begins with itself (left recursion)");
      }
    }
  }

  const std::string_view text_;
  const TokenTexts& tokens_;
  size_t at_ = 0;
  size_t size_ = 0;
  int depth_ = 0;
  std::map<std::string, uint32_t, std::less<>> names_;
  std::vector<std::vector<Sequence>> alternatives_;
  std::map<std::pair<bool, std::vector<std::pair<uint32_t, uint32_t>>>, uint32_t> sets_;
  std::shared_ptr<Grammar> grammar_ = std::make_shared<Grammar>();
};

std::shared_ptr<const Grammar> Grammar::compile(std::string_view text, const TokenTexts& tokens) {
  return GrammarParser(text, tokens).run();
}

// --- Following

GrammarMatcher::GrammarMatcher(std::shared_ptr<const Grammar> grammar, const TokenTexts& tokens)
    : grammar_(std::move(grammar)), tokens_(tokens) {
  nodes_.emplace_back();
  expanded_.push_back({0});
}

void GrammarMatcher::throw_too_costly() const {
  if (forgot_) throw_memory_full();
  throw GrammarTooCostly(
      "the grammar takes too long to follow: it can be read in too many ways at once");
}

int64_t GrammarMatcher::bytes() const {
  // A node has its place in three tables, and an entry about two.
  size_t bytes = nodes_.size() * 100 + state_entries_ * 8;
  bytes += ascii_.capacity() * sizeof(AsciiRow);
  bytes += others_.size() * 48 + others_.bucket_count() * sizeof(void*);
  bytes += (masks_.size() + 1) * (tokens_.size() / 8 + 40);  // and scratch_
  return static_cast<int64_t>(bytes);
}

void GrammarMatcher::count_memory() {
  constexpr int64_t kStep = 1 << 16;
  if (bytes() < memory_.bytes() + kStep) return;
  try {
    memory_.resize(bytes());
  } catch (const GrammarMemoryFull&) {
    if (masks_.empty() && ascii_.empty() && others_.empty()) throw;
    forget();
    memory_.resize(bytes());
  }
}

void GrammarMatcher::forget() {
  forgot_ = true;
  for (State& each : states_) each.ascii = each.mask = -1;
  std::vector<AsciiRow>().swap(ascii_);
  std::unordered_map<uint64_t, int32_t>().swap(others_);
  masks_.clear();
  spend(static_cast<int64_t>(states_.size()));
}

int32_t GrammarMatcher::push(uint32_t element, int32_t below) {
  if (grammar_->elements_[element].type == Grammar::Type::kEnd) return below;
  const uint64_t key = static_cast<uint64_t>(element) << 32 | static_cast<uint32_t>(below);
  if (const auto it = node_ids_.find(key); it != node_ids_.end()) return it->second;
  spend(20);
  if (nodes_.size() >= kMaxNodes) throw_too_costly();
  count_memory();
  const auto id = static_cast<int32_t>(nodes_.size());
  node_ids_.emplace(key, id);
  nodes_.push_back({element, below});
  expanded_.emplace_back();
  return id;
}

void GrammarMatcher::expand(int32_t node, std::vector<int32_t>& out) {
  const auto index = static_cast<size_t>(node);
  if (expanded_[index].empty()) {
    std::vector<int32_t> result;
    std::vector<int32_t> todo = {node};
    std::vector<int32_t> seen = {node};
    while (!todo.empty()) {
      const int32_t id = todo.back();
      todo.pop_back();
      spend(4);
      const Node at = nodes_[static_cast<size_t>(id)];
      const Grammar::Element element = grammar_->elements_[at.element];
      if (id == 0 || element.type != Grammar::Type::kRule) {
        result.push_back(id);
        continue;
      }
      const int32_t rest = push(at.element + 1, at.below);
      for (const uint32_t begin : grammar_->alternatives(element.value)) {
        const int32_t next = push(begin, rest);
        const auto place = std::lower_bound(seen.begin(), seen.end(), next);
        if (place != seen.end() && *place == next) continue;
        spend(1 + (seen.end() - place) / 64);
        seen.insert(place, next);
        todo.push_back(next);
      }
    }
    std::sort(result.begin(), result.end());
    state_entries_ += result.size();
    if (state_entries_ > kMaxStateEntries) throw_too_costly();
    count_memory();
    expanded_[index] = std::move(result);
  }
  spend(static_cast<int64_t>(expanded_[index].size()));
  out.insert(out.end(), expanded_[index].begin(), expanded_[index].end());
}

int32_t GrammarMatcher::intern(std::vector<int32_t> nodes) {
  std::sort(nodes.begin(), nodes.end());
  nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());
  spend(10 + 4 * static_cast<int64_t>(nodes.size()));
  if (nodes.empty()) return kDead;
  uint64_t hash = nodes.size();
  for (const int32_t node : nodes) hash = mix(hash, static_cast<uint64_t>(node));
  const auto [begin, end] = state_ids_.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    if (states_[static_cast<size_t>(it->second)].nodes == nodes) return it->second;
  }
  state_entries_ += nodes.size() + 16;
  if (state_entries_ > kMaxStateEntries) throw_too_costly();
  count_memory();
  State state;
  for (const int32_t node : nodes) {
    const Grammar::Type type = grammar_->elements_[nodes_[static_cast<size_t>(node)].element].type;
    const bool is_token = type == Grammar::Type::kToken || type == Grammar::Type::kNotToken;
    state.has_tokens = state.has_tokens || (node != 0 && is_token);
  }
  state.nodes = std::move(nodes);
  const auto id = static_cast<int32_t>(states_.size());
  states_.push_back(std::move(state));
  state_ids_.emplace(hash, id);
  return id;
}

GrammarMatcher::Position GrammarMatcher::start() {
  if (start_ == kUnknown) {
    std::vector<int32_t> nodes;
    for (const uint32_t begin : grammar_->alternatives(grammar_->root_))
      expand(push(begin, 0), nodes);
    start_ = intern(std::move(nodes));
  }
  return Position{start_};
}

int32_t GrammarMatcher::find_next(int32_t state, uint32_t character) {
  std::vector<int32_t> nodes;
  const std::vector<int32_t> from = states_[static_cast<size_t>(state)].nodes;
  spend(static_cast<int64_t>(from.size()));
  for (const int32_t id : from) {
    if (id == 0) continue;
    const Node at = nodes_[static_cast<size_t>(id)];
    const Grammar::Element element = grammar_->elements_[at.element];
    if (element.type != Grammar::Type::kSet) continue;
    const Grammar::Set& set = grammar_->sets_[element.value];
    spend(static_cast<int64_t>(set.ranges.size() / 8));
    if (set.has(character)) expand(push(at.element + 1, at.below), nodes);
  }
  return intern(std::move(nodes));
}

int32_t GrammarMatcher::next(int32_t state, uint32_t character) {
  const auto index = static_cast<size_t>(state);
  if (character >= 128) {
    const uint64_t key = static_cast<uint64_t>(state) << 32 | character;
    const auto found = others_.find(key);
    if (found != others_.end()) return found->second;
    const int32_t to = find_next(state, character);
    if (others_.size() >= kMaxOthers) others_.clear();
    others_[key] = to;
    count_memory();
    return to;
  }
  if (const int32_t row = states_[index].ascii; row >= 0) {
    const int32_t known = ascii_[static_cast<size_t>(row)].next[character];
    if (known != kUnknown) return known;
  }
  const int32_t to = find_next(state, character);  // makes states, and may forget rows
  const bool is_new = states_[index].ascii < 0;
  if (is_new) {
    spend(32);
    if (ascii_.size() >= kMaxAsciiRows) {
      spend(static_cast<int64_t>(states_.size()));
      for (State& each : states_) each.ascii = -1;
      ascii_.clear();
    }
    states_[index].ascii = static_cast<int32_t>(ascii_.size());
    std::fill_n(ascii_.emplace_back().next, 128, kUnknown);
  }
  ascii_[static_cast<size_t>(states_[index].ascii)].next[character] = to;
  if (is_new) count_memory();  // may forget it again
  return to;
}

bool GrammarMatcher::meets(int32_t state, uint32_t low, uint32_t high) {
  const std::vector<int32_t>& nodes = states_[static_cast<size_t>(state)].nodes;
  spend(static_cast<int64_t>(nodes.size()));
  return std::any_of(nodes.begin(), nodes.end(), [&](int32_t id) {
    if (id == 0) return false;
    const Grammar::Element element = grammar_->elements_[nodes_[static_cast<size_t>(id)].element];
    return element.type == Grammar::Type::kSet && grammar_->sets_[element.value].meets(low, high);
  });
}

bool GrammarMatcher::step(Position& at, uint8_t byte) {
  spend(1);
  if (at.missing == 0 && byte < 0x80) {
    at.state = next(at.state, byte);
    return at.state != kDead;
  }
  if (at.missing == 0) {
    if (byte < 0xC2 || byte > 0xF4) return false;
    at.length = at.missing = byte >= 0xF0 ? 3 : byte >= 0xE0 ? 2 : 1;
    at.partial = byte & (0x3Fu >> at.missing);
  } else {
    if (!continues_utf8(static_cast<char>(byte))) return false;
    at.partial = at.partial << 6 | (byte & 0x3Fu);
    --at.missing;
  }
  // The characters it may still become; none is written longer than need be.
  const uint32_t shortest = at.length == 3 ? 0x10000 : at.length == 2 ? 0x800 : 0x80;
  if (at.missing > 0) {
    const uint32_t first = at.partial << (6 * at.missing);
    const uint32_t last = std::min(first | ((1u << (6 * at.missing)) - 1), kLastCharacter);
    const uint32_t low = std::max(first, shortest);
    return low <= last && meets(at.state, low, last);
  }
  if (at.partial < shortest || at.partial > kLastCharacter) return false;
  at.state = next(at.state, at.partial);
  at.partial = 0;
  at.length = 0;
  return at.state != kDead;
}

GrammarMatcher::Position GrammarMatcher::advance(const Position& from, Token token,
                                                 std::string_view text) {
  Position by_text = from;
  bool lives = !text.empty();
  for (size_t i = 0; lives && i < text.size(); ++i) {
    lives = step(by_text, static_cast<uint8_t>(text[i]));
  }
  if (from.missing > 0 || !states_[static_cast<size_t>(from.state)].has_tokens) {
    return lives ? by_text : Position{};
  }
  // Those ways that want this very token, beside those that its text goes on.
  std::vector<int32_t> nodes;
  if (lives && by_text.missing == 0) nodes = states_[static_cast<size_t>(by_text.state)].nodes;
  const std::vector<int32_t> start = states_[static_cast<size_t>(from.state)].nodes;
  for (const int32_t id : start) {
    const Node at = nodes_[static_cast<size_t>(id)];
    const Grammar::Element element = grammar_->elements_[at.element];
    const bool same = element.value == static_cast<uint32_t>(token);
    const bool fits = (element.type == Grammar::Type::kToken && same) ||
                      (element.type == Grammar::Type::kNotToken && !same);
    if (id != 0 && fits) expand(push(at.element + 1, at.below), nodes);
  }
  if (nodes.empty()) return lives ? by_text : Position{};
  return Position{intern(std::move(nodes))};
}

bool GrammarMatcher::may_end(const Position& at) const {
  return at.state >= 0 && at.missing == 0 && states_[static_cast<size_t>(at.state)].nodes[0] == 0;
}

bool GrammarMatcher::allows(const Position& at, Token token) {
  if (tokens_.is_end(token)) return may_end(at);
  const std::string& text = tokens_.text(token);
  if (text.empty() || text[0] == '\0') return false;
  return advance(at, token, text).state >= 0;
}

void GrammarMatcher::fill(const Position& from, std::vector<uint64_t>& mask) {
  mask.assign((tokens_.size() + 63) / 64, 0);
  spend(static_cast<int64_t>(mask.size() + tokens_.sorted_.size() / 8));
  const auto allow = [&](Token token) {
    mask[static_cast<size_t>(token) / 64] |= uint64_t{1} << (token % 64);
  };
  // Tokens in order, so that what two of them begin with is followed once.
  constexpr size_t kNone = SIZE_MAX;
  std::vector<Position> path = {from};
  size_t dead = kNone;  // so many bytes of the last token are not allowed
  for (const TokenTexts::Entry& entry : tokens_.sorted_) {
    if (entry.common >= dead) continue;
    dead = kNone;
    const std::string& text = tokens_.text(entry.token);
    path.resize(std::max(path.size(), text.size() + 1));
    for (size_t i = entry.common; i < text.size(); ++i) {
      path[i + 1] = path[i];
      if (step(path[i + 1], static_cast<uint8_t>(text[i]))) continue;
      dead = i + 1;
      break;
    }
    if (dead == kNone) allow(entry.token);
  }
  if (from.missing == 0 && states_[static_cast<size_t>(from.state)].has_tokens) {
    for (const TokenTexts::Entry& entry : tokens_.sorted_) {
      spend(4);
      if (advance(from, entry.token, tokens_.text(entry.token)).state >= 0) allow(entry.token);
    }
  }
  if (!may_end(from)) return;
  for (size_t t = 0; t < tokens_.size(); ++t) {
    if (tokens_.is_end(static_cast<Token>(t))) allow(static_cast<Token>(t));
  }
}

const std::vector<uint64_t>& GrammarMatcher::allowed(const Position& at) {
  const auto index = static_cast<size_t>(at.state);
  if (at.missing == 0 && states_[index].mask >= 0) {
    return masks_[static_cast<size_t>(states_[index].mask)];
  }
  fill(at, scratch_);
  if (at.missing == 0) {
    if ((masks_.size() + 1) * scratch_.size() * sizeof(uint64_t) > kMaxMaskBytes) {
      for (State& each : states_) each.mask = -1;
      masks_.clear();
    }
    states_[index].mask = static_cast<int32_t>(masks_.size());
    masks_.push_back(scratch_);
    count_memory();  // may forget it again
  }
  return scratch_;
}

}  // namespace relay::engine
