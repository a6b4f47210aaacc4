// What schemas say against what their grammars allow.
#include "engine/json_schema.h"

#include <gtest/gtest.h>

#include <ctime>
#include <functional>
#include <string>
#include <vector>

#include "engine/byte_texts.h"
#include "engine/engine.h"
#include "engine/large_stack.h"

namespace relay::engine {
namespace {

std::string grammar_of(const std::string& schema) {
  return on_large_stack([&] { return schema_to_grammar(schema, "json_schema"); });
}

/// The error; empty: there is none.
std::string error_of(const std::string& schema) {
  try {
    grammar_of(schema);
  } catch (const EngineError& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kInvalidGrammar);
    EXPECT_EQ(e.param(), "json_schema");
    return e.what();
  }
  return "";
}

void expect(const std::string& schema, const std::vector<std::string>& yes,
            const std::vector<std::string>& no) {
  SCOPED_TRACE(schema);
  std::string grammar;
  ASSERT_NO_THROW(grammar = grammar_of(schema)) << error_of(schema);
  for (const std::string& text : yes) EXPECT_TRUE(grammar_allows(grammar, text)) << text;
  for (const std::string& text : no) EXPECT_FALSE(grammar_allows(grammar, text)) << text;
}

void refuses(const std::string& schema, const std::string& words) {
  const std::string error = error_of(schema);
  EXPECT_NE(error.find(words), std::string::npos) << schema << ": " << error;
}

TEST(JsonSchema, ReferencesThatLeadNowhereAreErrors) {
  const char* kNoContent = "leads back to itself without any content";
  refuses(R"({"$defs":{"A":{"$ref":"#/$defs/A"}},"allOf":[{"$ref":"#/$defs/A"}]})", kNoContent);
  refuses(R"({"$defs":{"A":{"$ref":"#/$defs/A"}},"$ref":"#/$defs/A"})", kNoContent);
  refuses(R"({"$defs":{"A":{"allOf":[{"$ref":"#/$defs/B"}]},"B":{"$ref":"#/$defs/A"}},
              "properties":{"x":{"$ref":"#/$defs/A"}}})",
          kNoContent);
  refuses(R"({"$defs":{"A":{"anyOf":[{"type":"string"},{"$ref":"#/$defs/A"}]}},
              "$ref":"#/$defs/A"})",
          kNoContent);
  refuses(R"({"$defs":{"A":{"type":"object","allOf":[{"$ref":"#/$defs/A"}]}},
              "$ref":"#/$defs/A"})",
          kNoContent);
  refuses(R"({"$ref":"#"})", kNoContent);
  refuses(R"({"type":"object","anyOf":[{"$ref":"#"}]})", "nested deeper");
  refuses(R"({"$ref":"#/$defs/none"})", "points at nothing");
  refuses(R"({"$ref":"other.json"})", "does not point into this schema");
  refuses(R"({"$ref":5})", "'$ref' must be a string");
}

TEST(JsonSchema, RecursionThroughContentWorks) {
  // As pydantic and others write a linked list.
  const char* kList = R"({
    "definitions": {"Node": {"type": "object", "required": ["value", "next"], "properties": {
      "value": {"type": "boolean"},
      "next": {"description": "x", "anyOf": [
        {"description": "y", "allOf": [{"$ref": "#/definitions/Node"}]}, {"type": "null"}]}}}},
    "allOf": [{"$ref": "#/definitions/Node"}], "title": "List"})";
  expect(kList,
         {R"({"value":true,"next":null})", R"({"value":true,"next":{"value":false,"next":null}})"},
         {R"({"value":true,"next":{"value":false}})", "null"});
  expect(R"({"type":"object","required":["c"],
             "properties":{"c":{"type":"array","items":{"$ref":"#"}}}})",
         {R"({"c":[]})", R"({"c":[{"c":[]}]})"}, {R"({"c":[1]})"});
  // Where a name needs escapes, or differs from another in nothing a rule's name shows.
  expect(R"({"$defs":{"a/b~":{"type":"null"},"a b":{"type":"boolean"},"a.b":{"const":1}},
             "type":"array","items":[{"$ref":"#/$defs/a~1b~0"},{"$ref":"#/$defs/a b"},
                                     {"$ref":"#/$defs/a.b"}]})",
         {"[null,true,1]"}, {"[true,true,true]", "[null,null,null]"});
  expect(R"({"properties":{"a":{"type":"null"},"b":{"$ref":"#/properties/a"}},
             "required":["a","b"]})",
         {R"({"a":null,"b":null})"}, {R"({"a":null,"b":1})"});
}

