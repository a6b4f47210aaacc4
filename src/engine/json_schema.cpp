#include "engine/json_schema.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <exception>
#include <map>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "json-schema-to-grammar.h"
#include "json.h"

namespace relay::engine {

namespace {

using Json = common_json;

// llama.cpp's converter recurses as deep as a schema is.
constexpr int kMaxDepth = 64;
constexpr int kMaxComparedDepth = 8;  // of the schemas of a oneOf
constexpr size_t kMaxKeys = 5'000;    // of one object: finding one takes as long as there are many
constexpr size_t kMaxNameBytes = 256;
constexpr size_t kMaxOptional = 256;
constexpr int64_t kMaxMultiples = 1'000;
constexpr int64_t kMaxCount = 65'536;  // minItems, maxItems, minLength, maxLength
// The converter's integers have up to 16 digits.
constexpr int64_t kMaxInteger = 9'999'999'999'999'999;

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw std::runtime_error(why + " at " + path);
}

std::string quoted(const std::string& word) { return "'" + word + "'"; }

/// What a keyword says something about; a value of another type satisfies it.
enum class Group { kNone, kObject, kArray, kString, kNumber, kAny };

/// Every keyword that constrains. All others are words for people, and pass.
Group group_of(const std::string& keyword) {
  static const std::map<std::string, Group> kGroups = {
      {"properties", Group::kObject},
      {"required", Group::kObject},
      {"additionalProperties", Group::kObject},
      {"patternProperties", Group::kObject},
      {"propertyNames", Group::kObject},
      {"minProperties", Group::kObject},
      {"maxProperties", Group::kObject},
      {"dependencies", Group::kObject},
      {"dependentRequired", Group::kObject},
      {"dependentSchemas", Group::kObject},
      {"unevaluatedProperties", Group::kObject},
      {"items", Group::kArray},
      {"prefixItems", Group::kArray},
      {"additionalItems", Group::kArray},
      {"unevaluatedItems", Group::kArray},
      {"contains", Group::kArray},
      {"minContains", Group::kArray},
      {"maxContains", Group::kArray},
      {"minItems", Group::kArray},
      {"maxItems", Group::kArray},
      {"uniqueItems", Group::kArray},
      {"pattern", Group::kString},
      {"minLength", Group::kString},
      {"maxLength", Group::kString},
      {"format", Group::kString},
      {"minimum", Group::kNumber},
      {"maximum", Group::kNumber},
      {"exclusiveMinimum", Group::kNumber},
      {"exclusiveMaximum", Group::kNumber},
      {"multipleOf", Group::kNumber},
      {"type", Group::kAny},
      {"enum", Group::kAny},
      {"const", Group::kAny},
      {"anyOf", Group::kAny},
      {"oneOf", Group::kAny},
      {"allOf", Group::kAny},
      {"not", Group::kAny},
      {"if", Group::kAny},
      {"then", Group::kAny},
      {"else", Group::kAny},
      {"$ref", Group::kAny},
      {"$dynamicRef", Group::kAny},
      {"$recursiveRef", Group::kAny},
  };
  const auto it = kGroups.find(keyword);
  return it == kGroups.end() ? Group::kNone : it->second;
}

Group group_of_type(const std::string& type) {
  if (type == "object") return Group::kObject;
  if (type == "array") return Group::kArray;
  if (type == "string") return Group::kString;
  return type == "integer" || type == "number" ? Group::kNumber : Group::kNone;
}

bool is_definitions(const std::string& keyword) {
  return keyword == "$defs" || keyword == "definitions";
}

bool has_type(const Json& value, const std::string& type) {
  if (type == "object") return value.is_object();
  if (type == "array") return value.is_array();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "null") return value.is_null();
  if (!value.is_number()) return false;
  if (type == "number" || value.is_number_integer()) return true;
  const auto number = value.get<double>();
  return number == std::floor(number);
}

/// Rewrites a schema into one that llama.cpp's converter keeps to the letter, without the forms
/// that it passes over in silence, takes for something else, or recurses on for ever.
///
/// `strict`: what no grammar can keep is an error. Otherwise it is left out, and what comes out
/// allows more than the schema does.
class Normaliser {
 public:
  Normaliser(const Json& root, bool strict, SchemaBudget& budget)
      : root_(root), strict_(strict), budget_(budget) {}

  /// `name`: what the converter will call it.
  Json run(const std::string& name = "") {
    Json result = node(root_, "#", 0);
    while (!todo_.empty()) {
      const std::string ref = todo_.back();
      todo_.pop_back();
      current_ = ref;
      definitions_[names_.at(ref)] = node(target(ref, ref), ref, 0);
    }
    check_cycles();
    for (const auto& [alternatives, path] : exclusive_) check_exclusive(alternatives, path);
    if (!definitions_.empty()) result["$defs"] = definitions_;
    check_names(result, name);
    return result;
  }

  /// Whether the result says it in other words than the schema did, and not just less.
  bool rewritten() const { return rewritten_; }

 private:
  static bool contains(const Json& schema, const char* keyword) { return schema.contains(keyword); }

  /// For what cannot be kept: an error, or nothing.
  void drop(const std::string& path, const std::string& why) const {
    if (strict_) refuse(path, why);
  }
  void drop_keyword(const Json& schema, const char* keyword, const std::string& path) const {
    if (contains(schema, keyword)) drop(path, quoted(keyword) + " is not supported");
  }

