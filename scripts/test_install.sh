#!/usr/bin/env bash
# Installs a build into a temporary prefix, moves it, and uses it as a stranger would.
# usage: scripts/test_install.sh build/release
set -euo pipefail
cd "$(dirname "$0")/.."
build="${1:?usage: scripts/test_install.sh <build folder>}"
unset LD_LIBRARY_PATH GGML_BACKEND_PATH

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/first" >"$work/install.log" ||
  { cat "$work/install.log"; exit 1; }
mv "$work/first" "$work/prefix"  # a prefix can be moved
prefix="$work/prefix"
echo "install: $(find "$prefix" -type f | wc -l) files, $(du -sm "$prefix" | cut -f1) MiB"

echo "install: nothing in the prefix leans on the build folder"
for file in "$prefix"/bin/* "$prefix"/lib/*.so "$prefix"/lib/relay/*.so*; do
  [ -f "$file" ] || continue
  libraries="$(ldd "$file")"
  # The drop-in takes libggml from the program that loads it, wherever that has it.
  [ "$(basename "$file")" != libggml-relay.so ] || libraries="$(grep -v libggml <<<"$libraries")"
  if grep -E "not found|$PWD" <<<"$libraries"; then
    echo "install: $file does not find its libraries in the prefix" >&2
    exit 1
  fi
done
[ -f "$prefix/lib/libggml-relay.so" ] || { echo "install: no lib/libggml-relay.so" >&2; exit 1; }

echo "install: the program runs"
"$prefix/bin/relay" --version
"$prefix/bin/relay" isa

echo "install: a CMake consumer"
cmake -S scripts/install_test -B "$work/consumer" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$prefix" >"$work/consumer.log" 2>&1 || { cat "$work/consumer.log"; exit 1; }
cmake --build "$work/consumer" >"$work/consumer.log" 2>&1 || { cat "$work/consumer.log"; exit 1; }
"$work/consumer/consumer"

echo "install: a pkg-config consumer"
export PKG_CONFIG_PATH="$prefix/lib/pkgconfig"
read -ra flags <<<"$(pkg-config --cflags --libs relay)"
"${CXX:-c++}" -std=c++20 -O2 scripts/install_test/consumer.cpp -o "$work/by_pkg_config" "${flags[@]}"
LD_LIBRARY_PATH="$prefix/lib" "$work/by_pkg_config"

echo "install: the installed program loads its own llama.cpp and module, and serves"
.venv/bin/python scripts/install_test/serve.py "$prefix"
