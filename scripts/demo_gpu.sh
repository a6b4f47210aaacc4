#!/usr/bin/env bash
# make demo-gpu: sets up the pinned vLLM for NVIDIA GPUs with Relay in it, and runs the demo there.
# usage: scripts/demo_gpu.sh [arguments of demo_gpu.py]
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "demo-gpu: $*" >&2; exit 1; }

nvidia-smi -L 2>/dev/null | grep -q '^GPU' || fail "this machine has no NVIDIA GPU; make demo needs none"
if ! command -v "${CUDACXX:-nvcc}" >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ] &&
  ! compgen -G '.venv-cuda/lib/python3*/site-packages/nvidia/cu13/bin/nvcc' >/dev/null; then
  echo "demo-gpu: no nvcc here; scripts/setup.sh installs a pinned one"
  scripts/setup.sh --no-cross --no-fuzz --no-browser
fi
plugins/vllm/setup_vllm.sh --cuda
venv="${RELAY_VLLM_VENV:-$HOME/.cache/relay/vllm-cuda-0.33.0}"
"$venv/bin/python" -m relay_attention.doctor
exec "$venv/bin/python" scripts/demo_gpu.py "$@"
