"""The environment variables that this package reads, read each time they are asked for."""

import os

from relay_attention.errors import RelayError


def disabled() -> bool:
    """RELAY_DISABLE=1 leaves vLLM as it was."""
    return _switch("RELAY_DISABLE")


def verbose() -> bool:
    """RELAY_VERBOSE=1 says what was chosen, and why."""
    return _switch("RELAY_VERBOSE")


def sharing() -> bool:
    """RELAY_SHARING=off reads every request's KV for itself: the ablation."""
    value = os.environ.get("RELAY_SHARING", "on") or "on"
    if value not in ("on", "off"):
        raise RelayError(f"RELAY_SHARING={value} is neither on nor off")
    return value == "on"


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0") or "0"
    if value not in ("0", "1"):
        raise RelayError(f"{name}={value} is neither 0 nor 1")
    return value == "1"
