"""How K and V lie inside a block of vLLM's KV cache.

vLLM allocates a layer's cache as [num_blocks, kv_heads, block_size, 2 * head_size]; what stands
inside one (block, head) is the attention backend's own affair. Relay keeps all K of the block and
then all V: in tiles, as its kernels multiply them (RELAY_TILES), or, where the sizes do not allow
that, one vector after the other.
"""

from typing import TYPE_CHECKING

from relay_attention.cpu import native
from relay_attention.errors import RelayError

if TYPE_CHECKING:
    import torch


def layout_of(block_size: int, head_size: int) -> int:
    """The relay_layout inside a block of `block_size` tokens: tiles of 64, head sizes of 16."""
    return native.TILES if block_size % 64 == 0 and head_size % 16 == 0 else native.ROWS


def planes(kv_cache: "torch.Tensor") -> tuple[native.Kv, native.Kv]:
    """K and V of `kv_cache`, [num_blocks, kv_heads, block_size, 2 * head_size].

    Blocks and heads may have any stride; inside one (block, head) the memory must be contiguous.
    Raises RelayError if it is not.
    """
    _, _, block_size, pair = kv_cache.shape
    block_stride, head_stride, slot_stride, element_stride = kv_cache.stride()
    if element_stride != 1 or slot_stride != pair:
        raise RelayError(
            f"KV cache strides {kv_cache.stride()}: a block of a head is not contiguous"
        )
    size = kv_cache.element_size()
    head_size = pair // 2
    k = native.Kv(
        data=kv_cache.data_ptr(),
        block_stride=block_stride * size,
        slot_stride=head_size * size,
        head_stride=head_stride * size,
    )
    v = native.Kv(
        data=kv_cache.data_ptr() + block_size * head_size * size,
        block_stride=k.block_stride,
        slot_stride=k.slot_stride,
        head_stride=k.head_stride,
    )
    return k, v
