"""ctypes bindings of the GPU's library: the C ABI of librelay-cuda.

Names and fields are those of relay/relay_cuda.h, which describes them. All strides are in bytes.
"""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

from relay_attention import binding
from relay_attention.binding import BF16, F16, Kv, Sized
from relay_attention.errors import RelayError

__all__ = ["BF16", "F16", "Kv"]  # they are used as this module's

F8_E4M3 = 16  # RELAY_CUDA_F8_E4M3
LIBRARY = "librelay-cuda.so"


class PlanOptions(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("q_heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("q_type", c_int32),
        ("kv_type", c_int32),
        ("max_requests", c_int32),
        ("max_rows", c_int32),
        ("max_blocks", c_int32),
        ("block_size", c_int32),
        ("cache_blocks", c_int32),
        ("causal", c_int32),
        ("window", c_int32),
        ("sharing", c_int32),
        ("check", c_int32),
        ("path", c_int32),
        ("min_shared_slots", c_int32),
    ]


class Batch(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("requests", c_int32),
        ("rows", c_int32),
        ("query_starts", c_void_p),
        ("kv_lengths", c_void_p),
        ("table", c_void_p),
        ("table_stride", c_int64),
    ]


class Inputs(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("q", c_void_p),
        ("out", c_void_p),
        ("q_row_stride", c_int64),
        ("q_head_stride", c_int64),
        ("out_row_stride", c_int64),
        ("out_head_stride", c_int64),
        ("k", Kv),
        ("v", Kv),
        ("scale", c_float),
        ("softcap", c_float),
        ("slopes", c_void_p),
        ("sinks", c_void_p),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
        ("lse", c_void_p),
        ("q_scale", c_void_p),
    ]


class Summary(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("segments", c_int32),
        ("shared_segments", c_int32),
        ("workers", c_int32),
        ("reserved", c_int32),
        ("kv_slots_read", c_int64),
        ("kv_slots_attended", c_int64),
        ("partial_rows", c_int64),
        ("partial_capacity", c_int64),
        ("flops", c_double),
    ]


_SIGNATURES: binding.Signatures = {
    "relay_cuda_last_error": (c_char_p, []),
    "relay_cuda_device_name": (c_char_p, []),
    "relay_cuda_workspace_bytes": (c_int32, [POINTER(PlanOptions), POINTER(c_size_t)]),
    "relay_cuda_plan_create": (
        c_int32,
        [POINTER(c_void_p), POINTER(PlanOptions), c_void_p, c_size_t, c_void_p],
    ),
    "relay_cuda_plan_free": (None, [c_void_p]),
    "relay_cuda_path": (c_char_p, [c_void_p]),
    "relay_cuda_plan_batch": (c_int32, [c_void_p, POINTER(Batch), c_void_p]),
    "relay_cuda_attend": (c_int32, [c_void_p, POINTER(Inputs), c_void_p]),
    "relay_cuda_summarize": (c_int32, [c_void_p, POINTER(Summary), c_void_p]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; loading touches no GPU. Raises RelayError if there is none."""
    if not Path(binding.__file__).with_name(LIBRARY).exists():
        raise RelayError(
            "this package was built without CUDA: no nvcc was found then, or RELAY_CUDA was OFF; "
            "put nvcc 12.4 or newer on PATH (or name it in CUDACXX) and reinstall: "
            "pip install plugins/vllm"
        )
    return binding.load(LIBRARY, _SIGNATURES)


def check(status: int) -> None:
    """Raises RelayError for a failed call of the C ABI."""
    if status != 0:
        raise RelayError(library().relay_cuda_last_error().decode())


def device_name() -> str:
    """The current GPU, e.g. "NVIDIA H100 80GB HBM3 (9.0, 132 SMs)". Starts CUDA in this process."""
    name = library().relay_cuda_device_name().decode()
    if not name:
        raise RelayError(library().relay_cuda_last_error().decode())
    return name
