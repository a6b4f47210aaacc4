"""The logger: a child of vLLM's, so that vLLM's settings and handlers hold."""

from vllm.logger import init_logger

logger = init_logger("vllm.relay_attention")