  void count(const std::string& path, int depth) {
    if (depth > kMaxDepth) {
      refuse(path.substr(0, 80) + "…",
             "the schema is nested deeper than " + std::to_string(kMaxDepth) + " levels");
    }
    if (--budget_.parts < 0) refuse("#", "the schema has too many parts");
  }

  /// For values that are copied or compared, which references and choices multiply.
  void spend(int64_t values) {
    budget_.values -= values;
    if (budget_.values < 0) {
      refuse("#", "the schema is too large where its references and choices are written out");
    }
  }

  /// How many values it has in all; a long text counts as several.
  static int64_t weight(const Json& value) {
    int64_t sum = 1;
    if (value.is_string()) sum += static_cast<int64_t>(value.get<std::string>().size() / 64);
    if (value.is_array() || value.is_object()) {
      for (const Json& one : value) sum += weight(one);
    }
    return sum;
  }

  static void check_keys(const Json& object, const std::string& path) {
    if (object.size() <= kMaxKeys) return;
    refuse(path, "the object has more than " + std::to_string(kMaxKeys) + " members");
  }

  // --- References

  const Json& target(const std::string& ref, const std::string& path) const {
    if (ref != "#" && !ref.starts_with("#/")) {
      refuse(path, "the $ref " + ref + " does not point into this schema");
    }
    const Json* at = &root_;
    for (size_t begin = 2; begin <= ref.size();) {
      const size_t end = std::min(ref.find('/', begin), ref.size());
      const std::string raw = ref.substr(begin, end - begin);
      std::string key;
      for (size_t i = 0; i < raw.size(); ++i) {
        const bool escape = raw[i] == '~' && i + 1 < raw.size();
        if (escape && raw[i + 1] == '1') {
          key += '/';
          ++i;
        } else if (escape && raw[i + 1] == '0') {
          key += '~';
          ++i;
        } else {
          key += raw[i];
        }
      }
      const bool is_index = !key.empty() && key.size() < 10 &&
                            key.find_first_not_of("0123456789") == std::string::npos;
      if (at->is_object() && at->contains(key)) {
        at = &at->at(key);
      } else if (at->is_array() && is_index && std::stoul(key) < at->size()) {
        at = &at->at(std::stoul(key));
      } else {
        refuse(path, "the $ref " + ref + " points at nothing");
      }
      begin = end + 1;
    }
    return *at;
  }

  /// A reference to the normalised target, which is made later.
  Json reference(const std::string& ref, const std::string& path, bool immediate) {
    target(ref, path);
    if (!names_.contains(ref)) {
      if (names_.size() >= kMaxKeys) refuse(path, "the schema has too many references");
      std::string name;
      for (const char* folder : {"#/$defs/", "#/definitions/"}) {
        if (ref.starts_with(folder)) name = ref.substr(std::string(folder).size());
      }
      // The converter writes other characters as '-', and takes equal names for one.
      std::string written;
      bool plain = !name.empty() && name.size() <= 64;
      for (size_t i = 0; i < name.size(); ++i) {
        const bool letter = std::isalnum(static_cast<unsigned char>(name[i])) != 0;
        plain = plain && (letter || name[i] == '_' || name[i] == '-');
        if (name[i] != '_' || i == 0 || name[i - 1] != '_') written += letter ? name[i] : '-';
      }
      if (!plain || !taken_.insert(written).second) {
        do {
          name = "relay" + std::to_string(renamed_++);
        } while (!taken_.insert(name).second);
      }
      if (ref != "#/$defs/" + name) rewritten_ = rewritten_ || ref != "#/definitions/" + name;
      names_[ref] = name;
      todo_.push_back(ref);
    }
    if (immediate) edges_[current_].insert(ref);
    Json result = Json::object();
    result["$ref"] = "#/$defs/" + names_.at(ref);
    return result;
  }

  /// No schema may be itself, or a choice of which it is one, with nothing in between.
  void check_cycles() const {
    enum class Mark { kOpen, kDone };
    std::map<std::string, Mark> marks;
    for (const auto& [start, unused] : edges_) {
      std::vector<std::pair<std::string, bool>> stack = {{start, false}};
      while (!stack.empty()) {
        const auto [ref, leaving] = stack.back();
        stack.pop_back();
        if (leaving) {
          marks[ref] = Mark::kDone;
          continue;
        }
        if (marks.contains(ref)) {
          if (marks.at(ref) == Mark::kOpen) {
            refuse(ref, "the $ref leads back to itself without any content");
          }
          continue;
        }
        marks[ref] = Mark::kOpen;
        stack.emplace_back(ref, true);
        const auto next = edges_.find(ref);
        if (next == edges_.end()) continue;
        for (const std::string& to : next->second) {
          const auto mark = marks.find(to);
          if (mark != marks.end() && mark->second == Mark::kOpen) {
            refuse(ref, "the $ref " + to + " leads back to itself without any content");
          }
          if (mark == marks.end()) stack.emplace_back(to, false);
        }
      }
    }
  }