TEST(JsonSchema, AnythingIsASchemaToo) {
  for (const char* schema : {"{}", "true", R"({"title":"anything"})"}) {
    expect(schema, {"1", R"("x")", "[null]", "{}"}, {"x"});
  }
  expect(R"({"type":"array","items":true})", {"[]", "[1,\"x\"]"}, {"1"});
  expect(R"({"type":"array","items":false})", {"[]"}, {"[1]"});
  refuses(R"({"type":"array","items":false,"minItems":1})", "'minItems' is above 0");
  expect(R"({"properties":{"a":true},"required":["a"]})", {R"({"a":[1]})"}, {"{}"});
  refuses("false", "allows no value");
  refuses("5", "must be an object");
}

TEST(JsonSchema, AllOfIsTakenTogether) {
  expect(R"({"allOf":[{"type":"object","properties":{"a":{"type":"null"}},"required":["a"]},
                      {"properties":{"b":{"type":"boolean"}},"required":["b"]}],
             "properties":{"c":{"const":1}}})",
         {R"({"a":null,"b":true,"c":1})", R"({"a":null,"b":true})"},
         {R"({"a":null})", R"({"b":true})", "{}"});
  expect(R"({"allOf":[{"type":"integer","minimum":3},{"maximum":5}]})", {"3", "5"}, {"2", "6"});
  expect(R"({"allOf":[{"enum":["a","b"]},{"enum":["b","c"]}]})", {R"("b")"}, {R"("a")", R"("c")"});
  expect(R"({"allOf":[{"type":"object","properties":{"a":{"type":"integer","minimum":2}},
                       "required":["a"]},
                      {"properties":{"a":{"maximum":3}}}]})",
         {R"({"a":2})", R"({"a":3})"}, {R"({"a":1})", R"({"a":4})"});
  refuses(R"({"allOf":[{"type":"string"},{"type":"null"}]})", "two different types");
  refuses(R"({"allOf":[{"pattern":"^a$"},{"pattern":"^b$"}]})", "two different 'pattern'");
  refuses(R"({"allOf":[{"properties":{"a":{}},"additionalProperties":false},
                       {"properties":{"b":{}}}]})",
          "'additionalProperties' beside the property 'b'");
  refuses(R"({"allOf":[]})", "'allOf' must be a list");
  // What stands beside a reference holds as well.
  expect(R"({"$defs":{"n":{"type":"integer"}},"$ref":"#/$defs/n","minimum":7,"maximum":8})", {"7"},
         {"6"});
}

TEST(JsonSchema, RequiredIsKept) {
  expect(R"({"type":"object","properties":{"a":{"type":"null"}},"required":["a","b"]})",
         {R"({"a":null,"b":1})", R"({"a":null,"b":"x"})"}, {R"({"a":null})"});
  expect(R"({"type":"object","required":["b"],"additionalProperties":{"type":"null"}})",
         {R"({"b":null})"}, {"{}", R"({"b":1})"});
  refuses(R"({"properties":{"a":{}},"required":["b"],"additionalProperties":false})",
          "'required' names 'b'");
  refuses(R"({"properties":{"a":{}},"required":"a"})", "'required' must be a list of names");
  const std::string beside =
      R"({"type":"object","properties":{"a":{"type":"null"},"b":{"type":"null"}},)";
  expect(beside + R"("anyOf":[{"required":["a"]},{"required":["b"]}]})",
         {R"({"a":null})", R"({"b":null})", R"({"a":null,"b":null})"}, {"{}"});
  refuses(beside + R"("oneOf":[{"required":["a"]},{"required":["b"]}]})",
          "'properties' beside 'oneOf'");
  expect(R"({"type":"object","oneOf":[{"properties":{"a":{"const":1}},"required":["a"]},
                                      {"properties":{"b":{"const":2}},"required":["b"]}]})",
         {R"({"a":1})", R"({"b":2})"}, {"{}", "1"});
}

