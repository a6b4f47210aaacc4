"""Which batches Relay attends, and which are left to vLLM's own kernel. Decided on the host, once
per step, from what the host knows: it does not know what is shared.

A full CUDA graph has the kernels of one of the two in it. So whatever decides about a batch that
may be replayed must depend on nothing that differs between capture and replay.
"""

from dataclasses import dataclass

import numpy as np

from relay_attention.cuda.plan import Limits

# A request with more new tokens than these is a prompt, or a piece of one.
DECODE_ROWS = 16

# A row of a prompt takes Relay longer than FlashAttention 3: per query head and token some 0.7 ps
# of an H100 (350 against 650 TFLOP/s). A token that need not be read again saves 0.17 ns per KV
# head. Half of the reads are taken to be spared, since how many will be is not known here.
PAIRS_PER_SPARED_READ = 120


@dataclass(frozen=True)
class Facts:
    """A batch, padding included. `kv_lengths` may be upper bounds; `query_starts` [requests + 1]
    are exact."""

    requests: int
    rows: int
    max_query_rows: int
    causal: bool
    query_starts: np.ndarray
    kv_lengths: np.ndarray


@dataclass(frozen=True)
class Policy:
    """decode_rows: most rows of a request that decodes or verifies a draft
    graph_rows: batches of up to so many rows may be replayed from a full graph, whatever they hold
    group: query heads of a KV head
    """

    limits: Limits
    decode_rows: int
    graph_rows: int
    group: int

    def refusal(self, batch: Facts) -> str | None:
        """Why vLLM's own kernel attends this batch; None if Relay does."""
        if not batch.causal:
            return "attention that is not causal"
        if batch.requests < 2:
            return "single requests, with nobody to share"
        if batch.requests > self.limits.requests:
            return f"more than {self.limits.requests} requests"
        if batch.rows > self.limits.rows:
            return f"more than {self.limits.rows} tokens in a step"
        if batch.max_query_rows <= self.decode_rows or batch.rows <= self.graph_rows:
            return None
        rows = np.diff(batch.query_starts).astype(np.int64)
        lengths = batch.kv_lengths.astype(np.int64)
        decoding = lengths[(rows > 0) & (rows <= self.decode_rows)]
        # One of those that share has to read what they share.
        spared = int(decoding.sum() - decoding.max()) if decoding.size else 0
        prompts = rows > self.decode_rows
        pairs = self.group * int((rows * (lengths - rows // 2))[prompts].sum())
        if pairs > PAIRS_PER_SPARED_READ * spared:
            return "prompts, beside few requests that decode"
        return None
