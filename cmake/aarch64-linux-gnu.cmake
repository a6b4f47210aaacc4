# Cross-compiles for 64-bit Arm with Debian's g++-aarch64-linux-gnu. Programs are linked statically,
# so that qemu-aarch64 runs them without an Arm root file system; ctest does so by itself.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT "-static")
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
# The emulated CPU is QEMU_CPU's; scripts/test.sh runs the tests on several.
find_program(RELAY_QEMU_AARCH64 qemu-aarch64)
if(NOT RELAY_QEMU_AARCH64)
  message(FATAL_ERROR "qemu-aarch64 was not found. Run scripts/setup.sh (it installs qemu-user).")
endif()
set(CMAKE_CROSSCOMPILING_EMULATOR "${RELAY_QEMU_AARCH64}")