TEST(JsonSchema, WhatStandsBesideIsKeptOrNamed) {
  refuses(R"({"anyOf":[{"type":"null"}],"oneOf":[{"type":"null"}]})", "'anyOf' beside 'oneOf'");
  refuses(R"({"type":"string","pattern":"^a+$","maxLength":3})", "beside 'pattern'");
  refuses(R"({"type":"string","format":"date","minLength":3})", "beside 'format'");
  refuses(R"({"enum":["a","bb"],"minLength":2})", "'minLength' beside 'enum'");
  refuses(R"({"type":"array","prefixItems":[{}],"minItems":2})", "'minItems' above");
  expect(R"({"type":"array","prefixItems":[{"type":"null"},{"type":"boolean"}],
             "items":{"type":"string"},"maxItems":1})",
         {"[null]"}, {"[]", "[null,true]"});
  expect(R"({"type":["string","null"],"enum":["a",null,5]})", {R"("a")", "null"}, {"5"});
  expect(R"({"type":"string","const":"a"})", {R"("a")"}, {R"("b")"});
  refuses(R"({"type":"string","enum":[1,2]})", "'enum' allows no value");
  expect(R"({"type":["array","string"],"minItems":1,"maxLength":1})", {"[1]", R"("x")"},
         {"[]", R"("xy")"});
  refuses(R"({"type":"thing"})", "is no type");
  refuses(R"({"type":[]})", "'type' must not be empty");
  for (const char* keyword :
       {"not", "if", "contains", "minContains", "patternProperties", "propertyNames",
        "maxProperties", "dependentRequired", "then", "else", "$dynamicRef", "$recursiveRef",
        "minProperties", "dependencies", "dependentSchemas", "unevaluatedProperties",
        "unevaluatedItems", "maxContains", "uniqueItems"}) {
    refuses(std::string(R"({"type":["object","array"],")").append(keyword).append(R"(":{"x":{}}})"),
            std::string("'").append(keyword).append("' is not supported"));
  }
}

TEST(JsonSchema, ItemsThatNothingEvaluatesDoNotOccur) {
  for (const char* schema :
       {R"({"type":"array","unevaluatedItems":false})", R"({"unevaluatedItems":false})",
        R"({"allOf":[{"type":"array"}],"unevaluatedItems":false})"}) {
    expect(schema, {"[]"}, {"[1]", "[null]"});
  }
  expect(R"({"type":"array","items":{"const":1},"unevaluatedItems":false})", {"[]", "[1,1]"},
         {"[2]"});
  expect(R"({"type":"array","prefixItems":[{"const":1}],"unevaluatedItems":false})", {"[1]"},
         {"[1,2]"});
  expect(R"({"allOf":[{"type":"array","items":{"const":1}}],"unevaluatedItems":false})",
         {"[]", "[1,1]"}, {"[2]"});
  expect(R"({"type":"array","unevaluatedItems":false,
             "anyOf":[{"prefixItems":[{"const":1}]},{"maxItems":5}]})",
         {"[]", "[1]"}, {"[2]", "[1,1]"});
  refuses(R"({"allOf":[{"type":"array","unevaluatedItems":false},{"items":{"const":1}}]})",
          "two different 'items'");
  refuses(R"({"type":"array","unevaluatedItems":false,"minItems":1})", "'minItems' is above 0");
  refuses(R"({"type":"array","contains":false})", "'contains' is not supported");
  refuses(R"({"type":"array","contains":false,"unevaluatedItems":false})",
          "'contains' is not supported");
}

TEST(JsonSchema, FormatsThatNoGrammarSaysAreWordsForPeople) {
  for (const char* format : {"email", "uri", "hostname", "ipv4", "duration", "what my API means"}) {
    expect(std::string(R"({"type":"string","format":")").append(format).append("\"}"),
           {R"("x")", R"("")"}, {"1"});
  }
  expect(R"({"type":"string","format":"email","minLength":2})", {R"("xy")"}, {R"("x")"});
  expect(R"({"type":"string","format":"date"})", {R"("2026-11-28")"}, {R"("x")"});
  expect(R"({"type":"string","format":"time"})", {R"("10:03:05Z")"}, {R"("x")"});
  expect(R"({"type":"string","format":"date-time"})", {R"("2026-11-28T10:03:05Z")"}, {R"("x")"});
  expect(R"({"type":"string","format":"uuid"})", {R"("123e4567-e89b-12d3-a456-426614174000")"},
         {R"("x")"});
  refuses(R"({"type":"string","format":5})", "'format' must be a string");
}

