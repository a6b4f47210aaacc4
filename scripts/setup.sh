#!/usr/bin/env bash
# Installs everything Relay's build, tests and demo need. Run again at any time: what is there stays.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: scripts/setup.sh [--no-cross] [--no-fuzz] [--no-cuda] [--no-browser] [--help]

Installs with apt (as root, or through sudo) the compiler, build tools and libraries, and with pip,
into .venv, the Python packages of scripts/requirements-dev.txt. For Debian 12 and newer and Ubuntu
24.04 and newer. Where there is no nvcc of CUDA 12.4 or newer (CUDACXX, PATH, /usr/local/cuda), a
pinned one goes into .venv-cuda (100 MB to download, 300 MB there); no driver and no GPU are needed.
A second run finds everything in place and takes about a second.

  --no-cross   without the Arm cross compiler and emulator, which only the tests need
  --no-fuzz    without clang and libFuzzer: the tests then skip the fuzz targets
  --no-cuda    without the CUDA compiler, which only the tests and -DRELAY_CUDA=ON need
  --no-browser without headless Chromium: the test of the server's page is then skipped, as it is on
               Ubuntu, whose Chromium is a snap
TEXT
}

cross=1
fuzz=1
cuda=1
browser=1
for arg in "$@"; do
  case "$arg" in
    --no-cross) cross=0 ;;
    --no-fuzz) fuzz=0 ;;
    --no-cuda) cuda=0 ;;
    --no-browser) browser=0 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "setup: unknown option $arg" >&2; usage >&2; exit 2 ;;
  esac
done

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

# One line a need; a|b|c means: the first of these that this system offers.
needs=(
  make g++ cmake ninja-build ccache pkg-config git python3 python3-venv ca-certificates
  libgtest-dev libbenchmark-dev nlohmann-json3-dev libcli11-dev libspdlog-dev libssl-dev
  'prometheus-cpp-dev|libprometheus-cpp-dev'
  # Boost.Beast with C++20 coroutines; Debian 12's default, 1.74, is too old for it.
  'libboost1.83-dev|libboost1.81-dev|libboost1.88-dev|libboost1.90-dev|libboost-dev'
)
if [ "$cross" = 1 ]; then
  # The Arm kernels are checked on any machine: cross-compiled, with GoogleTest from its sources,
  # and run under qemu.
  needs+=(g++-aarch64-linux-gnu qemu-user googletest)
fi
if [ "$fuzz" = 1 ]; then
  needs+=(clang 'libclang-rt-dev|libclang-rt-18-dev')  # the second: libFuzzer and the sanitizers
fi

