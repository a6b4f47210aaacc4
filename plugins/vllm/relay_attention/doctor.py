"""`python -m relay_attention.doctor`: will vLLM use Relay here, and if not, why not?

Exit status: 0 if it will, 1 if it will not.
"""

import importlib.metadata
import importlib.util
import sys

from relay_attention import native, openmp, plugin, settings
from relay_attention.errors import RelayError


def entry_point_found() -> bool:
    """Whether vLLM will find the package: it asks for entry points, not for importable modules."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    return any(point.name == "relay_attention" for point in points)


def examine() -> str | None:
    """Prints what there is; returns what stands in the way, or None."""
    print(f"relay-attention {native.version()}, {native.isa()} kernels")
    print(f"sharing {'on' if settings.sharing() else 'off (RELAY_SHARING=off)'}")
    if settings.disabled():
        return "it is disabled: unset RELAY_DISABLE"
    if importlib.util.find_spec("vllm") is None:
        return "this Python has no vLLM: install Relay into the environment that vLLM runs in"
    print(f"vLLM {importlib.metadata.version(_distribution_of_vllm())}")
    if not entry_point_found():
        return "it is importable but not installed: pip install plugins/vllm"
    if (obstacle := plugin.obstacle()) is not None:
        return obstacle
    runtime = openmp.use()
    print(f"OpenMP runtime {runtime.path}, {openmp.threads()} threads")
    return None


def _distribution_of_vllm() -> str:
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return names[0]


def main() -> int:
    try:
        reason = examine()
    except RelayError as e:
        reason = str(e)
    if reason is not None:
        print(f"vLLM will not use Relay: {reason}")
        return 1
    print("vLLM will use Relay for attention on this CPU.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
