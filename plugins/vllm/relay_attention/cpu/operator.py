"""Attention of one layer over vLLM's KV cache: writes new tokens' KV, and attends."""

from typing import TYPE_CHECKING

from relay_attention.cpu import layout, native
from relay_attention.cpu.plan import Planner, Shape, Step, dtype_of
from relay_attention.errors import RelayError

if TYPE_CHECKING:
    import torch


class Operator:
    """The attention operator of one layer.

    scale: factor of q . k
    window: tokens that a row sees, its own included; 0 for all
    softcap: logits become softcap * tanh(logit / softcap); 0 for none
    slopes: f32 [q_heads] of ALiBi, or None
    """

    def __init__(
        self,
        q_heads: int,
        kv_heads: int,
        head_size: int,
        scale: float,
        *,
        window: int = 0,
        softcap: float = 0.0,
        slopes: "torch.Tensor | None" = None,
    ) -> None:
        self.q_heads, self.kv_heads, self.head_size = q_heads, kv_heads, head_size
        self.window = window
        self._slopes = slopes  # keeps the memory alive that _inputs points to
        self._sinks: torch.Tensor | None = None
        self._inputs = native.Inputs(
            scale=scale, softcap=softcap, slopes=slopes.data_ptr() if slopes is not None else None
        )
        self._write = native.KvWrite(kv_heads=kv_heads, k_dim=head_size, v_dim=head_size)
        # Address and blocks of the KV cache that the structs describe.
        self._cache: tuple[int, int] | None = None
        self.shape: Shape | None = None

    def set_sinks(self, sinks: "torch.Tensor") -> None:
        """f32 [q_heads]: logits without a value, one per head."""
        self._sinks = sinks
        self._inputs.sinks = sinks.data_ptr()

    def write(
        self,
        key: "torch.Tensor",
        value: "torch.Tensor",
        kv_cache: "torch.Tensor",
        slot_mapping: "torch.Tensor",
    ) -> None:
        """Puts the vectors of new tokens into the cache.

        key, value: [>= tokens, kv_heads, head_size] of the cache's dtype
        kv_cache: [num_blocks, kv_heads, block_size, 2 * head_size]
        slot_mapping: int64 [tokens]; negative for a token that is not kept
        """
        self._look_at(kv_cache)
        size = kv_cache.element_size()
        w = self._write
        w.tokens = slot_mapping.shape[0]
        w.slots = slot_mapping.data_ptr()
        w.k, w.v = key.data_ptr(), value.data_ptr()
        w.k_row_stride, w.k_head_stride = _strides(key, size)
        w.v_row_stride, w.v_head_stride = _strides(value, size)
        native.check_openmp(native.library().relay_openmp_write(w))

    def attend(
        self,
        query: "torch.Tensor",
        kv_cache: "torch.Tensor",
        output: "torch.Tensor",
        planner: Planner,
        step: Step,
    ) -> None:
        """Computes the attention of all rows of `step`.

        query, output: [rows, q_heads, head_size] of the cache's dtype; no overlap
        kv_cache: [num_blocks, kv_heads, block_size, 2 * head_size], the rows' own KV included
        """
        self._look_at(kv_cache)
        plan = planner.plan(step, self.shape)
        size = kv_cache.element_size()
        i = self._inputs
        i.q, i.out = query.data_ptr(), output.data_ptr()
        i.q_row_stride, i.q_head_stride = _strides(query, size)
        i.out_row_stride, i.out_head_stride = _strides(output, size)
        native.check_openmp(
            native.library().relay_openmp_attend(plan.handle, i, plan.workspace, plan.threads)
        )

    def _look_at(self, kv_cache: "torch.Tensor") -> None:
        """Describes `kv_cache` to the native structs, unless they know it already."""
        cache = (kv_cache.data_ptr(), kv_cache.shape[0])
        if cache == self._cache:
            return
        blocks, kv_heads, block_size, pair = kv_cache.shape
        if (kv_heads, pair) != (self.kv_heads, 2 * self.head_size):
            raise RelayError(
                f"KV cache of shape {tuple(kv_cache.shape)}: expected "
                f"[num_blocks, {self.kv_heads}, block_size, {2 * self.head_size}]"
            )
        i, w = self._inputs, self._write
        i.k, i.v = layout.planes(kv_cache)
        w.k_cache, w.v_cache = i.k, i.v
        w.block_size = block_size
        i.cache_slots = w.cache_slots = blocks * block_size
        w.layout = layout.layout_of(block_size, self.head_size)
        i.q_type = i.out_type = w.k_type = w.v_type = dtype_of(kv_cache.dtype)
        self.shape = Shape(
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            dtype=kv_cache.dtype,
            block_size=block_size,
            window=self.window,
        )
        self._cache = cache


def _strides(vectors: "torch.Tensor", size: int) -> tuple[int, int]:
    """Bytes from row to row and from head to head of [rows, heads, head_size], `size` an element's.

    Raises RelayError if the elements of a vector do not follow one another.
    """
    row, head, element = vectors.stride()
    if element != 1:
        raise RelayError("the elements of a query, key, value or output vector are not contiguous")
    return row * size, head * size
