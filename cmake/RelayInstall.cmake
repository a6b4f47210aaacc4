# The installed prefix:
#   bin/relay, bin/libggml-cpu.so  the program, and the CPU module that ggml looks for beside it
#   lib/librelay-cuda.so           the CUDA operator, where it was built
#   lib/librelay.*, include/relay, lib/cmake/relay, lib/pkgconfig   the library for other programs
#   lib/libggml-relay.so           the drop-in for any llama.cpp
#   lib/relay/                     our private libllama and libggml, out of the way of others
# Targets that install themselves (relay_cli, ggml-relay) are not repeated here.
include(CMakePackageConfigHelpers)

if(TARGET relay)
  # A static library unless -DBUILD_SHARED_LIBS=ON; before 1.0 any minor version may break the ABI.
  set_target_properties(relay PROPERTIES
    VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
  install(TARGETS relay EXPORT relayTargets
          LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}"
          ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
          INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/relay"
          DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.h")

  set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/relay")
  install(EXPORT relayTargets NAMESPACE relay:: DESTINATION "${package_dir}")
  configure_package_config_file(cmake/relayConfig.cmake.in "${CMAKE_BINARY_DIR}/relayConfig.cmake"
                                INSTALL_DESTINATION "${package_dir}")
  write_basic_package_version_file("${CMAKE_BINARY_DIR}/relayConfigVersion.cmake"
                                   COMPATIBILITY SameMinorVersion)
  install(FILES "${CMAKE_BINARY_DIR}/relayConfig.cmake"
                "${CMAKE_BINARY_DIR}/relayConfigVersion.cmake"
          DESTINATION "${package_dir}")

  # From lib[/<triplet>]/pkgconfig up to the prefix, so that a prefix can be moved.
  file(RELATIVE_PATH RELAY_PC_TO_PREFIX "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
  string(REGEX REPLACE "/$" "" RELAY_PC_TO_PREFIX "${RELAY_PC_TO_PREFIX}")
  configure_file(cmake/relay.pc.in "${CMAKE_BINARY_DIR}/relay.pc" @ONLY)
  install(FILES "${CMAKE_BINARY_DIR}/relay.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
endif()

if(TARGET relay_cuda)
  install(TARGETS relay_cuda LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
endif()

install(FILES LICENSE THIRD_PARTY.md DESTINATION "${CMAKE_INSTALL_DOCDIR}")

if(RELAY_BUILD_LLAMA)
  install(TARGETS llama llama-common ggml ggml-base
          LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}/relay" NAMELINK_SKIP)
  install(TARGETS ggml-cpu LIBRARY DESTINATION "${CMAKE_INSTALL_BINDIR}")
  install(FILES "${RELAY_LLAMA_CPP_SOURCE}/LICENSE"
          DESTINATION "${CMAKE_INSTALL_DOCDIR}/llama.cpp")
  install(DIRECTORY "${RELAY_LLAMA_CPP_SOURCE}/licenses"
          DESTINATION "${CMAKE_INSTALL_DOCDIR}/llama.cpp" OPTIONAL)
endif()
