"""Small models with random weights, one for each kind of attention, written as vLLM loads them."""

from pathlib import Path

import torch
import transformers

VOCABULARY = 512
_VOCABULARY = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_COMMON = dict(
    **_VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=2048,
)


def _llama() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**_COMMON, num_key_value_heads=2, head_dim=64)


def _qwen() -> transformers.PretrainedConfig:
    return transformers.Qwen3Config(**_COMMON, num_key_value_heads=1, head_dim=128)


def _mistral() -> transformers.PretrainedConfig:
    return transformers.MistralConfig(
        **_COMMON, num_key_value_heads=2, head_dim=64, sliding_window=160
    )


def _gemma() -> transformers.PretrainedConfig:
    return transformers.Gemma2Config(
        **_COMMON,
        num_key_value_heads=2,
        head_dim=256,
        sliding_window=160,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=256,
    )


def _opt() -> transformers.PretrainedConfig:
    return transformers.OPTConfig(
        **_VOCABULARY,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )


def _bloom() -> transformers.PretrainedConfig:
    return transformers.BloomConfig(
        **_VOCABULARY,
        hidden_size=128,
        n_layer=4,
        n_head=4,
    )


def _gpt_oss() -> transformers.PretrainedConfig:
    return transformers.GptOssConfig(
        **_COMMON,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=128,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


CONFIGS = {
    "llama": _llama,  # GQA
    "qwen": _qwen,  # MQA, normalised queries and keys
    "mistral": _mistral,  # sliding window in every layer
    "gemma": _gemma,  # soft cap, window in every other layer
    "opt": _opt,  # MHA
    "bloom": _bloom,  # MHA, ALiBi
    "gpt-oss": _gpt_oss,  # sinks, window in every other layer, experts
}
# What vLLM runs on each: its CPU kernel has no sinks in models of experts, FlashAttention 3 neither
# ALiBi nor heads of 32.
CPU = ("llama", "qwen", "mistral", "gemma", "opt", "bloom")
CUDA = ("llama", "qwen", "mistral", "gemma", "gpt-oss")


def write(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Writes model `name` below `folder`; the same seed gives the same weights."""
    path = folder / f"{name}-{str(dtype).removeprefix('torch.')}-{seed}"
    if path.exists():
        return path
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.torch_dtype = dtype
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Wider than initialisation, so that attention and logits are far from uniform.
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
            elif parameter_name.endswith("sinks"):
                parameter.normal_()
    unfinished = path.with_suffix(".unfinished")
    model.to(dtype).save_pretrained(unfinished)
    unfinished.rename(path)
    return path
