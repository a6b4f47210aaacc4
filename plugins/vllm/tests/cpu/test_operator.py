"""The operator on vLLM's tensors against dense attention in double precision."""

import batches
import dense
import pytest
import torch
from batches import Request
from relay_attention.cpu.operator import Operator
from relay_attention.cpu.plan import Planner
from relay_attention.errors import RelayError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# What servers see: decode over one prompt, over several, prefill beside decode, prompts alone.
WORKLOADS = {
    "decode": [Request(128, 1 + 7 * i) for i in range(9)],
    "two prompts": [Request(64 + 32 * (i % 2), 5 + i, group=i % 2) for i in range(8)],
    "mixed": [Request(96, 40, rows=40), Request(96, 3), Request(0, 70, rows=70, group=-1)],
    "verify": [Request(160, 9 + i, rows=4) for i in range(5)],
    "alone": [Request(0, 200, group=-1)],
    "first token": [Request(0, 1, group=-1), Request(32, 1)],
}


def run(
    requests: list[Request],
    dtype: torch.dtype,
    q_heads: int = 8,
    kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 32,
    sinks: torch.Tensor | None = None,
    **features: object,
) -> None:
    """Writes, attends and compares; `features` as Operator and dense.attend have them."""
    batch = batches.make_batch(
        requests,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=dtype,
        block_size=block_size,
    )
    scale = head_size**-0.5
    operator = Operator(q_heads, kv_heads, head_size, scale, **features)
    if sinks is not None:
        operator.set_sinks(sinks)
    batch.write(operator)
    output = torch.full_like(batch.query, float("nan"))
    operator.attend(batch.query, batch.kv_cache, output, Planner(), batch.step)
    expected, allowed = dense.attend(batch, scale, sinks=sinks, **features)
    error = (output.double() - expected).abs()
    assert not torch.isnan(error).any()
    worst = (error / allowed).max().item() if error.numel() else 0.0
    assert worst <= 1.0, f"{worst:.2f} times the error that rounding explains"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads(workload, block_size, dtype):
    requests = [
        Request(r.prefix // 32 * block_size, r.own, r.rows, r.group) for r in WORKLOADS[workload]
    ]
    run(requests, dtype, block_size=block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512])
def test_head_sizes(head_size, dtype):
    """Every head size that vLLM's CPU backend accepts."""
    run(WORKLOADS["mixed"], dtype, head_size=head_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (12, 4), (40, 8)])
def test_head_groups(heads, dtype):
    run(WORKLOADS["decode"], dtype, q_heads=heads[0], kv_heads=heads[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 33, 100, 10_000])
@pytest.mark.parametrize("workload", ["decode", "mixed", "verify"])
def test_sliding_window(workload, window, dtype):
    run(WORKLOADS[workload], dtype, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", ["decode", "mixed"])
@pytest.mark.parametrize("feature", ["softcap", "alibi", "sinks", "all"])
def test_features(feature, workload, dtype):
    features = {}
    if feature in ("softcap", "all"):
        features["softcap"] = 5.0
    if feature in ("alibi", "all"):
        features["slopes"] = 2.0 ** -torch.arange(1, 9, dtype=torch.float32)
    if feature in ("sinks", "all"):
        features["sinks"] = torch.linspace(-3, 3, 8)
    if feature == "all":
        features["window"] = 50
    run(WORKLOADS[workload], dtype, **features)


def test_sharing_off_is_the_same_up_to_rounding(monkeypatch):
    monkeypatch.setenv("RELAY_SHARING", "off")
    run(WORKLOADS["two prompts"], torch.bfloat16)


def test_sharing_reads_a_prompt_once():
    batch = batches.make_batch(
        [Request(2048, 1) for _ in range(10)],
        q_heads=8,
        kv_heads=2,
        head_size=64,
        dtype=torch.bfloat16,
    )
    operator = Operator(8, 2, 64, 0.125)
    batch.write(operator)
    planner = Planner()
    output = torch.empty_like(batch.query)
    operator.attend(batch.query, batch.kv_cache, output, planner, batch.step)
    plan = planner.plan(batch.step, operator.shape)
    assert plan.slots() == (2048 + 10, 10 * 2049)


def test_one_plan_for_all_layers_of_a_step():
    batch = batches.make_batch(
        WORKLOADS["decode"], q_heads=8, kv_heads=2, head_size=64, dtype=torch.bfloat16
    )
    planner = Planner()
    output = torch.empty_like(batch.query)
    for window in (0, 0, 64, 0, 64):
        operator = Operator(8, 2, 64, 0.125, window=window)
        batch.write(operator)
        operator.attend(batch.query, batch.kv_cache, output, planner, batch.step)
    assert planner.cost.plans == 2


def test_no_requests():
    run([], torch.bfloat16)


def test_strided_views():
    """Q, K and V are slices of one projection, as models make them."""
    requests = [Request(64, 33, rows=20), Request(64, 2)]
    shape = dict(q_heads=4, kv_heads=2, head_size=32, dtype=torch.bfloat16)
    batch = batches.make_batch(requests, **shape)
    operator = Operator(4, 2, 32, 1.0)
    for i, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
        joined = torch.cat([key.new_zeros(key.shape[0], 4, 32), key, value], 1)
        batch.keys[i], batch.values[i] = joined[:, 4:6], joined[:, 6:]
    batch.write(operator)
    query = torch.cat([batch.query, batch.query], 1)[:, :4]
    output = torch.empty(query.shape[0], 4, 64, dtype=torch.bfloat16)[..., :32]
    operator.attend(query, batch.kv_cache, output, Planner(), batch.step)
    expected, allowed = dense.attend(batch, 1.0)
    assert ((output.double() - expected).abs() <= allowed).all()


def test_negative_slots_are_skipped():
    operator = Operator(2, 1, 32, 1.0)
    cache = torch.zeros(2, 1, 32, 64, dtype=torch.bfloat16)
    ones = torch.ones(3, 1, 32, dtype=torch.bfloat16)
    operator.write(ones, ones, cache, torch.tensor([-1, 40, -1]))
    assert cache.sum().item() == 64


@pytest.mark.parametrize("tokens", [1, 3000])
def test_writing_from_one_and_from_many_threads(tokens):
    """Few tokens are written by the caller alone, many by all threads."""
    run([Request(0, tokens, group=-1)], torch.float32)


def test_errors_say_what_is_wrong():
    operator = Operator(2, 1, 32, 1.0)
    key = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(RelayError, match="expected"):
        operator.write(
            key, key, torch.zeros(2, 2, 32, 64, dtype=torch.bfloat16), torch.zeros(1).long()
        )
    with pytest.raises(RelayError, match="float32"):
        operator.write(key, key, torch.zeros(2, 1, 32, 64, dtype=torch.int8), torch.zeros(1).long())
    with pytest.raises(RelayError, match="contiguous"):
        cache = torch.zeros(2, 1, 64, 64, dtype=torch.bfloat16)[:, :, ::2]
        operator.write(key, key, cache, torch.zeros(1).long())
