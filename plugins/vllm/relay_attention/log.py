"""The logger: a child of vLLM's, so that vLLM's settings and handlers hold."""

from vllm.logger import init_logger

logger = init_logger("vllm.relay_attention")


def leave_layers(reason: str) -> None:
    """Says once why vLLM's own kernel computes layers."""
    logger.warning_once("Relay leaves layers to vLLM's own kernel: %s", reason)