TEST(JsonSchema, OneOfIsKeptWhereNoValueMatchesTwo) {
  // By type, by values, by bounds.
  expect(R"({"oneOf":[{"type":"string"},{"type":"null"}]})", {R"("x")", "null"}, {"1"});
  expect(R"({"oneOf":[{"const":"a"},{"enum":["b",1]},{"type":"boolean"}]})",
         {R"("a")", R"("b")", "1", "true"}, {R"("c")"});
  expect(R"({"oneOf":[{"type":"integer","maximum":3},{"type":"integer","minimum":4}]})", {"3", "4"},
         {"x"});
  // By a tag, as pydantic writes unions: required, or told apart by another required property.
  expect(R"({"$defs":{"Cat":{"type":"object","required":["pet"],"properties":{
                                "pet":{"const":"cat"},"lives":{"type":"null"}}},
                      "Dog":{"type":"object","required":["pet"],"properties":{
                                "pet":{"const":"dog"},"lives":{"type":"null"}}}},
             "oneOf":[{"$ref":"#/$defs/Cat"},{"$ref":"#/$defs/Dog"}]})",
         {R"({"pet":"cat","lives":null})", R"({"pet":"dog"})"}, {"{}", R"({"pet":"cow"})"});
  expect(R"({"oneOf":[{"type":"object","required":["a"],"properties":{"a":{"type":"null"}}},
                      {"type":"object","required":["b"],"properties":{"b":{"type":"null"}}}]})",
         {R"({"a":null})", R"({"b":null})"}, {"{}"});
  // A choice within a choice; a recursive one.
  expect(R"({"oneOf":[{"anyOf":[{"type":"string"},{"const":1}]},{"enum":[2,3]}]})",
         {R"("x")", "1", "2"}, {"4"});
  expect(
      R"({"$defs":{"T":{"oneOf":[{"type":"null"},{"type":"array","items":{"$ref":"#/$defs/T"}}]}},
             "$ref":"#/$defs/T"})",
      {"null", "[null,[]]"}, {"1"});

  // Told apart by what stands behind a recursive property.
  expect(R"({"$defs":{
               "T":{"oneOf":[{"$ref":"#/$defs/A"},{"$ref":"#/$defs/B"},{"type":"null"}]},
               "A":{"type":"object","required":["next","tag"],"properties":{
                      "next":{"$ref":"#/$defs/T"},"tag":{"const":"a"}}},
               "B":{"type":"object","required":["next","tag"],"properties":{
                      "next":{"$ref":"#/$defs/T"},"tag":{"const":"b"}}}},
             "$ref":"#/$defs/T"})",
         {R"({"next":null,"tag":"a"})", R"({"next":{"next":null,"tag":"a"},"tag":"b"})"},
         {R"({"next":null})"});

  const char* kTwo = "'oneOf' is not supported where a value may match two of its schemas";
  refuses(R"({"oneOf":[{"type":"number"},{"type":"integer"}]})", kTwo);
  refuses(R"({"oneOf":[{"type":"string"},{"const":"a"}]})", kTwo);
  refuses(R"({"oneOf":[{"const":"a"},{"enum":["b","a"]}]})", kTwo);
  refuses(R"({"oneOf":[{"type":"null"},{}]})", kTwo);
  refuses(R"({"oneOf":[{"anyOf":[{"type":"string"},{"const":2}]},{"enum":[2,3]}]})", kTwo);
  refuses(R"({"oneOf":[{"type":"object","properties":{"a":{"const":1}}},
                       {"type":"object","properties":{"a":{"const":2}}}]})",
          kTwo);  // the empty object
  refuses(R"({"oneOf":[{"type":"object","required":["a"],"properties":{"a":{},"b":{}}},
                       {"type":"object","required":["b"],"properties":{"b":{}}}]})",
          kTwo);  // an object with both
  refuses(R"({"oneOf":[{"type":"object","required":["a"],"properties":{"a":{}}},
                       {"type":"object","required":["b"],"properties":{"b":{}},
                        "additionalProperties":true}]})",
          kTwo);
  refuses(R"({"properties":{"x":{"oneOf":[{"type":"array"},{"type":"array"}]}}})",
          "at #/properties/x");
}

