#!/usr/bin/env bash
# clang-tidy over our own translation units, as build/release compiles them; those that it leaves out
# and that are CUDA's as build/cuda does, if it is there. CUDA's own language (.cu) is left to nvcc's
# warnings.
# usage: scripts/lint.sh [--deep] [file.cpp...]
#   --deep  the analyzer looks as far as it does by default: more than twice the time, for before a
#           release
set -euo pipefail
cd "$(dirname "$0")/.."
database=build/release/compile_commands.json
cuda_database=build/cuda/compile_commands.json
[ -f "$database" ] || { echo "lint: no $database; run cmake --preset release" >&2; exit 1; }
[ -x .venv/bin/clang-tidy ] || { echo "lint: no .venv; run scripts/setup.sh" >&2; exit 1; }

# Nodes of each function; 225,000 by default.
analyzer="--extra-arg=-Xclang --extra-arg=-analyzer-config --extra-arg=-Xclang --extra-arg=max-nodes=30000"
if [ "${1:-}" = --deep ]; then
  analyzer=""
  shift
fi
if [ $# -gt 0 ]; then
  files=("$@")
else
  # Ours and compiled: tests are left to the compiler's warnings and the sanitizers.
  sources() {  # a database, the rooms to take from it
    python3 - "$@" <<'PY'
import json, os, sys

root = os.getcwd()
ours = {os.path.relpath(entry["file"], root) for entry in json.load(open(sys.argv[1]))}
for name in sorted(ours):
    if name.startswith(tuple(sys.argv[2:])) and not name.endswith(("_test.cpp", ".cu")):
        print(name)
PY
  }
  mapfile -t files < <(
    sources "$database" src/ plugins/ bench/
    if [ -f "$cuda_database" ]; then sources "$cuda_database" src/cuda/ src/measure/cuda/; fi
  )
  mapfile -t files < <(printf '%s\n' "${files[@]}" | sort -u)
  [ -f "$cuda_database" ] ||
    echo "lint: src/cuda and src/measure/cuda are left out: no $cuda_database; run cmake --preset cuda"
fi
[ -n "${files[0]:-}" ] || { echo "lint: $database names none of our sources" >&2; exit 1; }
echo "lint: ${#files[@]} files"

one() {
  local output build=build/release
  grep -q "/$1\"" "$build/compile_commands.json" || [ ! -f "$cuda_database" ] || build=build/cuda
  if output="$(.venv/bin/clang-tidy -p "$build" --quiet $analyzer \
    --extra-arg=-Wno-unknown-warning-option "$1" 2>&1)"
  then
    echo "lint: ok $1"
  else
    printf 'lint: FAULTS in %s\n%s\n' "$1" "$output"
    return 1
  fi
}
export -f one
export cuda_database analyzer
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" bash -c 'one "$1"' _ ||
  { echo "lint: faults found, see above" >&2; exit 1; }
