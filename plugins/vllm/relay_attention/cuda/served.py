"""Which layers Relay serves on a GPU. Decided once, when a layer is made. A served layer's KV cache
is vLLM's own in every respect, so a layer's batches may go to either kernel."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

HEAD_SIZES = (64, 80, 96, 128, 192, 256)
FP8 = ("fp8", "fp8_e4m3")


def refusal(impl: "FlashAttentionImpl", config: "VllmConfig") -> str | None:
    """Why vLLM's own kernel computes this layer; None if Relay does."""
    import torch
    from vllm.v1.attention.backend import AttentionType

    if impl.attn_type != AttentionType.DECODER:
        return f"{impl.attn_type} attention"
    dtype = config.model_config.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype}"
    own = ("auto", str(dtype).removeprefix("torch."))
    if impl.kv_cache_dtype not in own + FP8:
        return f"a KV cache of {impl.kv_cache_dtype}"
    if impl.head_size not in HEAD_SIZES:
        return f"head size {impl.head_size}"
    return _promise(config)


def has_one_scale(layer: "Attention") -> bool:
    """Whether a layer's quantised Q, K and V have one scale each. Known once its weights are
    loaded."""
    if layer.impl.kv_cache_dtype not in FP8:
        return True
    return all(x.numel() == 1 for x in (layer._q_scale, layer._k_scale, layer._v_scale))


def _promise(config: "VllmConfig") -> str | None:
    """What this vLLM promises beyond the result up to rounding, or does to a batch that Relay does
    not know about."""
    from vllm import envs

    parallel, model = config.parallel_config, config.model_config
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT=1: with sharing, rounding depends on who else is in the batch"
    if parallel.decode_context_parallel_size > 1:
        return "decode context parallelism, where no GPU has all of a request's KV"
    if parallel.prefill_context_parallel_size > 1:
        return "prefill context parallelism"
    if parallel.use_ubatching:
        return "dual batch overlap, where two batches are on their way at once"
    if config.cache_config.kv_sharing_fast_prefill:
        return "fast prefill of layers that share KV, where a layer has fewer rows than the batch"
    if model.is_mm_prefix_lm:
        return "a model whose images see all of themselves"
    if model.rswa_window is not None:
        return "reference sliding window attention"
    if model.is_diffusion:
        return "a diffusion model, where each request's mask changes from step to step"
    return None
