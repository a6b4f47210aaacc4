// JSON schemas as grammars, by llama.cpp's converter.
//
// The converter ignores what it cannot express, misreads some forms, and recurses for ever on some.
// So a schema is first rewritten: references are resolved as far as they must be, allOf is merged,
// each keyword stands where the converter reads it. What cannot be rewritten so is an error.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>

namespace relay::engine {

/// What the schemas of one request may have in all: llama.cpp's converter takes time for each part,
/// the square of the number of patterns and of names that it writes alike, and the cube of that of
/// an object's optional properties.
/// Rewriting takes time for each value that it copies from where a schema stands to where it holds.
struct SchemaBudget {
  int64_t parts = 20'000;
  int64_t values = 1'000'000;
  int64_t patterns = 500;
  int64_t optional_squares = 150'000;
  int64_t equal_names = 250'000;                ///< pairs of them
  std::unordered_map<uint64_t, int64_t> names;  ///< by hash, how often so far
};

// All throw EngineError (kInvalidGrammar) that says why, with `param`, the field the schema came
// from. They recurse: call them on a thread with a large stack (large_stack.h).

/// The schema, rewritten so that the converter keeps all of it. An answer is bound to the whole
/// schema or to none: what no grammar can keep (a lower bound of a number, say) is an error.
std::string plain_schema(const std::string& schema, const std::string& param);

/// The same as GBNF.
std::string schema_to_grammar(const std::string& schema, const std::string& param);

/// Of the parameters of `tool`: it must convert, but may say more than a grammar can, unless
/// `strict`. (Clients send what their tools check for themselves.) As it was, unless other words
/// are needed.
std::string plain_tool_schema(const std::string& schema, const std::string& tool,
                              const std::string& param, bool strict, SchemaBudget& budget);

}  // namespace relay::engine
