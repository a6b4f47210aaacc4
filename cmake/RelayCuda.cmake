# The CUDA compiler: the one of -DCMAKE_CUDA_COMPILER or CUDACXX, else the pinned one that
# scripts/setup.sh installs into .venv-cuda where the machine has none that is new enough, else the
# one of PATH or /usr/local/cuda.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  file(GLOB pinned "${PROJECT_SOURCE_DIR}/.venv-cuda/lib/python3*/site-packages/nvidia/cu13/bin/nvcc")
  if(pinned)
    set(CMAKE_CUDA_COMPILER "${pinned}" CACHE FILEPATH "nvcc")
  else()
    find_program(RELAY_NVCC nvcc PATHS /usr/local/cuda/bin)
    if(NOT RELAY_NVCC)
      message(FATAL_ERROR "RELAY_CUDA needs nvcc. Run scripts/setup.sh, which installs a pinned one, "
                          "or set -DCMAKE_CUDA_COMPILER=<nvcc>.")
    endif()
    set(CMAKE_CUDA_COMPILER "${RELAY_NVCC}" CACHE FILEPATH "nvcc")
  endif()
endif()
set(CMAKE_CUDA_ARCHITECTURES 80)  # of CMake's own trial; the targets name theirs
enable_language(CUDA)
# CMake before 3.26 does not know that nvcc has C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_COMPILE_FEATURES cuda_std_20)
  list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
endif()
