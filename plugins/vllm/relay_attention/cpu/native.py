"""ctypes bindings of the CPU's library: the C ABI of librelay and `native/openmp.h`.

Names and fields are those of the C headers, which describe them. All strides are in bytes.
"""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p

from relay_attention import binding
from relay_attention.binding import BF16, F16, F32, Kv, Sized
from relay_attention.errors import RelayError

__all__ = ["BF16", "F16", "F32", "Kv"]  # they are used as this module's

ROWS, TILES = 0, 1  # relay_layout


class Batch(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("requests", c_int32),
        ("row_offsets", c_void_p),
        ("kv_lengths", c_void_p),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
        ("causal", c_int32),
    ]


class PlanOptions(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("q_heads", c_int32),
        ("kv_heads", c_int32),
        ("qk_dim", c_int32),
        ("v_dim", c_int32),
        ("k_type", c_int32),
        ("v_type", c_int32),
        ("threads", c_int32),
        ("sharing", c_int32),
        ("layout", c_int32),
    ]


class Inputs(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("q_type", c_int32),
        ("out_type", c_int32),
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
        ("lse", c_void_p),
        ("cache_slots", c_int64),
    ]


class OpenMp(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("parallel", c_void_p),
        ("max_threads", c_void_p),
        ("thread_num", c_void_p),
        ("num_threads", c_void_p),
    ]


class KvWrite(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("kv_heads", c_int32),
        ("k_dim", c_int32),
        ("v_dim", c_int32),
        ("k_type", c_int32),
        ("v_type", c_int32),
        ("layout", c_int32),
        ("block_size", c_int64),
        ("k_cache", Kv),
        ("v_cache", Kv),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_row_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_row_stride", c_int64),
        ("v_head_stride", c_int64),
        ("tokens", c_int64),
        ("slots", c_void_p),
        ("cache_slots", c_int64),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "relay_version": (c_char_p, []),
    "relay_isa": (c_char_p, []),
    "relay_last_error": (c_char_p, []),
    "relay_plan_batch": (c_int32, [POINTER(c_void_p), POINTER(Batch), POINTER(PlanOptions)]),
    "relay_plan_free": (None, [c_void_p]),
    "relay_plan_slots": (c_int32, [c_void_p, POINTER(c_int64), POINTER(c_int64)]),
    "relay_workspace_create": (c_int32, [POINTER(c_void_p)]),
    "relay_workspace_fit": (c_int32, [c_void_p, c_void_p]),
    "relay_workspace_free": (None, [c_void_p]),
    "relay_openmp_error": (c_char_p, []),
    "relay_openmp_use": (c_int32, [POINTER(OpenMp)]),
    "relay_openmp_threads": (c_int32, [POINTER(c_int32)]),
    "relay_openmp_attend": (c_int32, [c_void_p, POINTER(Inputs), c_void_p, c_int32]),
    "relay_openmp_write": (c_int32, [POINTER(KvWrite)]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises RelayError if it is missing or does not load."""
    return binding.load("librelay_vllm.so", _SIGNATURES)


def check(status: int) -> None:
    """Raises RelayError for a failed call of the C ABI."""
    if status != 0:
        raise RelayError(library().relay_last_error().decode())


def check_openmp(status: int) -> None:
    """Raises RelayError for a failed call of a relay_openmp_ function."""
    if status != 0:
        raise RelayError(library().relay_openmp_error().decode())


def version() -> str:
    """Version of the native library, e.g. "0.1.0"."""
    return library().relay_version().decode()


def isa() -> str:
    """The kernel set in use, e.g. "avx512bf16"."""
    name = library().relay_isa().decode()
    if not name:
        raise RelayError(library().relay_last_error().decode())
    return name
