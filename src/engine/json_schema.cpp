#include "engine/json_schema.h"

#include <array>
#include <exception>
#include <stdexcept>

#include "engine/engine.h"
#include "json-schema-to-grammar.h"
#include "json.h"

namespace relay::engine {

namespace {

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw std::runtime_error(why + " at " + path);
}

bool is_number_type(const common_json& schema) {
  if (!schema.contains("type")) return true;  // who knows; a bound means numbers
  const common_json& type = schema.at("type");
  if (!type.is_array()) return type == "number";
  for (const common_json& one : type) {
    if (one == "number") return true;
  }
  return false;
}

void check_pattern(const common_json& schema, const std::string& path) {
  // The converter takes any string where it cannot express the pattern.
  common_json alone = common_json::parse(R"({"type":"string"})");
  alone["pattern"] = schema.at("pattern");
  if (json_schema_to_grammar(alone).find("root ::= string\n") != std::string::npos) {
    refuse(path, "the pattern " + schema.at("pattern").dump() +
                     " is not supported (it must stand between ^ and $, without look-around)");
  }
}

/// Throws where the converter would pass over something.
void check_kept(const common_json& schema, const std::string& path) {
  constexpr std::array kPassedOver = {"not",           "if",
                                      "contains",      "dependencies",
                                      "multipleOf",    "dependentRequired",
                                      "uniqueItems",   "dependentSchemas",
                                      "minProperties", "patternProperties",
                                      "maxProperties", "propertyNames"};
  constexpr std::array kBounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"};
  if (!schema.is_object()) return;  // the converter says so
  for (const char* keyword : kPassedOver) {
    if (schema.contains(keyword) && schema.at(keyword) != false) {
      refuse(path, "'" + std::string(keyword) + "' is not supported");
    }
  }
  for (const char* bound : kBounds) {
    if (schema.contains(bound) && is_number_type(schema)) {
      refuse(path, "'" + std::string(bound) + "' is supported for the type integer only");
    }
  }
  if (schema.contains("pattern") && schema.at("pattern").is_string()) check_pattern(schema, path);

  for (const char* one : {"items", "prefixItems", "additionalProperties"}) {
    if (schema.contains(one)) check_kept(schema.at(one), path + "/" + one);
  }
  for (const char* list : {"items", "prefixItems", "anyOf", "oneOf", "allOf"}) {
    if (!schema.contains(list) || !schema.at(list).is_array()) continue;
    size_t i = 0;
    for (const common_json& one : schema.at(list)) {
      check_kept(one, path + "/" + list + "/" + std::to_string(i++));
    }
  }
  for (const char* map : {"properties", "$defs", "definitions"}) {
    if (!schema.contains(map) || !schema.at(map).is_object()) continue;
    for (const auto& member : schema.at(map).items()) {
      check_kept(member.value(), path + "/" + map + "/" + member.key());
    }
  }
}

std::string convert(const std::string& text, const std::string& param, bool strict) {
  try {
    const common_json schema = common_json::parse(text);
    if (strict) check_kept(schema, "#");
    return json_schema_to_grammar(schema);
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

std::string schema_to_grammar(const std::string& schema, const std::string& param) {
  return convert(schema, param, /*strict=*/true);
}

void check_tool_schema(const std::string& schema, const std::string& param) {
  convert(schema, param, /*strict=*/false);
}

}  // namespace relay::engine
