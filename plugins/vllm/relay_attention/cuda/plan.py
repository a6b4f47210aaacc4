"""Who shares what in a batch and who does what, found on the GPU: once per step, for all layers of
one kind."""

import ctypes
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from relay_attention import settings
from relay_attention.cuda import native
from relay_attention.errors import RelayError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kind:
    """In what the layers of one group may differ, as far as a plan knows. `window` is in tokens, 0
    for none."""

    q_heads: int
    window: int


@dataclass(frozen=True)
class Limits:
    """What a plan is made for: most requests and rows of a batch, most blocks of a request."""

    requests: int
    rows: int
    blocks: int


MAX_REQUESTS = 1024  # of librelay-cuda


@dataclass(frozen=True)
class Cache:
    """What the layers of one group have in common. The types are those of native."""

    kv_heads: int
    head_size: int
    q_type: int
    kv_type: int
    block_size: int
    blocks: int


def dtype_of(dtype: "torch.dtype") -> int:
    """The native type of queries. Raises RelayError if the kernels lack it."""
    import torch

    known = {torch.float16: native.F16, torch.bfloat16: native.BF16}
    if dtype not in known:
        raise RelayError(f"no kernels for {dtype}; float16 and bfloat16 are served")
    return known[dtype]


def _options(kind: Kind, cache: Cache, limits: Limits) -> native.PlanOptions:
    return native.PlanOptions(
        q_heads=kind.q_heads,
        kv_heads=cache.kv_heads,
        head_dim=cache.head_size,
        q_type=cache.q_type,
        kv_type=cache.kv_type,
        max_requests=limits.requests,
        max_rows=limits.rows,
        max_blocks=limits.blocks,
        block_size=cache.block_size,
        cache_blocks=cache.blocks,
        causal=1,
        window=kind.window,
        sharing=int(settings.sharing()),
    )


class Plan:
    """A native plan and its workspace; both stay where they are, so that CUDA graphs find them."""

    def __init__(
        self, kind: Kind, cache: Cache, limits: Limits, device: "torch.device", stream: int
    ) -> None:
        import torch

        library = native.library()
        size = ctypes.c_size_t()
        limits = replace(limits, requests=min(limits.requests, MAX_REQUESTS))
        while True:
            options = _options(kind, cache, limits)
            status = library.relay_cuda_workspace_bytes(options, size)
            # Long contexts leave room for fewer requests; larger batches are left to vLLM.
            if status == 0 or limits.requests == 1:
                break
            limits = replace(limits, requests=limits.requests // 2)
        native.check(status)
        self.limits = limits
        self.workspace = torch.empty(size.value, dtype=torch.uint8, device=device)
        handle = ctypes.c_void_p()
        native.check(
            library.relay_cuda_plan_create(
                handle, options, self.workspace.data_ptr(), size.value, stream
            )
        )
        self.handle = handle
        self._batch = native.Batch()
        self.made = 0  # batches, for tests and benches

    @property
    def path(self) -> str:
        """The kernels in use, e.g. "wgmma"."""
        return native.library().relay_cuda_path(self.handle).decode()

    @property
    def requests(self) -> int:
        """Of the last planned batch, padding included."""
        return self._batch.requests

    @property
    def rows(self) -> int:
        """Of the last planned batch, padding included."""
        return self._batch.rows

    def make(
        self,
        query_start_loc: "torch.Tensor",
        seq_lens: "torch.Tensor",
        block_table: "torch.Tensor",
        rows: int,
        stream: int,
    ) -> None:
        """Enqueues the planning of a batch. The arrays are read again by every layer, and by every
        replay of a graph that a layer was captured in.

        query_start_loc: int32 [requests + 1]; those of padding are all at the end
        seq_lens: int32 [requests]
        block_table: int32 [requests, any]
        rows: no fewer than query_start_loc[-1]
        """
        import torch

        for array in (query_start_loc, seq_lens, block_table):
            if array.dtype != torch.int32 or array.stride(-1) != 1:
                raise RelayError(f"a batch array is {array.dtype}, strides {array.stride()}")
        batch = self._batch
        batch.requests = seq_lens.shape[0]
        batch.rows = rows
        batch.query_starts = query_start_loc.data_ptr()
        batch.kv_lengths = seq_lens.data_ptr()
        batch.table = block_table.data_ptr()
        batch.table_stride = block_table.stride(0)
        native.check(native.library().relay_cuda_plan_batch(self.handle, batch, stream))
        self.made += 1

    def summary(self, stream: int) -> native.Summary:
        """What the last planned batch takes. Waits for the GPU: for reports and benches."""
        summary = native.Summary()
        native.check(native.library().relay_cuda_summarize(self.handle, summary, stream))
        return summary

    def __del__(self) -> None:
        # Only what __init__ got to; at interpreter exit the operating system frees the rest.
        if getattr(self, "handle", None) and native is not None:
            native.library().relay_cuda_plan_free(self.handle)
