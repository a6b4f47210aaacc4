# llama.cpp as part of this build: the targets llama, llama-common, ggml, ggml-base, ggml-cpu for our
# own code, and its programs beside ours in <build>/bin.
#
# It is built so that it loads backend modules (GGML_BACKEND_DL), as the official releases are, yet
# for this very CPU, so that every comparison is with ggml at its best. ggml refuses GGML_NATIVE
# together with modules; the flag given from outside does the same.

set(RELAY_LLAMA_CPP_DIR "" CACHE PATH "A llama.cpp checkout of your own (default: the pinned one)")
set(RELAY_LLAMA_MARCH "native" CACHE STRING
    "-march of llama.cpp's code; set it (x86-64-v3, say) to build for other machines than this")

include(FetchLlamaCpp)

function(relay_add_llama_cpp)
  if(RELAY_LLAMA_CPP_DIR)
    get_filename_component(dir "${RELAY_LLAMA_CPP_DIR}" ABSOLUTE BASE_DIR "${CMAKE_SOURCE_DIR}")
    if(NOT EXISTS "${dir}/ggml/src/ggml-backend-impl.h")
      message(FATAL_ERROR "RELAY_LLAMA_CPP_DIR=${RELAY_LLAMA_CPP_DIR} is no llama.cpp checkout.")
    endif()
  else()
    relay_fetch_llama_cpp(dir)
    set(CMAKE_MESSAGE_LOG_LEVEL ERROR)  # the pinned one is known; its notes would drown ours
    # Its scripts ask git for a commit; here they would be told Relay's, and ggml would be built anew
    # at each of our commits. A git that always fails gives them none.
    find_program(RELAY_FALSE false REQUIRED)
    set(GIT_EXECUTABLE "${RELAY_FALSE}")
    set(GIT_EXE "${RELAY_FALSE}")
    get_filename_component(LLAMA_BUILD_COMMIT "${dir}" NAME)
    set(LLAMA_BUILD_NUMBER 0)
  endif()
  set(RELAY_LLAMA_CPP_SOURCE "${dir}" PARENT_SCOPE)

  # These variables live in this function: they reach llama.cpp, not our own targets.
  set(BUILD_SHARED_LIBS ON)
  set(GGML_BACKEND_DL ON)
  set(GGML_NATIVE OFF)
  set(GGML_CCACHE OFF)  # RelayBuild.cmake has set the compiler launcher
  set(LLAMA_BUILD_COMMON ON)
  set(LLAMA_BUILD_TOOLS ON)
  set(LLAMA_BUILD_SERVER ON)
  set(LLAMA_BUILD_TESTS OFF)  # of its tests only test-backend-ops is wanted, see below
  set(LLAMA_BUILD_EXAMPLES OFF)
  set(LLAMA_BUILD_APP OFF)
  set(LLAMA_BUILD_UI OFF)         # no npm at build time
  set(LLAMA_USE_PREBUILT_UI OFF)  # no download at build time
  set(LLAMA_OPENSSL OFF)
  set(LLAMA_CURL OFF)
  set(LLAMA_ALL_WARNINGS OFF)
  set(CMAKE_CXX_STANDARD 17)
  set(CMAKE_CXX_EXTENSIONS ON)
  if(RELAY_LLAMA_MARCH AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    string(APPEND CMAKE_C_FLAGS " -march=${RELAY_LLAMA_MARCH}")
    string(APPEND CMAKE_CXX_FLAGS " -march=${RELAY_LLAMA_MARCH}")
  elseif(RELAY_LLAMA_MARCH)
    string(APPEND CMAKE_C_FLAGS " -mcpu=${RELAY_LLAMA_MARCH}")
    string(APPEND CMAKE_CXX_FLAGS " -mcpu=${RELAY_LLAMA_MARCH}")
  endif()
  if(RELAY_SANITIZE)
    # libllama itself is compiled as in a release, so that the compiler cache has it.
    set(CMAKE_BUILD_TYPE Release)
    set(GGML_OPENMP OFF)  # libgomp's barriers are unknown to TSan; ggml's own pool has none of them
  endif()
  add_subdirectory("${dir}" "${CMAKE_BINARY_DIR}/llama.cpp" EXCLUDE_FROM_ALL)

  set(programs llama-server llama-batched-bench llama-bench llama-quantize)
  foreach(target llama llama-common ggml ggml-base ggml-cpu ${programs})
    if(NOT TARGET ${target})
      message(FATAL_ERROR "${dir} has no target '${target}'; Relay is made for the llama.cpp of "
                          "cmake/llama-cpp.requirements.txt and those near it.")
    endif()
  endforeach()

  # GCC's intrinsic for AMX's configuration names 8 bytes of its 64 as read, so that the stores of the
  # others are dropped and the first product dies of SIGILL.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set_property(SOURCE "${dir}/ggml/src/ggml-cpu/amx/mmq.cpp" TARGET_DIRECTORY ggml-cpu
                 APPEND PROPERTY COMPILE_OPTIONS -fno-tree-dse -fno-dse)
  endif()

  # ggml runs our code on its threads and hands it its memory.
  if(RELAY_SANITIZE)
    string(REPLACE ",undefined" "" sanitize "${RELAY_SANITIZE}")  # undefined behaviour: ours alone
    foreach(target ggml ggml-base ggml-cpu)
      target_compile_options(${target} PRIVATE -O1 -g1 -fsanitize=${sanitize}
                                               -fno-omit-frame-pointer)
      target_link_options(${target} PRIVATE -fsanitize=${sanitize})
    endforeach()
  endif()

  # Pictures and sound: llama-server is linked with it, nothing here asks for it, and at -O3 it
  # compiles for minutes.
  if(TARGET mtmd)
    target_compile_options(mtmd PRIVATE -O0)
  endif()

  # ggml's own operator suite.
  add_executable(test-backend-ops "${dir}/tests/test-backend-ops.cpp")
  target_compile_options(test-backend-ops PRIVATE -O1)
  target_link_libraries(test-backend-ops PRIVATE llama llama-common)
  set_target_properties(test-backend-ops PROPERTIES EXCLUDE_FROM_ALL ON)

  # ggml loads its CPU module by itself, from the folder of the program that runs.
  add_custom_target(llama-cpp-programs ALL DEPENDS ${programs} test-backend-ops ggml-cpu)

  # RelayInstall.cmake installs its libraries, for our programs alone: no headers.
  set_target_properties(llama ggml PROPERTIES PUBLIC_HEADER "")

  # Its headers are not ours to fix: no warnings from them in our code.
  foreach(target llama llama-common ggml ggml-base)
    get_target_property(includes ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(includes)
      set_target_properties(${target} PROPERTIES INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${includes}")
    endif()
  endforeach()
endfunction()

relay_add_llama_cpp()
message(STATUS "relay: llama.cpp from ${RELAY_LLAMA_CPP_SOURCE}")