  /// The converter calls rules after the properties above them, with '-' for what is no letter or
  /// digit, and looks for a name that is free one number after the other.
  void check_names(const Json& plain, const std::string& name, uint64_t above = 0) {
    for (const char c : name) {
      // FNV, over letters and digits
      if (std::isalnum(static_cast<unsigned char>(c)) == 0) continue;
      above = (above ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    }
    budget_.equal_names -= budget_.names[above]++;
    if (budget_.equal_names < 0) {
      refuse("#",
             "too many names are equal but for characters other than letters and digits (A to Z, "
             "a to z, 0 to 9)");
    }
    for (const auto& item : plain.items()) {
      const Json& value = item.value();
      const bool named = item.key() == "properties" || item.key() == "$defs";
      const bool one = item.key() == "items" || item.key() == "additionalProperties";
      const bool list = item.key() == "anyOf" || item.key() == "oneOf" ||
                        item.key() == "prefixItems" || item.key() == "items";
      if (named) {
        for (const auto& member : value.items()) check_names(member.value(), member.key(), above);
      } else if (one && value.is_object()) {
        check_names(value, item.key(), above);
      } else if (list && value.is_array()) {
        for (size_t i = 0; i < value.size(); ++i) {
          check_names(value.at(i), std::to_string(i), above);
        }
      }
    }
  }

  // --- Taking together what must hold together

  static bool constrains(const Json& schema) {
    for (const auto& item : schema.items()) {
      if (group_of(item.key()) != Group::kNone) return true;
    }
    return false;
  }

  /// The schema without $ref and allOf, which are merged in. A sole $ref may stay.
  Json flat(const Json& schema, const std::string& path, int depth, bool keep_ref) {
    count(path, depth);
    if (schema.is_boolean()) {
      if (!schema.get<bool>()) refuse(path, "the schema false allows no value");
      rewritten_ = true;
      return Json::object();
    }
    if (!schema.is_object()) refuse(path, "a schema must be an object");
    check_keys(schema, path);
    Json own = Json::object();
    for (const auto& item : schema.items()) {
      const std::string& key = item.key();
      if (key == "allOf" || key == "$ref" || is_definitions(key)) continue;
      spend(weight(item.value()));
      own[key] = item.value();
    }
    std::vector<Json> parts;
    const bool alone = !constrains(own);
    const size_t count_all = contains(schema, "allOf") ? schema.at("allOf").size() : 0;
    if (contains(schema, "allOf")) {
      const Json& all = schema.at("allOf");
      if (!all.is_array() || all.empty()) refuse(path, "'allOf' must be a list of schemas");
      rewritten_ = true;
      const bool only = alone && count_all == 1 && !contains(schema, "$ref");
      size_t i = 0;
      for (const Json& one : all) {
        parts.push_back(
            flat(one, path + "/allOf/" + std::to_string(i++), depth + 1, keep_ref && only));
      }
    }
    if (contains(schema, "$ref")) {
      const Json& value = schema.at("$ref");
      if (!value.is_string()) refuse(path, "'$ref' must be a string");
      const auto ref = value.get<std::string>();
      if (alone && count_all == 0 && keep_ref) {
        own["$ref"] = ref;
        return own;
      }
      rewritten_ = true;
      if (!inlining_.insert(ref).second) {
        refuse(path, "the $ref " + ref + " leads back to itself without any content");
      }
      parts.push_back(flat(target(ref, path), ref, depth + 1, false));
      inlining_.erase(ref);
    }
    for (const Json& part : parts) own = merge(own, part, path);
    close_array(own);
    return own;
  }

  /// "unevaluatedItems": false where nothing evaluates an item.
  static void close_array(Json& own) {
    if (!contains(own, "unevaluatedItems") || own.at("unevaluatedItems") != false) return;
    for (const char* keyword : {"items", "prefixItems", "contains", "anyOf", "oneOf"}) {
      if (contains(own, keyword)) return;
    }
    own.erase("unevaluatedItems");
    own["items"] = false;
  }

  static std::vector<std::string> types_of(const Json& type, const std::string& path) {
    static const std::set<std::string> kTypes = {"object", "array",   "string", "integer",
                                                 "number", "boolean", "null"};
    std::vector<std::string> types;
    const auto add = [&](const Json& one) {
      if (!one.is_string() || !kTypes.contains(one.get<std::string>())) {
        refuse(path, "'type' has the value " + one.dump_safe() + ", which is no type");
      }
      const auto type = one.get<std::string>();
      if (std::find(types.begin(), types.end(), type) == types.end()) types.push_back(type);
    };
    if (type.is_array()) {
      for (const Json& one : type) add(one);
      if (types.empty()) refuse(path, "'type' must not be empty");
    } else {
      add(type);
    }
    return types;
  }

  static Json both(const Json& a, const Json& b) {
    Json all = Json::array();
    all.push_back(a);
    all.push_back(b);
    Json result = Json::object();
    result["allOf"] = all;
    return result;
  }

  /// Additional properties are shut out by one side and named by the other.
  static void check_closed(const Json& closed, const Json& other, const std::string& path) {
    if (!contains(closed, "additionalProperties") || !contains(other, "properties")) return;
    const Json& additional = closed.at("additionalProperties");
    if (additional == true || (additional.is_object() && additional.empty())) return;
    for (const auto& item : other.at("properties").items()) {
      if (contains(closed, "properties") && closed.at("properties").contains(item.key())) continue;
      refuse(path, "'additionalProperties' beside the property " + quoted(item.key()) +
                       " of another part is not supported");
    }
  }

  /// What holds for values that satisfy both.
  Json merge(const Json& a, const Json& b, const std::string& path) {
    if (!constrains(b)) return a;
    spend(weight(a) + weight(b));
    check_closed(a, b, path);
    check_closed(b, a, path);
    Json result = a;
    for (const auto& item : b.items()) {
      const std::string key = item.key();
      const Json& theirs = item.value();
      if (!result.contains(key)) {
        result[key] = theirs;
        continue;
      }
      const Json ours = result.at(key);
      if (group_of(key) == Group::kNone || ours == theirs) continue;
      if (key == "type") {
        result[key] = common_types(ours, theirs, path);
      } else if (key == "properties" && ours.is_object() && theirs.is_object()) {
        check_keys(ours, path + "/properties");
        check_keys(theirs, path + "/properties");
        Json properties = ours;
        for (const auto& property : theirs.items()) {
          const std::string& name = property.key();
          const bool twice = properties.contains(name) && properties.at(name) != property.value();
          properties[name] = twice ? both(properties.at(name), property.value()) : property.value();
        }
        result[key] = properties;
      } else if (key == "required" && ours.is_array() && theirs.is_array()) {
        Json names = ours;
        for (const Json& name : theirs) names.push_back(name);
        result[key] = names;
      } else if ((key == "items" && ours.is_object() && theirs.is_object()) ||
                 (key == "additionalProperties" && ours.is_object() && theirs.is_object())) {
        result[key] = both(ours, theirs);
      } else if (key == "enum") {
        result[key] = in_both(ours, theirs, path);
      } else if (ours.is_number() && theirs.is_number() && key != "multipleOf") {
        const bool least = key.starts_with("min") || key == "exclusiveMinimum";
        const bool mine = (ours.get<double>() > theirs.get<double>()) == least;
        result[key] = mine ? ours : theirs;
      } else {
        refuse(path, "two different " + quoted(key) + " for one value are not supported");
      }
    }
    return result;
  }

  static Json in_both(const Json& a, const Json& b, const std::string& path) {
    if (!a.is_array() || !b.is_array()) refuse(path, "'enum' must be a list");
    std::set<std::string> others;
    for (const Json& value : b) others.insert(value.dump_safe());
    Json values = Json::array();
    for (const Json& value : a) {
      if (others.contains(value.dump_safe())) values.push_back(value);
    }
    return values;
  }

  static Json common_types(const Json& a, const Json& b, const std::string& path) {
    Json types = Json::array();
    std::set<std::string> seen;
    for (const std::string& one : types_of(a, path)) {
      for (const std::string& other : types_of(b, path)) {
        const bool narrow =
            (one == "integer" && other == "number") || (one == "number" && other == "integer");
        if (one != other && !narrow) continue;
        const std::string type = narrow ? "integer" : one;
        if (seen.insert(type).second) types.push_back(type);
      }
    }
    if (types.empty()) refuse(path, "no value has two different types");
    return types.size() == 1 ? types.at(size_t{0}) : types;
  }

  // --- One schema

  /// `immediate`: a value of it begins where a value of the definition it stands in begins.
  Json node(const Json& schema, const std::string& path, int depth, bool immediate = true) {
    Json plain = flat(schema, path, depth, /*keep_ref=*/true);
    if (contains(plain, "$ref")) {
      Json result = reference(plain.at("$ref").get<std::string>(), path, immediate);
      for (const auto& item : plain.items()) {
        if (item.key() != "$ref") result[item.key()] = item.value();
      }
      return result;
    }
    for (const char* keyword : {"not", "if", "then", "else", "$dynamicRef", "$recursiveRef"}) {
      drop_keyword(plain, keyword, path);
      plain.erase(keyword);
    }
    if (contains(plain, "anyOf") || contains(plain, "oneOf")) {
      return choice(plain, path, depth, immediate);
    }
    return typed(plain, path, depth);
  }

  Json choice(const Json& schema, const std::string& path, int depth, bool immediate) {
    if (contains(schema, "anyOf") && contains(schema, "oneOf")) {
      refuse(path, "'anyOf' beside 'oneOf' is not supported");
    }
    const char* keyword = contains(schema, "anyOf") ? "anyOf" : "oneOf";
    const Json& list = schema.at(keyword);
    if (!list.is_array() || list.empty()) {
      refuse(path, quoted(keyword) + " must be a list of schemas");
    }
    Json beside = Json::object();
    Json result = Json::object();
    for (const auto& item : schema.items()) {
      if (item.key() == keyword) continue;
      (group_of(item.key()) == Group::kNone ? result : beside)[item.key()] = item.value();
    }
    const bool distribute = constrains(beside);
    if (distribute && keyword == std::string("oneOf")) {
      // One of several that each hold for a value: a grammar can say any of them, not only one.
      for (const auto& item : beside.items()) {
        if (item.key() != "type") {
          drop(path, quoted(item.key()) + " beside 'oneOf' is not supported (use 'anyOf')");
        }
      }
    }
    Json alternatives = Json::array();
    size_t i = 0;
    for (const Json& one : list) {
      const std::string at = path + "/" + keyword + "/" + std::to_string(i++);
      if (!distribute) {
        alternatives.push_back(node(one, at, depth + 1, immediate));
        continue;
      }
      // What stands beside the choice holds for each of it.
      rewritten_ = true;
      alternatives.push_back(
          node(merge(flat(one, at, depth + 1, false), beside, at), at, depth + 1, immediate));
    }
    if (strict_ && keyword == std::string("oneOf")) exclusive_.emplace_back(alternatives, path);
    result[keyword] = alternatives;
    return result;
  }

  // --- Exactly one of several

  /// A grammar says any of several, and so 'oneOf' only where no value matches two of them.
  void check_exclusive(const Json& alternatives, const std::string& path) {
    for (size_t i = 0; i < alternatives.size(); ++i) {
      for (size_t j = 0; j < alternatives.size(); ++j) {
        if (i == j || misses(alternatives.at(i), alternatives.at(j), 0)) continue;
        refuse(path,
               "'oneOf' is not supported where a value may match two of its schemas, as here "
               "those at " +
                   std::to_string(std::min(i, j)) + " and " + std::to_string(std::max(i, j)) +
                   " (use 'anyOf', or give each object a "
                   "required property with a 'const' of its own)");
      }
    }
  }

  /// Whether it is plain that no value that a grammar of `a` allows satisfies `b`. Both are
  /// normalised.
  bool misses(const Json& a, const Json& b, int depth) {
    if (depth > kMaxComparedDepth) return false;  // a recursive schema has no end
    count("#", depth);
    if (contains(a, "$ref")) return misses(definition(a), b, depth + 1);
    if (contains(b, "$ref")) return misses(a, definition(b), depth + 1);
    for (const char* keyword : {"anyOf", "oneOf"}) {
      if (contains(a, keyword)) {
        return all_of(a.at(keyword), [&](const Json& one) { return misses(one, b, depth + 1); });
      }
      if (contains(b, keyword)) {
        return all_of(b.at(keyword), [&](const Json& one) { return misses(a, one, depth + 1); });
      }
    }
    if (contains(a, "enum")) {
      return all_of(a.at("enum"), [&](const Json& value) { return excluded(value, b); });
    }
    if (contains(b, "enum")) {
      return all_of(b.at("enum"), [&](const Json& value) { return excluded(value, a); });
    }
    if (!contains(a, "type") || !contains(b, "type")) return false;
    const auto type = a.at("type").get<std::string>();
    const auto other = b.at("type").get<std::string>();
    if (group_of_type(type) == Group::kNumber && group_of_type(other) == Group::kNumber) {
      return lies_below(a, b) || lies_below(b, a);
    }
    if (type != other) return true;
    return type == "object" && objects_miss(a, b, depth);
  }

  template <typename Test>
  static bool all_of(const Json& list, const Test& test) {
    for (const Json& one : list) {
      if (!test(one)) return false;
    }
    return true;
  }

  const Json& definition(const Json& reference) const {
    const auto ref = reference.at("$ref").get<std::string>();
    return definitions_.at(ref.substr(std::string("#/$defs/").size()));
  }

  bool excluded(const Json& value, const Json& schema) {
    if (contains(schema, "enum")) {
      spend(weight(value) * static_cast<int64_t>(schema.at("enum").size()));
      return all_of(schema.at("enum"), [&](const Json& one) { return one != value; });
    }
    return contains(schema, "type") && !has_type(value, schema.at("type").get<std::string>());
  }

  static bool lies_below(const Json& a, const Json& b) {
    return contains(a, "maximum") && contains(b, "minimum") &&
           a.at("maximum").get<double>() < b.at("minimum").get<double>();
  }

  bool objects_miss(const Json& a, const Json& b, int depth) {
    const auto names = [](const Json& object, const std::string& name) {
      return contains(object, "properties") && object.at("properties").contains(name);
    };
    const auto may_have_more = [](const Json& object) {
      return contains(object, "additionalProperties") && object.at("additionalProperties") != false;
    };
    const bool b_is_closed = contains(b, "additionalProperties") && !may_have_more(b);
    for (const bool of_a : {true, false}) {
      const Json& object = of_a ? a : b;
      if (!contains(object, "required")) continue;
      for (const Json& required : object.at("required")) {
        const auto name = required.get<std::string>();
        if (names(a, name) && names(b, name)) {
          if (misses(a.at("properties").at(name), b.at("properties").at(name), depth + 1)) {
            return true;
          }
        } else if (of_a ? b_is_closed && !names(b, name) : !names(a, name) && !may_have_more(a)) {
          return true;
        }
      }
    }
    return false;
  }

  // --- One type

  Json typed(Json schema, const std::string& path, int depth) {
    std::vector<std::string> types;
    if (contains(schema, "type")) types = types_of(schema.at("type"), path);
    if (contains(schema, "const")) {
      Json values = Json::array();
      values.push_back(schema.at("const"));
      if (contains(schema, "enum")) {
        values = in_both(schema.at("enum"), values, path);
      }
      schema.erase("const");
      schema["enum"] = values;
    }
    if (contains(schema, "enum")) return enumeration(schema, types, path);
    if (types.empty()) types = types_meant(schema);
    if (types.empty()) return schema;  // any value
    if (types.size() > 1) {
      Json alternatives = Json::array();
      Json result = Json::object();
      for (const auto& item : schema.items()) {
        if (group_of(item.key()) == Group::kNone) result[item.key()] = item.value();
      }
      for (const std::string& type : types) {
        alternatives.push_back(one_type(schema, type, path, depth));
      }
      rewritten_ = true;
      result["anyOf"] = alternatives;
      return result;
    }
    return one_type(schema, types.front(), path, depth);
  }

  /// Without a type the keywords tell what is meant.
  static std::vector<std::string> types_meant(const Json& schema) {
    std::vector<std::string> types;
    const std::pair<Group, const char*> kMeant[] = {{Group::kObject, "object"},
                                                    {Group::kArray, "array"},
                                                    {Group::kString, "string"},
                                                    {Group::kNumber, "number"}};
    for (const auto& [group, type] : kMeant) {
      for (const auto& item : schema.items()) {
        if (group_of(item.key()) != group) continue;
        types.emplace_back(type);
        break;
      }
    }
    return types;
  }

  Json enumeration(const Json& schema, const std::vector<std::string>& types,
                   const std::string& path) {
    const Json& all = schema.at("enum");
    if (!all.is_array()) refuse(path, "'enum' must be a list");
    Json values = Json::array();
    for (const Json& value : all) {
      const bool fits = types.empty() || std::any_of(types.begin(), types.end(), [&](auto& type) {
                          return has_type(value, type);
                        });
      if (fits) values.push_back(value);
    }
    if (values.empty()) refuse(path, "'enum' allows no value");
    Json result = Json::object();
    for (const auto& item : schema.items()) {
      const Group group = group_of(item.key());
      if (group == Group::kNone) result[item.key()] = item.value();
      if (group == Group::kNone || group == Group::kAny || item.key() == "format") continue;
      drop(path, quoted(item.key()) + " beside 'enum' or 'const' is not supported");
    }
    if (types.size() == 1) result["type"] = types.front();
    rewritten_ = rewritten_ || values.size() != all.size() || contains(schema, "const");
    result["enum"] = values;
    return result;
  }

  /// The schema for values of one type: keywords of others say nothing about them.
  Json one_type(const Json& schema, const std::string& type, const std::string& path, int depth) {
    count(path, depth);
    const Group group = group_of_type(type);
    Json own = Json::object();
    for (const auto& item : schema.items()) {
      const Group of = group_of(item.key());
      if (of == Group::kNone || of == group) own[item.key()] = item.value();
    }
    own["type"] = type;
    switch (group) {
      case Group::kObject:
        object(own, path, depth);
        break;
      case Group::kArray:
        array(own, path, depth);
        break;
      case Group::kString:
        string(own, path);
        break;
      case Group::kNumber:
        number(own, path);
        break;
      default:
        break;
    }
    return own;
  }

  void object(Json& own, const std::string& path, int depth) {
    for (const char* keyword : {"patternProperties", "propertyNames", "maxProperties",
                                "dependencies", "dependentRequired", "dependentSchemas"}) {
      drop_keyword(own, keyword, path);
      own.erase(keyword);
    }
    if (contains(own, "minProperties")) {
      if (own.at("minProperties") != 0) drop_keyword(own, "minProperties", path);
      own.erase("minProperties");
    }
    Json properties = Json::object();
    if (contains(own, "properties")) {
      if (!own.at("properties").is_object()) refuse(path, "'properties' must be an object");
      check_keys(own.at("properties"), path + "/properties");
      for (const auto& item : own.at("properties").items()) properties[item.key()] = item.value();
    }
    if (contains(own, "unevaluatedProperties")) {
      // Properties that are not named do not occur, unless additionalProperties lets them in.
      if (own.at("unevaluatedProperties") != false || properties.empty()) {
        drop_keyword(own, "unevaluatedProperties", path);
      }
      own.erase("unevaluatedProperties");
    }
    Json additional = true;
    const bool says_additional = contains(own, "additionalProperties");
    if (says_additional) additional = own.at("additionalProperties");
    if (!additional.is_boolean() && !additional.is_object()) {
      refuse(path, "'additionalProperties' must be a schema");
    }

    std::set<std::string> required;
    if (contains(own, "required")) {
      if (!own.at("required").is_array()) refuse(path, "'required' must be a list of names");
      Json names = Json::array();
      for (const Json& name : own.at("required")) {
        if (!name.is_string()) refuse(path, "'required' must be a list of names");
        if (required.insert(name.get<std::string>()).second) names.push_back(name);
      }
      own["required"] = names;
    }
    for (const std::string& name : required) {
      if (properties.contains(name)) continue;
      if (additional == false) {
        refuse(path, "'required' names " + quoted(name) +
                         ", which neither 'properties' nor 'additionalProperties' allows");
      }
      // It is there, and anything that additional properties may be.
      rewritten_ = true;
      properties[name] = additional.is_object() ? additional : Json::object();
    }

    const bool open = says_additional && additional != false;
    const std::string inside = path + "/properties/";
    size_t optional = 0;
    Json kept = Json::object();
    for (const auto& item : properties.items()) {
      const std::string& name = item.key();
      if (name.size() > kMaxNameBytes) {
        refuse(path,
               "a property's name is longer than " + std::to_string(kMaxNameBytes) + " bytes");
      }
      // Names that the converter writes into a grammar as they are, or has a meaning for.
      if (name == "*") refuse(path, "a property named '*' is not supported");
      if (open && name.find_first_of("]\\^\"-\n\r") != std::string::npos) {
        drop(path, "'additionalProperties' beside the property " + quoted(name) +
                       " is not supported: its name has one of ] \\ ^ \" -");
        own["additionalProperties"] = false;
        rewritten_ = true;
      }
      if (!required.contains(name) && ++optional > kMaxOptional) {
        refuse(path, "more than " + std::to_string(kMaxOptional) +
                         " optional properties are not supported ('required' names those that "
                         "are not)");
      }
      kept[name] = node(item.value(), inside + name, depth + 1, false);
    }
    budget_.optional_squares -= static_cast<int64_t>(optional * optional);
    if (budget_.optional_squares < 0) {
      refuse(path, "too many optional properties in all ('required' names those that are not)");
    }
    if (contains(own, "properties") || !kept.empty()) own["properties"] = kept;
    if (own.contains("additionalProperties") && own.at("additionalProperties").is_object()) {
      own["additionalProperties"] =
          additional.empty() ? Json(true)
                             : node(additional, path + "/additionalProperties", depth + 1, false);
    }
  }

  int64_t number_of(const Json& own, const char* keyword, const std::string& path) {
    const Json& value = own.at(keyword);
    const double number = value.is_number() ? value.get<double>() : -1;
    if (number < 0 || number != std::floor(number)) {
      refuse(path, quoted(keyword) + " must be a whole number, at least 0");
    }
    if (number > static_cast<double>(kMaxCount)) {
      refuse(path, quoted(keyword) + " is above " + std::to_string(kMaxCount) +
                       ", which is not supported");
    }
    return static_cast<int64_t>(number);
  }

  /// A pair of bounds of a length, of which the greater must not be the lesser.
  void check_lengths(Json& own, const char* least, const char* most, const std::string& path) {
    const int64_t low = contains(own, least) ? number_of(own, least, path) : 0;
    if (contains(own, least)) own[least] = low;
    if (!contains(own, most)) return;
    const int64_t high = number_of(own, most, path);
    if (low > high) refuse(path, quoted(least) + " is above " + quoted(most));
    own[most] = high;
  }

  void array(Json& own, const std::string& path, int depth) {
    for (const char* keyword : {"contains", "minContains", "maxContains"}) {
      drop_keyword(own, keyword, path);
      own.erase(keyword);
    }
    if (contains(own, "unevaluatedItems")) {
      // Items behind those of a list do not occur, and a schema for all evaluates all.
      if (own.at("unevaluatedItems") != false) drop_keyword(own, "unevaluatedItems", path);
      own.erase("unevaluatedItems");
    }
    check_lengths(own, "minItems", "maxItems", path);
    if (contains(own, "uniqueItems")) {
      const bool one_at_most = contains(own, "maxItems") && own.at("maxItems").get<int>() <= 1;
      if (own.at("uniqueItems") != false && !one_at_most) drop_keyword(own, "uniqueItems", path);
      own.erase("uniqueItems");
    }
    const char* list_name = contains(own, "prefixItems") ? "prefixItems" : "items";
    if (contains(own, list_name) && own.at(list_name).is_array()) {
      const Json list = own.at(list_name);
      const auto least = contains(own, "minItems") ? own.at("minItems").get<size_t>() : 0;
      const auto most = contains(own, "maxItems") ? own.at("maxItems").get<size_t>() : list.size();
      if (least > list.size()) {
        refuse(path, "'minItems' above the number of " + quoted(list_name) + " is not supported");
      }
      // Exactly those: more may be allowed but need not be.
      Json items = Json::array();
      for (size_t i = 0; i < std::min(most, list.size()); ++i) {
        items.push_back(
            node(list.at(i), path + "/" + list_name + "/" + std::to_string(i), depth + 1, false));
      }
      for (const char* keyword :
           {"prefixItems", "items", "additionalItems", "minItems", "maxItems"}) {
        rewritten_ = rewritten_ || (contains(own, keyword) && keyword != std::string(list_name));
        own.erase(keyword);
      }
      own[list_name] = items;
      return;
    }
    own.erase("additionalItems");
    if (contains(own, "prefixItems")) refuse(path, "'prefixItems' must be a list of schemas");
    if (contains(own, "items")) {
      if (own.at("items") == true) {
        own["items"] = Json::object();
        rewritten_ = true;
      } else if (own.at("items") == false) {
        if (contains(own, "minItems") && own.at("minItems") != 0) {
          refuse(path, "'minItems' is above 0 where no item is allowed");
        }
        own.erase("items");
        own["maxItems"] = 0;
        rewritten_ = true;
      } else {
        const Json items = own.at("items");
        own["items"] = node(items, path + "/items", depth + 1, false);
      }
    }
  }

  void string(Json& own, const std::string& path) {
    check_lengths(own, "minLength", "maxLength", path);
    if (contains(own, "format") && !own.at("format").is_string()) {
      refuse(path, "'format' must be a string");
    }
    const auto format = contains(own, "format") ? own.at("format").get<std::string>() : "";
    const bool keeps_format = format == "date" || format == "time" || format == "date-time" ||
                              (format.starts_with("uuid") && format.size() <= 5);
    const bool lengths = contains(own, "minLength") || contains(own, "maxLength");
    if (contains(own, "pattern")) {
      if (!own.at("pattern").is_string()) refuse(path, "'pattern' must be a string");
      if (--budget_.patterns < 0) refuse(path, "the schema has too many patterns");
      if (lengths) drop(path, "'minLength' or 'maxLength' beside 'pattern' is not supported");
      if (keeps_format) drop(path, "'format' beside 'pattern' is not supported");
      if (strict_) check_pattern(own, path);
    } else if (keeps_format && lengths) {
      drop(path, "'minLength' or 'maxLength' beside 'format' is not supported");
    }
  }

  static void check_pattern(const Json& own, const std::string& path) {
    // The converter takes any string where it cannot express the pattern.
    Json alone = Json::object();
    alone["type"] = "string";
    alone["pattern"] = own.at("pattern");
    if (json_schema_to_grammar(alone).find("root ::= string\n") != std::string::npos) {
      refuse(path, "the pattern " + own.at("pattern").dump() +
                       " is not supported (it must stand between ^ and $, without look-around)");
    }
  }

  /// Takes 'multipleOf' out; multiples of a whole number are integers. 1: every one of them.
  int64_t take_step(Json& own, const std::string& path) {
    if (!contains(own, "multipleOf")) return 1;
    const Json value = own.at("multipleOf");
    if (!value.is_number() || value.get<double>() <= 0) {
      refuse(path, "'multipleOf' must be a number above 0");
    }
    const auto step = value.get<double>();
    if (step != std::floor(step) || step > static_cast<double>(kMaxInteger)) {
      drop_keyword(own, "multipleOf", path);
      own.erase("multipleOf");
      return 1;
    }
    rewritten_ = rewritten_ || own.at("type") != "integer";
    own.erase("multipleOf");
    own["type"] = "integer";
    return static_cast<int64_t>(step);
  }

  /// The multiples of `step` between the bounds, one by one.
  void list_multiples(Json& own, int64_t step, int64_t low, int64_t high, const std::string& path) {
    const int64_t first = low / step + (low % step > 0 ? 1 : 0);
    const int64_t last = high / step - (high % step < 0 ? 1 : 0);
    if (first > last) refuse(path, "no multiple of 'multipleOf' lies between the bounds");
    if (last - first >= kMaxMultiples) {
      drop(path, "'multipleOf' is supported for at most " + std::to_string(kMaxMultiples) +
                     " values between a 'minimum' and a 'maximum'");
      return;
    }
    Json values = Json::array();
    for (int64_t i = first; i <= last; ++i) values.push_back(i * step);
    rewritten_ = true;
    for (const char* keyword : {"type", "minimum", "maximum"}) own.erase(keyword);
    own["enum"] = values;
  }

  void number(Json& own, const std::string& path) {
    const int64_t step = take_step(own, path);
    const bool whole = own.at("type") == "integer";
    bool bounded = false;
    double low = -static_cast<double>(kMaxInteger);
    double high = static_cast<double>(kMaxInteger);
    for (const char* keyword : {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}) {
      if (!contains(own, keyword)) continue;
      const std::string name = keyword;
      const Json value = own.at(keyword);
      if (value.is_boolean() && name.starts_with("exclusive")) {  // as in draft 4
        const char* of = name == "exclusiveMinimum" ? "minimum" : "maximum";
        if (value != false && contains(own, of)) drop_keyword(own, keyword, path);
        own.erase(keyword);
        continue;
      }
      if (!value.is_number()) refuse(path, quoted(name) + " must be a number");
      const auto bound = value.get<double>();
      if (!whole) {
        drop(path, quoted(name) + " is supported for the type integer only");
        continue;
      }
      bounded = true;
      if (name == "minimum") low = std::max(low, std::ceil(bound));
      if (name == "exclusiveMinimum") low = std::max(low, std::floor(bound) + 1);
      if (name == "maximum") high = std::min(high, std::floor(bound));
      if (name == "exclusiveMaximum") high = std::min(high, std::ceil(bound) - 1);
    }
    if (!whole) return;
    for (const char* keyword : {"exclusiveMinimum", "exclusiveMaximum"}) own.erase(keyword);
    if (!bounded && step == 1) return;
    if (low > high) refuse(path, "no integer lies between 'minimum' and 'maximum'");
    if (bounded) {
      // Always both: with one of them alone the converter lets shorter numbers in.
      rewritten_ = true;
      own["minimum"] = static_cast<int64_t>(low);
      own["maximum"] = static_cast<int64_t>(high);
    }
    if (step != 1) {
      list_multiples(own, step, static_cast<int64_t>(low), static_cast<int64_t>(high), path);
    }
  }

  const Json& root_;
  const bool strict_;
  bool rewritten_ = false;
  SchemaBudget& budget_;
  size_t renamed_ = 0;
  std::string current_;                       // the definition being made; empty: the root
  std::map<std::string, std::string> names_;  // reference -> its name among the definitions
  std::set<std::string> taken_;               // of these names
  std::vector<std::string> todo_;             // references whose targets are still to make
  std::map<std::string, std::set<std::string>> edges_;  // from a definition to those it begins with
  std::set<std::string> inlining_;
  std::vector<std::pair<Json, std::string>> exclusive_;  // the lists of oneOf, and where
  Json definitions_ = Json::object();
};

template <typename Work>
auto with_errors(const std::string& param, Work work) {
  try {
    return work();
  } catch (const std::exception& e) {
    std::string why = e.what();
    const std::string preamble = "JSON schema conversion failed:\n";
    if (why.starts_with(preamble)) why.erase(0, preamble.size());
    for (size_t at = 0; (at = why.find('\n', at)) != std::string::npos;) why.replace(at, 1, "; ");
    throw EngineError(ErrorKind::kInvalidGrammar, "This JSON schema cannot be kept: " + why + ".",
                      param);
  }
}

}  // namespace

std::string plain_schema(const std::string& schema, const std::string& param) {
  return with_errors(param, [&] {
    const Json json = Json::parse(schema);
    SchemaBudget budget;
    Json plain = Normaliser(json, /*strict=*/true, budget).run();
    // Templates take an empty schema for none.
    if (plain.empty()) plain["description"] = "any value";
    return plain.dump();
  });
}

std::string schema_to_grammar(const std::string& schema, const std::string& param) {
  return with_errors(param, [&] {
    const Json json = Json::parse(schema);
    SchemaBudget budget;
    return json_schema_to_grammar(Normaliser(json, /*strict=*/true, budget).run());
  });
}

std::string plain_tool_schema(const std::string& schema, const std::string& tool,
                              const std::string& param, bool strict, SchemaBudget& budget) {
  return with_errors(param, [&] {
    const Json json = Json::parse(schema);
    Normaliser normaliser(json, strict, budget);
    const Json plain = normaliser.run(tool);
    json_schema_to_grammar(plain);  // throws where it does not convert
    return normaliser.rewritten() ? plain.dump() : schema;
  });
}

}  // namespace relay::engine
