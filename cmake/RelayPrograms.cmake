# What the programs and benchmarks need, found once.

find_path(RELAY_CLI11_INCLUDE CLI/CLI.hpp)
if(RELAY_BUILD_APPS AND NOT RELAY_CLI11_INCLUDE)
  message(FATAL_ERROR "CLI11 was not found. Run scripts/setup.sh (it installs libcli11-dev), "
                      "or configure with -DRELAY_BUILD_APPS=OFF.")
endif()
find_package(nlohmann_json QUIET)
if(NOT TARGET nlohmann_json::nlohmann_json)
  message(FATAL_ERROR "nlohmann-json was not found. Run scripts/setup.sh (it installs "
                      "nlohmann-json3-dev), or configure with -DRELAY_BUILD_APPS=OFF "
                      "-DRELAY_BUILD_BENCH=OFF.")
endif()
