"""Finds the OpenMP runtime that the process already uses, so that Relay runs on its threads.

vLLM binds that runtime's threads to cores. The runtime is whichever the dynamic linker gave to
torch's and vLLM's compiled code: a preloaded one first (vLLM preloads libgomp or libiomp5 in its
workers), else the one that torch brings.
"""

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from relay_attention.cpu import native
from relay_attention.errors import RelayError

_ENTRY_POINTS = {
    "parallel": "GOMP_parallel",
    "max_threads": "omp_get_max_threads",
    "thread_num": "omp_get_thread_num",
    "num_threads": "omp_get_num_threads",
}


@dataclass(frozen=True)
class Runtime:
    """Addresses of the entry points, and the file that they lie in."""

    path: str
    entry_points: dict[str, int]


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    ]


def _file_of(address: int) -> str:
    info = _DlInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_DlInfo)]
    if dladdr(address, ctypes.byref(info)) == 0 or info.dli_fname is None:
        return "unknown"
    return os.fsdecode(info.dli_fname)


def _scopes() -> list[ctypes.CDLL]:
    """Where the dynamic linker looks for torch's OpenMP calls, in its order. Loads nothing."""
    scopes = [ctypes.CDLL(None)]
    import torch

    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A search through this handle goes on into the libraries that it depends on.
        scopes.append(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY))
    except OSError:
        pass
    return scopes


def find() -> Runtime:
    """The runtime in use. Raises RelayError if no scope has all entry points, naming what lacks."""
    partial = ""
    for scope in _scopes():
        addresses = {field: _address(scope, symbol) for field, symbol in _ENTRY_POINTS.items()}
        present = [address for address in addresses.values() if address is not None]
        if len(present) == len(addresses):
            return Runtime(_file_of(addresses["parallel"]), addresses)
        if present:
            lacking = [_ENTRY_POINTS[field] for field, at in addresses.items() if at is None]
            partial = f"{_file_of(present[0])} lacks {', '.join(lacking)}"
    raise RelayError(
        f"the OpenMP runtime of this process cannot be used: {partial}"
        if partial
        else "no OpenMP runtime is loaded in this process; a torch built with OpenMP brings one, "
        "and LD_PRELOAD=libgomp.so.1 or libiomp5.so does too"
    )


def _address(scope: ctypes.CDLL, symbol: str) -> int | None:
    try:
        return ctypes.cast(getattr(scope, symbol), ctypes.c_void_p).value
    except AttributeError:
        return None


@functools.cache
def use() -> Runtime:
    """Hands the runtime to the native library, once per process."""
    runtime = find()
    native.check_openmp(native.library().relay_openmp_use(native.OpenMp(**runtime.entry_points)))
    return runtime


def threads() -> int:
    """Threads of a parallel region started by the calling thread."""
    use()
    count = ctypes.c_int32()
    native.check_openmp(native.library().relay_openmp_threads(count))
    return count.value
