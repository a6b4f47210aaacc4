// JSON schemas as grammars, by llama.cpp's converter.
#pragma once

#include <string>

namespace relay::engine {

// Both throw EngineError (kInvalidGrammar) that says why, with `param`, the field the schema came
// from.

/// The schema as GBNF. What the converter would pass over in silence (a lower bound of a number,
/// say) is an error: an answer is bound to the whole schema or to none.
std::string schema_to_grammar(const std::string& schema, const std::string& param);

/// Of a tool's parameters: it must convert, but may say more than a grammar can. (Clients send
/// what their tools check for themselves.)
void check_tool_schema(const std::string& schema, const std::string& param);

}  // namespace relay::engine
