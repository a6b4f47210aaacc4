"""librelay-cuda.so by its C interface, include/relay/relay_cuda.h, as the benchmark uses it."""

import ctypes
import os
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
BF16, F8_E4M3 = 2, 16
PATHS = {"auto": 0, "mma": 1, "wgmma": 2}


def fields(kind, names):
    return [(name, kind) for name in names.split()]


class Options(Structure):
    _fields_ = fields(c_size_t, "size") + fields(
        c_int32,
        "q_heads kv_heads head_dim q_type kv_type max_requests max_rows max_blocks block_size "
        "cache_blocks causal window sharing check path min_shared_slots",
    )


class Batch(Structure):
    _fields_ = (
        fields(c_size_t, "size")
        + fields(c_int32, "requests rows")
        + fields(c_void_p, "query_starts kv_lengths table")
        + fields(c_int64, "table_stride")
    )


class Kv(Structure):
    """relay_kv of relay/relay.h."""

    _fields_ = fields(c_void_p, "data") + fields(c_int64, "block_stride slot_stride head_stride")


class Inputs(Structure):
    _fields_ = (
        fields(c_size_t, "size")
        + fields(c_void_p, "q out")
        + fields(c_int64, "q_row_stride q_head_stride out_row_stride out_head_stride")
        + fields(Kv, "k v")
        + fields(c_float, "scale softcap")
        + fields(c_void_p, "slopes sinks k_scale v_scale lse q_scale")
    )


class Summary(Structure):
    _fields_ = (
        fields(c_size_t, "size")
        + fields(c_int32, "segments shared_segments workers reserved")
        + fields(c_int64, "kv_slots_read kv_slots_attended partial_rows partial_capacity")
        + fields(c_double, "flops")
    )


def sized(struct, **values):
    made = struct(size=ctypes.sizeof(struct))
    for name, value in values.items():
        setattr(made, name, value)
    return made


def strided(tensor):
    """A cache as [block][slot][KV head][dim], in bytes."""
    block, slot, head, _ = (stride * tensor.element_size() for stride in tensor.stride())
    return Kv(tensor.data_ptr(), block, slot, head)


def stream():
    return torch.cuda.current_stream().cuda_stream


def find_library(path):
    path = path or os.environ.get("RELAY_CUDA_LIBRARY")
    if path:
        return Path(path).resolve(strict=True)
    found = list((ROOT / "build").glob("**/librelay-cuda.so"))
    if not found:
        raise FileNotFoundError("no librelay-cuda.so: build it, or name it by --library")
    return max(found, key=lambda file: file.stat().st_mtime)


class Library:
    def __init__(self, path=None):
        self.source = str(find_library(path))
        lib = self.lib = ctypes.CDLL(self.source)
        lib.relay_cuda_last_error.restype = lib.relay_cuda_path.restype = ctypes.c_char_p
        lib.relay_cuda_path.argtypes = [c_void_p]
        lib.relay_cuda_plan_free.argtypes, lib.relay_cuda_plan_free.restype = [c_void_p], None
        signatures = {
            "workspace_bytes": [POINTER(Options), POINTER(c_size_t)],
            "plan_create": [POINTER(c_void_p), POINTER(Options), c_void_p, c_size_t, c_void_p],
            "plan_batch": [c_void_p, POINTER(Batch), c_void_p],
            "attend": [c_void_p, POINTER(Inputs), c_void_p],
            "summarize": [c_void_p, POINTER(Summary), c_void_p],
        }
        for name, arguments in signatures.items():
            getattr(lib, f"relay_cuda_{name}").argtypes = arguments

    def call(self, name, *arguments):
        if getattr(self.lib, f"relay_cuda_{name}")(*arguments):
            raise RuntimeError(f"{name}: {self.lib.relay_cuda_last_error().decode()}")

    def plan(self, p, sharing="on", path="auto", queries="bf16"):
        return Plan(self, p, sharing, path, queries)


class Plan:
    """A plan for one problem, its workspace, and its calls in torch's current stream."""

    def __init__(self, library, p, sharing, path, queries):
        self.call, self.lib, self.p = library.call, library.lib, p
        options = sized(
            Options, q_heads=p.q_heads, kv_heads=p.kv_heads, head_dim=p.dim, q_type=BF16,
            kv_type=F8_E4M3 if p.kv.element_size() == 1 else BF16, max_requests=p.batch,
            max_rows=p.batch, max_blocks=p.table.shape[1],
            block_size=p.block_size, cache_blocks=p.blocks, causal=1, sharing=int(sharing == "on"),
            path=PATHS[path],
        )  # fmt: skip
        size = c_size_t()
        self.call("workspace_bytes", byref(options), byref(size))
        self.workspace = torch.empty(max(size.value, 1), dtype=torch.uint8, device=p.device)
        self.q, self.q_scale = p.q, None
        if queries == "fp8":  # as vLLM gives them where KV is fp8, with a scale of 1
            self.q = p.q.to(p.kv.dtype)
            self.q_scale = torch.ones(1, dtype=torch.float32, device=p.device)
        self.handle = c_void_p()
        self.call("plan_create", byref(self.handle), byref(options), self.workspace.data_ptr(),
                  size.value, stream())  # fmt: skip
        self.path = self.lib.relay_cuda_path(self.handle).decode()
        self.batch = sized(
            Batch, requests=p.batch, query_starts=p.starts.data_ptr(),
            kv_lengths=p.lengths.data_ptr(), table=p.table.data_ptr(),
            table_stride=p.table.stride(0),
        )  # fmt: skip

    def plan_batch(self):
        self.call("plan_batch", self.handle, byref(self.batch), stream())

    def attend_call(self, out):
        p = self.p
        row, head, _ = (stride * self.q.element_size() for stride in self.q.stride())
        out_row, out_head, _ = (stride * out.element_size() for stride in out.stride())
        inputs = sized(
            Inputs, q=self.q.data_ptr(), out=out.data_ptr(), q_row_stride=row, q_head_stride=head,
            out_row_stride=out_row, out_head_stride=out_head, k=strided(p.k), v=strided(p.v),
            scale=p.scale,
            q_scale=self.q_scale.data_ptr() if self.q_scale is not None else None,
        )  # fmt: skip

        def run():
            self.call("attend", self.handle, byref(inputs), stream())

        run.keeps = out  # its memory must outlive the call
        return run

    def summary(self):
        summary = sized(Summary)
        self.call("summarize", self.handle, byref(summary), stream())
        return {name: getattr(summary, name) for name, _ in Summary._fields_[1:]}

    def free(self):
        torch.cuda.synchronize()
        self.lib.relay_cuda_plan_free(self.handle)
        self.workspace = None
