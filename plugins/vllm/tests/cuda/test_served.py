"""Which layers Relay serves on a GPU: decided from the configuration, so it needs no GPU."""

from types import SimpleNamespace

import pytest
import torch
from relay_attention.cuda import served
from vllm.v1.attention.backend import AttentionType


def layer(**changes) -> SimpleNamespace:
    fields = dict(attn_type=AttentionType.DECODER, kv_cache_dtype="auto", head_size=128)
    return SimpleNamespace(**(fields | changes))


def config(*, dtype=torch.bfloat16, **changes) -> SimpleNamespace:
    def section(**fields) -> SimpleNamespace:
        return SimpleNamespace(**{name: changes.get(name, value) for name, value in fields.items()})

    return SimpleNamespace(
        model_config=section(
            dtype=dtype, is_mm_prefix_lm=False, rswa_window=None, is_diffusion=False
        ),
        cache_config=section(kv_sharing_fast_prefill=False),
        parallel_config=section(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
    )


@pytest.mark.parametrize(
    "changes",
    [{}, dict(kv_cache_dtype="bfloat16"), dict(kv_cache_dtype="fp8"), dict(head_size=256)],
)
def test_served(changes):
    assert served.refusal(layer(**changes), config()) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(attn_type=AttentionType.ENCODER_ONLY), "attention"),
        (dict(attn_type=AttentionType.ENCODER_DECODER), "attention"),
        (dict(kv_cache_dtype="fp8_e5m2"), "fp8_e5m2"),
        (dict(kv_cache_dtype="float16"), "float16"),
        (dict(head_size=72), "head size 72"),
    ],
)
def test_a_layer_that_is_left_to_flash_attention(changes, reason):
    assert reason in served.refusal(layer(**changes), config())


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(dtype=torch.float32), "float32"),
        (dict(decode_context_parallel_size=2), "decode context parallelism"),
        (dict(prefill_context_parallel_size=2), "prefill context parallelism"),
        (dict(use_ubatching=True), "dual batch overlap"),
        (dict(kv_sharing_fast_prefill=True), "fast prefill"),
        (dict(is_mm_prefix_lm=True), "images"),
        (dict(rswa_window=128), "reference sliding window"),
        (dict(is_diffusion=True), "diffusion"),
    ],
)
def test_a_vllm_whose_promises_relay_cannot_keep(changes, reason):
    assert reason in served.refusal(layer(), config(**changes))


def test_batch_invariance(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "VLLM_BATCH_INVARIANT=1" in served.refusal(layer(), config())


def test_scales_of_fp8():
    def scaled(size: int, dtype: str = "fp8") -> SimpleNamespace:
        one, some = torch.ones(1), torch.ones(size)
        return SimpleNamespace(
            impl=layer(kv_cache_dtype=dtype), _q_scale=one, _k_scale=some, _v_scale=one
        )

    assert served.has_one_scale(scaled(1))
    assert not served.has_one_scale(scaled(8))
    assert served.has_one_scale(scaled(8, "auto"))