TEST(JsonSchema, MultiplesBetweenBoundsAreListed) {
  expect(R"({"type":"integer","multipleOf":5,"minimum":-7,"maximum":11})", {"-5", "0", "5", "10"},
         {"-10", "1", "11", "15", "5.0"});
  expect(R"({"multipleOf":3,"exclusiveMinimum":3,"exclusiveMaximum":9})", {"6"}, {"3", "9", "7"});
  expect(R"({"type":"number","multipleOf":10.0,"minimum":0.5,"maximum":20})", {"10", "20"},
         {"0", "15"});
  expect(R"({"type":"integer","multipleOf":1})", {"7"}, {"7.5"});
  expect(R"({"type":["string","integer"],"multipleOf":4,"minimum":1,"maximum":5})", {"4", R"("x")"},
         {"1", "8"});
  refuses(R"({"type":"integer","multipleOf":5})", "'multipleOf' is supported for at most");
  refuses(R"({"type":"integer","multipleOf":2,"minimum":0,"maximum":2000})",
          "'multipleOf' is supported for at most");
  refuses(R"({"type":"integer","multipleOf":5,"minimum":6,"maximum":9})", "no multiple of");
  refuses(R"({"type":"number","multipleOf":0.01})", "'multipleOf' is not supported");
  refuses(R"({"type":"integer","multipleOf":0})", "'multipleOf' must be a number above 0");
  refuses(R"({"type":"integer","multipleOf":"5"})", "'multipleOf' must be a number above 0");
  refuses(R"({"allOf":[{"multipleOf":2},{"multipleOf":3}]})", "two different 'multipleOf'");
}

TEST(JsonSchema, NamesThatTheConverterMisreadsAreRefused) {
  refuses(R"({"properties":{"*":{}}})", "'*'");
  refuses(R"({"properties":{"a]b":{}},"additionalProperties":true})", "'a]b'");
  refuses(R"({"properties":{"a-z":{}},"additionalProperties":{"type":"null"}})", "'a-z'");
  expect(R"({"properties":{"a-z":{"const":1},"a]":{"const":2}},"required":["a-z","a]"]})",
         {R"({"a-z":1,"a]":2})"}, {"{}"});
  const std::string long_name(100'000, '!');
  refuses(R"({"properties":{")" + long_name + R"(":{}}})", "longer than");
}

TEST(JsonSchema, IntegersStayBetweenTheirBounds) {
  for (const int64_t low : {-120, -11, -1, 0, 1, 7, 10, 99, 100, 105, 1009}) {
    for (const int64_t more : {0, 1, 5, 13, 95, 900}) {
      const int64_t high = low + more;
      const std::string grammar =
          grammar_of(R"({"type":"integer","minimum":)" + std::to_string(low) +
                     R"(,"exclusiveMaximum":)" + std::to_string(high + 1) + "}");
      for (int64_t i = low - 30; i <= high + 30; ++i) {
        if (grammar_allows(grammar, std::to_string(i)) == (i >= low && i <= high)) continue;
        ADD_FAILURE() << i << " for " << low << " to " << high << ": " << grammar;
      }
    }
  }
  expect(R"({"type":"integer","minimum":100005})", {"100005", "100100", "9999999"},
         {"15", "99999", "100004", "-100005"});
  expect(R"({"type":"integer","exclusiveMinimum":9.5})", {"10", "123456789"}, {"9", "-10"});
  expect(R"({"type":"integer","maximum":-205})", {"-205", "-1000"}, {"-204", "-21", "0", "300"});
  expect(R"({"type":"integer","minimum":-9007199254740991,"maximum":9007199254740991})",
         {"0", "-9007199254740991", "9007199254740991"}, {"9007199254740992", "1.5"});
  expect(R"({"type":"number","multipleOf":1})", {"5"}, {"5.5"});
  refuses(R"({"type":"integer","minimum":5,"maximum":1})",
          "no integer lies between 'minimum' and 'maximum'");
  refuses(R"({"type":"integer","minimum":1e300})", "no integer lies between");
  refuses(R"({"type":"integer","minimum":"5"})", "'minimum' must be a number");
  refuses(R"({"type":"number","minimum":0})", "'minimum' is supported for the type integer only");
  refuses(R"({"exclusiveMaximum":1})", "'exclusiveMaximum'");
}

