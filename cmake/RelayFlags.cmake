# Flags for Relay's own code. Included after llama.cpp, which thus never sees them.
# No -march here: kernels are compiled per ISA and chosen at run time.

add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra>"
                    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
if(RELAY_WERROR)
  add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Werror>"
                      "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>")
endif()

if(RELAY_SANITIZE)
  # GCC takes members of std::function in std::regex for uninitialised there (its bug 105562).
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options(-Wno-error=maybe-uninitialized)
  endif()
  add_compile_options(-fsanitize=${RELAY_SANITIZE} -fno-omit-frame-pointer
                      -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${RELAY_SANITIZE})
endif()
