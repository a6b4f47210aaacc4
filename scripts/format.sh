#!/usr/bin/env bash
# Formats all C++, CUDA and Python of the repository in place; with --check only says what differs.
# usage: scripts/format.sh [--check]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 0 ] || [ "$*" = --check ] || { echo "usage: scripts/format.sh [--check]" >&2; exit 2; }
[ -x .venv/bin/clang-format ] || { echo "format: no .venv; run scripts/setup.sh" >&2; exit 1; }

# Files git knows, and new ones it does not ignore.
mapfile -t cpp < <(git ls-files -co --exclude-standard -- '*.h' '*.cpp' '*.cu' '*.cuh')
mapfile -t python < <(git ls-files -co --exclude-standard -- '*.py')
status=0
if [ $# = 1 ]; then
  if [ "${#cpp[@]}" -gt 0 ]; then .venv/bin/clang-format --dry-run -Werror --ferror-limit=1 "${cpp[@]}" || status=1; fi
  if [ "${#python[@]}" -gt 0 ]; then
    .venv/bin/ruff format --check "${python[@]}" || status=1
    .venv/bin/ruff check "${python[@]}" || status=1
  fi
  [ "$status" = 0 ] || echo "format: run 'make format'; what ruff check still says is to be fixed by hand" >&2
else
  if [ "${#cpp[@]}" -gt 0 ]; then .venv/bin/clang-format -i "${cpp[@]}"; fi
  if [ "${#python[@]}" -gt 0 ]; then
    .venv/bin/ruff format "${python[@]}"
    .venv/bin/ruff check --fix "${python[@]}" || status=1
  fi
fi
exit "$status"
