"""What the ctypes bindings of both native libraries share."""

import ctypes
from collections.abc import Mapping
from ctypes import c_int64, c_void_p
from pathlib import Path

from relay_attention.errors import RelayError

F32, F16, BF16 = 0, 1, 2  # relay_dtype

Signatures = Mapping[str, tuple[object, list[object]]]  # result and arguments of each function


class Sized(ctypes.Structure):
    """A struct whose first field is its size."""

    def __init__(self, **fields: object) -> None:
        super().__init__(size=ctypes.sizeof(self), **fields)


class Kv(ctypes.Structure):
    """relay_kv."""

    _fields_ = [
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("slot_stride", c_int64),
        ("head_stride", c_int64),
    ]


def load(name: str, signatures: Signatures) -> ctypes.CDLL:
    """The library `name` of this package. Raises RelayError if it is missing or does not load."""
    try:
        loaded = ctypes.CDLL(str(Path(__file__).with_name(name)))
    except OSError as e:
        raise RelayError(
            f"the native library does not load ({e}); reinstall: pip install plugins/vllm"
        ) from e
    for function_name, (result, arguments) in signatures.items():
        function = getattr(loaded, function_name)
        function.restype = result
        function.argtypes = arguments
    return loaded
