"""Which batches Relay attends on a GPU: decided on the host, so it needs no GPU."""

import numpy as np
import pytest
from relay_attention.cuda.plan import Limits
from relay_attention.cuda.policy import DECODE_ROWS, Facts, Policy

LIMITS = Limits(requests=256, rows=8192, blocks=2048)


def policy(**changes) -> Policy:
    return Policy(**(dict(limits=LIMITS, decode_rows=DECODE_ROWS, graph_rows=0, group=4) | changes))


def batch(rows: list[int], lengths: list[int], causal: bool = True) -> Facts:
    return Facts(
        requests=len(rows),
        rows=sum(rows),
        max_query_rows=max(rows),
        causal=causal,
        query_starts=np.cumsum([0, *rows]).astype(np.int32),
        kv_lengths=np.array(lengths, dtype=np.int32),
    )


@pytest.mark.parametrize(
    "rows, lengths",
    [
        ([1] * 2, [10] * 2),
        ([1] * 64, [16384] * 64),
        ([5] * 8, [100] * 8),  # verifies drafts
        ([1] * 4 + [0] * 4, [100] * 4 + [0] * 4),  # padding
        ([DECODE_ROWS] * 2, [DECODE_ROWS] * 2),
    ],
)
def test_decoding_is_attended(rows, lengths):
    assert policy().refusal(batch(rows, lengths)) is None


def test_a_single_request_has_nobody_to_share_with():
    for rows in (1, 4, 2048):
        assert "single" in policy(graph_rows=512).refusal(batch([rows], [4096]))


def test_prompts_alone_are_left_to_flash_attention():
    assert "prompts" in policy().refusal(batch([2048] * 2, [2048] * 2))
    assert "prompts" in policy().refusal(batch([512] * 4, [16384] * 4))


def test_prompts_beside_requests_that_decode():
    """A prompt's rows cost; the reads that may be spared pay: those of all that decode but one."""
    assert policy().refusal(batch([1] * 32 + [256], [16384] * 32 + [256])) is None
    assert policy().refusal(batch([1] * 2 + [4096], [64] * 2 + [16384])) is not None
    assert policy().refusal(batch([1, 256], [16384, 256])) is not None, "nobody to share with"


def test_more_heads_in_a_group_make_prompts_dearer():
    mixed = batch([1] * 16 + [1024], [8192] * 16 + [8192])
    assert policy(group=1).refusal(mixed) is None
    assert policy(group=8).refusal(mixed) is not None


def test_what_a_full_graph_may_replay_does_not_depend_on_what_is_in_it():
    """Captured over requests of one token each, replayed over prompts."""
    full = policy(graph_rows=512)
    assert full.refusal(batch([1] * 256, [1] * 256)) is None
    assert full.refusal(batch([256] * 2, [256] * 2)) is None
    assert full.refusal(batch([257] * 2, [257] * 2)) is not None


def test_drafts_are_no_prompts():
    drafts = batch([DECODE_ROWS + 4] * 8, [4096] * 8)
    assert policy().refusal(drafts) is not None
    assert policy(decode_rows=DECODE_ROWS + 4).refusal(drafts) is None


@pytest.mark.parametrize(
    "facts, reason",
    [
        (batch([1] * 2, [10] * 2, causal=False), "not causal"),
        (batch([1] * 257, [10] * 257), "256 requests"),
        (batch([1] * 8 + [8192], [10] * 8 + [8192]), "8192 tokens"),
    ],
)
def test_limits(facts, reason):
    assert reason in policy(graph_rows=10**6).refusal(facts)
