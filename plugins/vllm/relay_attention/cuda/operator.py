"""Attention of one layer over vLLM's KV cache on a GPU."""

from typing import TYPE_CHECKING

from relay_attention.cuda import native
from relay_attention.cuda.plan import Kind, Plan
from relay_attention.errors import RelayError

if TYPE_CHECKING:
    import torch


class Operator:
    """The attention operator of one layer. Calls only enqueue, so they may be captured.

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
        self.kind = Kind(q_heads, window)
        self.kv_heads, self.head_size = kv_heads, head_size
        self._keep = [slopes]  # alive, since _inputs points to them
        self._inputs = native.Inputs(
            scale=scale, softcap=softcap, slopes=slopes.data_ptr() if slopes is not None else None
        )
        self._q_scale: torch.Tensor | None = None
        self._cache: tuple[int, ...] | None = None  # address and strides that _inputs describes

    def set_sinks(self, sinks: "torch.Tensor") -> None:
        """f32 [q_heads]: logits without a value, one per head. Read anew by every call."""
        self._keep.append(sinks)
        self._inputs.sinks = sinks.data_ptr()

    def set_scales(
        self, q_scale: "torch.Tensor", k_scale: "torch.Tensor", v_scale: "torch.Tensor"
    ) -> None:
        """f32 scalars that fp8 queries, keys and values are multiplied by. Read anew by every
        call."""
        self._keep += [k_scale, v_scale]
        self._q_scale = q_scale
        self._inputs.k_scale, self._inputs.v_scale = k_scale.data_ptr(), v_scale.data_ptr()

    def attend(
        self,
        query: "torch.Tensor",
        kv_cache: "torch.Tensor",
        output: "torch.Tensor",
        plan: Plan,
        stream: int,
    ) -> None:
        """Enqueues the attention of all rows of the batch that `plan` was last made for.

        query, output: [>= rows, q_heads, head_size] of the plan's type; no overlap. Queries may be
          fp8 where the cache is
        kv_cache: [num_blocks, kv_heads, block_size, 2 * head_size] in any order in memory
        """
        self._look_at(kv_cache)
        i = self._inputs
        is_fp8 = query.element_size() == 1 and self._q_scale is not None
        size, out_size = query.element_size(), output.element_size()
        row, head, element = query.stride()
        out_row, out_head, out_element = output.stride()
        if element != 1 or out_element != 1 or not (is_fp8 or query.dtype == output.dtype):
            raise RelayError(
                f"query {query.dtype}, strides {query.stride()}; "
                f"output {output.dtype}, strides {output.stride()}"
            )
        i.q, i.out = query.data_ptr(), output.data_ptr()
        i.q_row_stride, i.q_head_stride = row * size, head * size
        i.out_row_stride, i.out_head_stride = out_row * out_size, out_head * out_size
        i.q_scale = self._q_scale.data_ptr() if is_fp8 else None
        native.check(native.library().relay_cuda_attend(plan.handle, i, stream))

    def _look_at(self, kv_cache: "torch.Tensor") -> None:
        """Describes `kv_cache` to _inputs, unless it is described already."""
        cache = (kv_cache.data_ptr(), *kv_cache.stride())
        if cache == self._cache:
            return
        _, kv_heads, _, pair = kv_cache.shape
        block_stride, head_stride, slot_stride, element_stride = kv_cache.stride()
        if (kv_heads, pair) != (self.kv_heads, 2 * self.head_size) or element_stride != 1:
            raise RelayError(
                f"KV cache of shape {tuple(kv_cache.shape)}, strides {kv_cache.stride()}: expected "
                f"[num_blocks, {self.kv_heads}, block_size, {2 * self.head_size}]"
            )
        size = kv_cache.element_size()
        if kv_heads == 1:
            head_stride = pair  # torch may say anything of a dimension of one
        strides = dict(
            block_stride=block_stride * size,
            slot_stride=slot_stride * size,
            head_stride=head_stride * size,
        )
        data = kv_cache.data_ptr()
        self._inputs.k = native.Kv(data=data, **strides)
        self._inputs.v = native.Kv(data=data + self.head_size * size, **strides)
        self._cache = cache
