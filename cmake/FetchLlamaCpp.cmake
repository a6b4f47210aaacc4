# relay_fetch_llama_cpp(<out>): sets <out> to the source folder of the pinned llama.cpp,
# .deps/llama.cpp-<version>, and fetches it with pip the first time. All build folders share it.
# Every step works in a temporary folder and renames at the end, so an interrupted configure leaves
# either the finished folder or nothing that counts.

function(relay_fetch_llama_cpp out)
  set(requirements "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/llama-cpp.requirements.txt")
  set(backend "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/llama-cpp.build-requirements.txt")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${requirements}")
  file(STRINGS "${requirements}" pin REGEX "^llama-cpp-python==")
  if(NOT pin MATCHES "^llama-cpp-python==([^ ]+) --hash=sha256:([0-9a-f]+)$")
    message(FATAL_ERROR "${requirements}: no line 'llama-cpp-python==<version> --hash=sha256:<hash>'")
  endif()
  set(version "${CMAKE_MATCH_1}")
  set(sha256 "${CMAKE_MATCH_2}")

  set(deps "${PROJECT_SOURCE_DIR}/.deps")
  set(dir "${deps}/llama.cpp-${version}")
  set(${out} "${dir}" PARENT_SCOPE)
  set(stamp "${dir}/.relay-${sha256}")
  if(EXISTS "${stamp}")
    return()
  endif()

  file(MAKE_DIRECTORY "${deps}")
  # Two configures at once: the second waits and finds the work done.
  file(LOCK "${deps}" DIRECTORY GUARD FUNCTION TIMEOUT 1200)
  if(EXISTS "${stamp}")
    return()
  endif()

  set(archive "${deps}/llama_cpp_python-${version}.tar.gz")
  set(have "")
  if(EXISTS "${archive}")
    file(SHA256 "${archive}" have)
  endif()
  if(NOT have STREQUAL sha256)
    message(STATUS "relay: downloading llama-cpp-python ${version} (73 MiB, once)")
    relay_pip_download("${deps}" "${requirements}" "${backend}")
    set(downloaded "${deps}/download.tmp/llama_cpp_python-${version}.tar.gz")
    if(NOT EXISTS "${downloaded}")
      message(FATAL_ERROR "pip reported success but did not leave ${downloaded}")
    endif()
    file(SHA256 "${downloaded}" have)
    if(NOT have STREQUAL sha256)
      message(FATAL_ERROR "${downloaded} has SHA-256 ${have}, expected ${sha256}; it was not used.")
    endif()
    file(RENAME "${downloaded}" "${archive}")
    file(REMOVE_RECURSE "${deps}/download.tmp")
  endif()

  message(STATUS "relay: extracting llama.cpp to ${dir}")
  set(tmp "${deps}/extract.tmp")
  file(REMOVE_RECURSE "${tmp}" "${dir}")
  file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${tmp}" PATTERNS "*/vendor/llama.cpp/*")
  set(extracted "${tmp}/llama_cpp_python-${version}/vendor/llama.cpp")
  if(NOT EXISTS "${extracted}/CMakeLists.txt")
    message(FATAL_ERROR "${archive} holds no vendor/llama.cpp; was the pin changed to a package "
                        "without it? See ${requirements}.")
  endif()
  # A submodule link into a repository that is not there; git commands of its scripts trip over it.
  file(REMOVE "${extracted}/.git")
  file(WRITE "${extracted}/.relay-${sha256}" "llama-cpp-python ${version}\n")
  file(RENAME "${extracted}" "${dir}")
  file(REMOVE_RECURSE "${tmp}" "${archive}")
endfunction()

# pip runs in a private environment, because Debian's own pip refuses to install anything
# (externally managed), and with the pinned build backend instead of whatever is newest.
function(relay_pip_download deps requirements backend)
  find_program(RELAY_PYTHON3 python3)
  if(NOT RELAY_PYTHON3)
    message(FATAL_ERROR "python3 was not found. Run scripts/setup.sh.")
  endif()
  set(venv "${deps}/venv")
  set(pip "${venv}/bin/python" -m pip --disable-pip-version-check)
  file(REMOVE_RECURSE "${deps}/download.tmp" "${venv}")
  relay_run("creating ${venv}; is python3-venv installed? Run scripts/setup.sh"
            "${RELAY_PYTHON3}" -m venv "${venv}")
  relay_run("installing the pinned build backend with pip; is the package index reachable?"
            ${pip} install --quiet --only-binary :all: --require-hashes --no-deps -r "${backend}")
  # --no-build-isolation: use the backend just installed. (pip hands --no-binary on to isolated
  # build environments, where it would rebuild the backend and its dependencies from source.)
  relay_run("downloading the llama.cpp source package with pip; is the package index reachable?
  Without network, use a checkout of your own: -DRELAY_LLAMA_CPP_DIR=<llama.cpp>"
            ${pip} download --require-hashes --no-deps --no-binary :all: --no-build-isolation
            --dest "${deps}/download.tmp" -r "${requirements}")
endfunction()

function(relay_run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "Failed (${result}): ${what}")
  endif()
endfunction()
