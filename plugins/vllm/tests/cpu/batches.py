"""Batches over vLLM's own tensors, with a dense copy of each request's K and V beside them."""

from dataclasses import dataclass

import torch
from relay_attention.cpu.operator import Operator
from relay_attention.cpu.plan import Step


@dataclass
class Request:
    """`rows` query rows, the last ones of `prefix + own` tokens. Requests with equal `group` share
    their first `prefix` tokens (whole blocks); -1: shares with nobody."""

    prefix: int
    own: int
    rows: int = 1
    group: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.own


@dataclass
class Batch:
    step: Step
    query: torch.Tensor  # [rows, q_heads, head_size]
    kv_cache: torch.Tensor  # [num_blocks, kv_heads, block_size, 2 * head_size]
    slots: list[torch.Tensor]  # per request, int64 [tokens]
    keys: list[torch.Tensor]  # per request, [tokens, kv_heads, head_size]
    values: list[torch.Tensor]

    def write(self, operator: Operator) -> None:
        """Fills the KV cache, a request at a time."""
        for key, value, slots in zip(self.keys, self.values, self.slots, strict=True):
            operator.write(key, value, self.kv_cache, slots)


def make_batch(
    requests: list[Request],
    *,
    q_heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    block_size: int = 32,
    seed: int = 0,
    loudness: float = 1.0,
) -> Batch:
    """Random Q, K and V. Blocks lie in random order; what no request owns is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    blocks_of = [-(-r.tokens // block_size) for r in requests]
    num_blocks = sum(blocks_of) + 2
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()  # 0 is the null block
    table = torch.zeros(len(requests), max(blocks_of, default=1) + 1, dtype=torch.int32)
    shared: dict[int, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
    keys, values, slots = [], [], []
    for i, r in enumerate(requests):
        assert r.prefix % block_size == 0 and r.rows <= r.tokens
        key, value = normal(r.tokens, kv_heads, head_size), normal(r.tokens, kv_heads, head_size)
        blocks = [free.pop() for _ in range(blocks_of[i] - r.prefix // block_size)]
        prefix_blocks, prefix_key, prefix_value = shared.get(r.group, ([], key[:0], value[:0]))
        have = min(len(prefix_blocks), r.prefix // block_size)
        prefix_blocks = prefix_blocks[:have]
        key[: have * block_size] = prefix_key[: have * block_size]
        value[: have * block_size] = prefix_value[: have * block_size]
        prefix_blocks += [free.pop() for _ in range(r.prefix // block_size - have)]
        if r.group >= 0 and len(prefix_blocks) > len(shared.get(r.group, ([],))[0]):
            shared[r.group] = (list(prefix_blocks), key, value)
        blocks = prefix_blocks + blocks
        table[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        position = torch.arange(r.tokens)
        slots.append(
            torch.tensor(blocks)[position // block_size] * block_size + position % block_size
        )
        keys.append(key)
        values.append(value)
    rows = torch.tensor([0] + [r.rows for r in requests]).cumsum(0).to(torch.int32)
    step = Step(rows, torch.tensor([r.tokens for r in requests], dtype=torch.int32), table)
    query = normal(int(rows[-1]), q_heads, head_size) * loudness
    kv_cache = torch.full((num_blocks, kv_heads, block_size, 2 * head_size), float("nan"))
    return Batch(step, query, kv_cache.to(dtype), slots, keys, values)
