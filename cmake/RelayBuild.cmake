# Settings of the whole build: type, output folders, compiler cache, run paths.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_C_STANDARD 11)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

include(GNUInstallDirs)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
set(CMAKE_ARCHIVE_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
# An installed prefix can be moved: programs and libraries find each other by place.
set(CMAKE_INSTALL_RPATH "$ORIGIN" "$ORIGIN/relay" "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}"
                        "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}/relay")

find_program(RELAY_CCACHE ccache)
if(RELAY_CCACHE)
  # Not for CUDA: of several architectures ccache compares one preprocessed text, so that a change
  # under `#if __CUDA_ARCH__ >= 900` in a header gives the old object.
  foreach(lang C CXX)
    if(NOT CMAKE_${lang}_COMPILER_LAUNCHER)
      set(CMAKE_${lang}_COMPILER_LAUNCHER "${RELAY_CCACHE}")
    endif()
  endforeach()
endif()

find_package(Threads REQUIRED)