installed() {
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

available() {
  # No `| grep -q`: it ends at the first match, and apt-cache's SIGPIPE would count as a failure.
  [[ "$(LC_ALL=C apt-cache policy "$1" 2>/dev/null)" == *"Candidate: "[0-9]* ]]
}

# Prints the needs that no installed package meets. The last of several alternatives is a fallback:
# it counts only where none of the better ones can be had.
missing_needs() {
  local need alternative
  for need in "${needs[@]}"; do
    IFS='|' read -ra alternatives <<<"$need"
    local fallback="${alternatives[-1]}" met=0
    for alternative in "${alternatives[@]}"; do
      if installed "$alternative"; then met=1; break; fi
    done
    if [ "$met" = 1 ] && [ "${#alternatives[@]}" -gt 1 ] && [ "$alternative" = "$fallback" ]; then
      for alternative in "${alternatives[@]}"; do
        if [ "$alternative" != "$fallback" ] && available "$alternative"; then met=0; fi
      done
    fi
    [ "$met" = 1 ] || echo "$need"
  done
}

install_with_apt() {
  local as_root=() packages=() need alternative
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "these packages are missing, and this is neither root nor is
  there sudo. As root run: apt-get install ${*//|/ or }
  What only the tests need is left out with --no-cross, --no-fuzz, --no-cuda and --no-browser."
    as_root=(sudo)
  fi
  as_root+=(env DEBIAN_FRONTEND=noninteractive)

  say "missing: $*"
  say "apt-get update"
  # One unreachable source of many is no reason to stop: whether the packages can be had decides.
  "${as_root[@]}" apt-get update -qq </dev/null ||
    say "apt-get update reported errors; going on with the package lists there are"
  for need in "$@"; do
    IFS='|' read -ra alternatives <<<"$need"
    local chosen=""
    for alternative in "${alternatives[@]}"; do
      if available "$alternative"; then chosen="$alternative"; break; fi
    done
    [ -n "$chosen" ] || fail "no apt source of this system offers ${need//|/ or }.
  On Ubuntu enable 'universe' (add-apt-repository universe), then run scripts/setup.sh again.
  Ubuntu 22.04 and Debian 11 lack it: there, the library and the ggml module alone build with
  -DRELAY_BUILD_APPS=OFF -DRELAY_BUILD_BENCH=OFF, from g++ cmake ninja-build python3-venv libgtest-dev."
    packages+=("$chosen")
  done
  say "apt-get install ${packages[*]}"
  "${as_root[@]}" apt-get install -y -q --no-install-recommends "${packages[@]}" </dev/null ||
    fail "apt-get install failed; its message is above. Run scripts/setup.sh again after that is fixed."
}

install_python_packages() {
  local want
  want="$(cat scripts/requirements-dev.txt - <<<"$(python3 --version)" | sha256sum | cut -d' ' -f1)"
  if [ "$(cat .venv/relay-stamp 2>/dev/null)" = "$want" ]; then return; fi
  say "installing Python packages into .venv"
  rm -rf .venv
  python3 -m venv .venv
  .venv/bin/python -m pip install --disable-pip-version-check --quiet \
    -r scripts/requirements-dev.txt ||
    fail "pip could not install scripts/requirements-dev.txt; its message is above."
  echo "$want" >.venv/relay-stamp
}

# Whether the nvcc that RelayCuda.cmake would take is of 12.4 or newer and comes with its headers.
system_has_cuda() {
  local nvcc version
  nvcc="$(command -v "${CUDACXX:-nvcc}" || command -v /usr/local/cuda/bin/nvcc)" || return 1
  version="$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')"
  [ -n "$version" ] && [ "$(printf '%s\n' 12.4 "$version" | sort -V | head -n 1)" = 12.4 ] || return 1
  printf '#include <%s>\n' cuda.h cuda_runtime.h cuda_fp8.h cuda_bf16.h |
    "$nvcc" -x cu -M - >/dev/null 2>&1
}

install_cuda() {
  if [ ! -d .venv-cuda ] && system_has_cuda; then return; fi
  local want nvidia
  want="$(cat scripts/requirements-cuda.txt - <<<"$(python3 --version)" | sha256sum | cut -d' ' -f1)"
  if [ "$(cat .venv-cuda/relay-stamp 2>/dev/null)" = "$want" ]; then return; fi
  case "$(uname -m)" in
    x86_64 | aarch64) ;;
    *) fail "there is no CUDA compiler for $(uname -m); leave it out with --no-cuda." ;;
  esac
  say "installing the CUDA compiler into .venv-cuda"
  rm -rf .venv-cuda
  python3 -m venv .venv-cuda
  .venv-cuda/bin/python -m pip install --disable-pip-version-check --quiet \
    --only-binary :all: --no-deps --require-hashes -r scripts/requirements-cuda.txt ||
    fail "pip could not install scripts/requirements-cuda.txt; its message is above.
  To do without the CUDA compiler: scripts/setup.sh --no-cuda"
  # Names that nvcc and CMake look for; the packages leave them out.
  for nvidia in .venv-cuda/lib/python3*/site-packages/nvidia/cu13; do
    ln -s lib "$nvidia/lib64"
    ln -s libcudart.so.13 "$nvidia/lib/libcudart.so"
  done
  echo "$want" >.venv-cuda/relay-stamp
}

command -v apt-get >/dev/null ||
  fail "this system has no apt-get. Install the equivalents of these packages by hand, and
  scripts/requirements-dev.txt into .venv: ${needs[*]//|/ or }"

mapfile -t missing < <(missing_needs)
if [ "${#missing[@]}" -gt 0 ]; then
  install_with_apt "${missing[@]}"
fi
if [ "$browser" = 1 ] && ! installed chromium-headless-shell && available chromium-headless-shell; then
  install_with_apt chromium-headless-shell
fi
install_python_packages
if [ "$cuda" = 1 ]; then install_cuda; fi
say "everything is in place"