TEST(JsonSchema, LengthsAreKeptOrNamed) {
  const auto list = [](int count) {
    std::string text = "[";
    for (int i = 0; i < count; ++i) text += i == 0 ? "1" : ",1";
    return text + "]";
  };
  const auto word = [](int count) {
    return std::string("\"").append(static_cast<size_t>(count), 'x').append("\"");
  };
  expect(R"({"type":"array","items":{"const":1},"maxItems":2000})", {list(0), list(2000)},
         {list(2001)});
  expect(R"({"type":"array","items":{"const":1},"minItems":5000,"maxItems":5001})", {list(5000)},
         {list(4999), list(5002)});
  expect(R"({"type":"string","minLength":3000})", {word(3000), word(5000)}, {word(2999)});
  expect(R"({"type":"string","maxLength":5000})", {word(0), word(5000)}, {word(5001)});
  refuses(R"({"type":"array","maxItems":1000000})", "'maxItems' is above");
  refuses(R"({"type":"string","minLength":1e15})", "'minLength' is above");
  refuses(R"({"type":"string","minLength":-1})", "'minLength' must be a whole number");
  refuses(R"({"type":"string","minLength":3,"maxLength":2})", "'minLength' is above 'maxLength'");
  expect(R"({"type":"array","items":{"const":1},"uniqueItems":true,"maxItems":1})", {"[1]"},
         {"[1,1]"});
  refuses(R"({"type":"array","uniqueItems":true})", "'uniqueItems' is not supported");
}

