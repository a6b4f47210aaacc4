# relay_add_test(<name> SOURCES <file>... [LIBS <target>...] [LABELS <label>...])
#
# Builds one GoogleTest program <build>/tests/<name> and registers it with ctest under the
# label "unit" unless told otherwise. One ctest entry per program: discovering the cases would run
# every program at build time.

if(CMAKE_CROSSCOMPILING)
  # Debian has GoogleTest built for this machine only; its sources serve the other.
  set(RELAY_GTEST_SOURCE "/usr/src/googletest" CACHE PATH "GoogleTest's sources, for cross builds")
  if(NOT EXISTS "${RELAY_GTEST_SOURCE}/CMakeLists.txt")
    message(FATAL_ERROR
      "No GoogleTest sources in ${RELAY_GTEST_SOURCE}. Run scripts/setup.sh (it installs the "
      "package googletest), or set -DRELAY_GTEST_SOURCE.")
  endif()
  set(BUILD_GMOCK OFF)
  set(INSTALL_GTEST OFF)
  add_subdirectory("${RELAY_GTEST_SOURCE}" "${CMAKE_BINARY_DIR}/googletest" EXCLUDE_FROM_ALL)
  if(NOT TARGET GTest::gtest_main)
    add_library(GTest::gtest ALIAS gtest)
    add_library(GTest::gtest_main ALIAS gtest_main)
  endif()
else()
  find_package(GTest QUIET)
endif()
if(NOT TARGET GTest::gtest_main)
  message(FATAL_ERROR
    "GoogleTest was not found. Run scripts/setup.sh (it installs libgtest-dev), "
    "or configure with -DRELAY_BUILD_TESTS=OFF.")
endif()

function(relay_add_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBS;LABELS" ${ARGN})
  if(NOT ARG_SOURCES OR ARG_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "relay_add_test(${name} SOURCES <file>... [LIBS <target>...])")
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 900)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  if(NOT RELAY_SANITIZE)
    target_compile_options(${name} PRIVATE -O1)  # compiles in half the time of -O3
  endif()
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/src"
                                             "${PROJECT_SOURCE_DIR}/include")
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gtest_main GTest::gtest
                                        Threads::Threads)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
endfunction()
