"""Says whether vLLM will compute its attention with Relay, with what, and if not, why not.

    python -m relay_attention.doctor

Exit status: 0 if it will, 1 if not.
"""

import importlib.metadata
import sys

from relay_attention import __version__, plugin, settings
from relay_attention.errors import RelayError


def _diagnose() -> list[str]:
    """The facts, a line each. Raises RelayError with what stands in the way."""
    lines = [f"relay-attention   {__version__}"]
    try:
        import vllm
    except ImportError as e:
        raise RelayError(f"vLLM cannot be imported ({e}); install it here") from e
    lines.append(f"vLLM              {vllm.__version__}")
    entry_points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(e.value == f"{plugin.__name__}:register" for e in entry_points):
        raise RelayError("vLLM does not see the plugin's entry point; pip install plugins/vllm")
    from vllm import envs

    if envs.VLLM_PLUGINS is not None and "relay_attention" not in envs.VLLM_PLUGINS:
        raise RelayError(
            "VLLM_PLUGINS does not name relay_attention; add it, or unset VLLM_PLUGINS"
        )
    if settings.disabled():
        raise RelayError("RELAY_DISABLE=1 is set; unset it")
    device = plugin.find_device()
    lines += _cuda() if device is plugin.CUDA else _cpu()
    lines.append(f"replaces          {device.replaces}, where vLLM chooses it")
    lines.append(f"sharing           {'on' if settings.sharing() else 'off (RELAY_SHARING=off)'}")
    return lines


def _cpu() -> list[str]:
    from relay_attention.cpu import native, openmp

    return [
        f"kernels           {native.isa()} (librelay {native.version()})",
        f"OpenMP runtime    {openmp.use().path}",
        f"threads here      {openmp.threads()}; vLLM's workers bind their own number",
    ]


def _cuda() -> list[str]:
    from vllm import envs

    from relay_attention.cuda import native

    lines = [f"GPU               {native.device_name()}"]
    if envs.VLLM_BATCH_INVARIANT:
        raise RelayError(
            "VLLM_BATCH_INVARIANT=1 is set: with sharing, rounding depends on who else is in the "
            "batch; unset it"
        )
    return lines


def main() -> int:
    try:
        print("\n".join(_diagnose()))
    except RelayError as e:
        print(f"vLLM will not use Relay: {e}")
        return 1
    print("vLLM will use Relay.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