TEST(JsonSchema, SizeIsBounded) {
  const std::clock_t begin =
      std::clock();  // of the process: other work on the machine is none of it
  std::string deep;
  for (int i = 0; i < 100; ++i) deep += R"({"type":"array","items":)";
  refuses(deep + "{}" + std::string(100, '}'), "nested deeper");
  // A choice of choices that merging would unfold for ever.
  refuses(R"({"type":"object","anyOf":[{"$ref":"#"},{"$ref":"#"},{"$ref":"#"}]})", "");
  std::string chain = R"({"$ref":"#/$defs/d0","$defs":{"end":{"type":"null"})";
  for (int i = 0; i < 4000; ++i) {
    const std::string next = i == 3999 ? "end" : std::string("d").append(std::to_string(i + 1));
    chain.append(",\"d")
        .append(std::to_string(i))
        .append(R"(":{"type":"array","items":{"$ref":"#/$defs/)");
    chain.append(next).append("\"}}");
  }
  expect(chain + "}}", {"[]", "[[[]]]"}, {"[null]"});

  const auto object = [](int count, bool required) {
    std::string properties;
    std::string names;
    for (int i = 0; i < count; ++i) {
      const std::string name = std::string("\"p").append(std::to_string(i)).append("\"");
      properties.append(i == 0 ? "" : ",").append(name).append(":{}");
      names.append(i == 0 ? "" : ",").append(name);
    }
    std::string schema = R"({"type":"object","properties":{)" + properties + "}";
    return schema.append(required ? ",\"required\":[" + names + "]}" : "}");
  };
  EXPECT_EQ(error_of(object(1000, true)), "");
  EXPECT_EQ(error_of(object(200, false)), "");
  refuses(object(1000, false), "more than 256 optional properties");
  refuses(object(30'000, true), "more than 5000 members");
  std::string objects = R"({"anyOf":[)" + object(200, false);
  for (int i = 0; i < 20; ++i) objects.append(",").append(object(200, false));
  refuses(objects + "]}", "too many optional properties in all");
  std::string patterns = R"({"anyOf":[{"type":"null"})";
  for (int i = 0; i < 501; ++i) patterns += R"(,{"pattern":"^a$"})";
  refuses(patterns + "]}", "too many patterns");
  std::string values = R"({"enum":["0")";
  for (int i = 1; i < 2000; ++i) values.append(",\"value ").append(std::to_string(i)).append("\"");
  expect(values + "]}", {R"("value 1999")", R"("0")"}, {R"("value 2000")"});
  EXPECT_LT((std::clock() - begin) / CLOCKS_PER_SEC, 20);
}

/// What an element becomes, `count` times, with commas between.
std::string listed(int count, const std::function<std::string(int)>& element) {
  std::string list;
  for (int i = 0; i < count; ++i) list += (i > 0 ? "," : "") + element(i);
  return list;
}

// Each of these is short, and took minutes or gigabytes.
TEST(JsonSchema, WhatIsMultipliedIsBounded) {
  const std::clock_t begin = std::clock();
  const auto one = [](int) { return std::string("1"); };
  const auto any = [](int) { return std::string("{}"); };
  const auto to_big = [](int) { return std::string(R"({"$ref":"#/$defs/B"})"); };
  const std::string many = "[" + listed(20'000, one) + "]";
  // What stands beside a choice holds for each of it.
  refuses(R"({"enum":)" + many + R"(,"anyOf":[)" + listed(1'000, any) + "]}", "too large where");
  // A reference in allOf is written out.
  refuses(R"({"$defs":{"B":{"enum":)" + many + R"(}},"allOf":[)" + listed(1'000, to_big) + "]}",
          "too large where");
  // The parts of allOf are taken together one after the other.
  const auto object = [](int i) {
    return R"({"properties":{"p)" + std::to_string(i) + R"(":{}}})";
  };
  refuses(R"({"allOf":[)" + listed(4'000, object) + "]}", "too large where");
  // Each value of one list is compared with each of another.
  const auto even = [](int i) { return std::to_string(2 * i); };
  const auto odd = [](int i) { return std::to_string(2 * i + 1); };
  refuses(R"({"oneOf":[{"enum":[)" + listed(20'000, even) + R"(]},{"enum":[)" +
              listed(20'000, odd) + "]}]}",
          "too large where");
  // The converter calls all of these '-'.
  const auto named = [](int i) {
    const char name[] = {'\xe4', static_cast<char>(0x80 + i / 64),
                         static_cast<char>(0x80 + i % 64)};
    return R"(")" + std::string(name, 3) + R"(":{"const":)" + std::to_string(i) + "}";
  };
  const auto name_only = [&](int i) { return named(i).substr(0, 5); };
  const auto all_named = [&](int count) {
    return R"({"properties":{)" + listed(count, named) + R"(},"required":[)" +
           listed(count, name_only) + R"(],"additionalProperties":false})";
  };
  refuses(all_named(4'000), "names are equal but");
  EXPECT_EQ(error_of(all_named(200)), "");
  EXPECT_LT((std::clock() - begin) / CLOCKS_PER_SEC, 20);
}

TEST(JsonSchema, AToolsSchemaMaySayMore) {
  const auto tool = [](const std::string& schema, bool strict = false) {
    return on_large_stack([&] {
      SchemaBudget budget;
      return plain_tool_schema(schema, "f", "tools[0]", strict, budget);
    });
  };
  // Left as it is where the converter reads it as it is meant.
  for (
      const char* schema :
      {R"({"type":"object","properties":{"a":{"type":"number","minimum":0.5}}})",
       R"({"type":"object","properties":{"a":{"type":"integer","multipleOf":5}}})",
       R"({"type":"object","properties":{"a":{"oneOf":[{"type":"string"},{"type":"string"}]}}})",
       R"({"type":"object","not":{},"properties":{"n":{"$ref":"#/$defs/My_Node"}},)"
       R"("$defs":{"My_Node":{"type":"object","properties":{"n":{"$ref":"#/$defs/My_Node"}}}}})"}) {
    EXPECT_EQ(tool(schema), schema);
    EXPECT_THROW(tool(schema, /*strict=*/true), EngineError) << "not all of it can be kept";
  }
  const std::string rewritten = tool(
      R"({"type":"object","properties":{"next":{"description":"the next","allOf":[{"$ref":"#"}]}}})");
  EXPECT_EQ(rewritten.find("allOf"), std::string::npos);
  EXPECT_NE(rewritten.find("the next"), std::string::npos);
  EXPECT_THROW(tool(R"({"$defs":{"A":{"$ref":"#/$defs/A"}},"allOf":[{"$ref":"#/$defs/A"}]})"),
               EngineError);
  EXPECT_THROW(tool(R"({"properties":{"a":{"type":"integer","minimum":5,"maximum":1}}})"),
               EngineError);
}

}  // namespace
}  // namespace relay::engine
