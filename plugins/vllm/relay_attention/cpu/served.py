"""Which layers Relay serves. Decided once, when a layer is made: a served layer's KV cache has
Relay's layout inside its blocks, which vLLM's own kernel cannot read."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl


def refusal(impl: "CPUAttentionBackendImpl", config: "VllmConfig") -> str | None:
    """Why vLLM's own kernel computes this layer; None if Relay does."""
    import torch
    from vllm.v1.attention.backend import AttentionType

    if impl.attn_type != AttentionType.DECODER:
        return f"{impl.attn_type} attention"
    dtype = config.model_config.dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {dtype}"
    if impl.kv_cache_dtype not in ("auto", str(dtype).removeprefix("torch.")):
        return f"a KV cache of {impl.kv_cache_dtype}"
    if config.kv_transfer_config is not None:
        return "KV transfer, whose peers expect vLLM's layout inside a block"
    if config.model_config.is_diffusion:
        return "a diffusion model, where each request's mask changes from step to step"
    return None
