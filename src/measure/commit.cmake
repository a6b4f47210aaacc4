# Writes HEADER with the commit of SOURCE, only if it has changed.
cmake_minimum_required(VERSION 3.22)
execute_process(COMMAND git -C "${SOURCE}" describe --always --dirty --abbrev=12 --exclude=*
                OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT commit)
  set(commit "unknown")
endif()
file(CONFIGURE OUTPUT "${HEADER}" CONTENT
"#pragma once

namespace relay::measure {
inline constexpr const char* kCommit = \"@commit@\";
}  // namespace relay::measure
" @ONLY)
