"""The kernels that Relay is measured beside, each called as its own engine calls it.

FA3 is vLLM's build of FlashAttention 3. It needs no vLLM: RELAY_FA3 names its library
(`vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so` of the wheel, or that file packed by xz); several,
separated by colons, are tried in turn. Without RELAY_FA3 an installed vLLM is asked.

A peer offers variants of one call; the benchmark times the fastest of them.
"""

import lzma
import os
import tempfile
from pathlib import Path

import torch


class Fa3:
    def __init__(self):
        self.source = self._load()
        self.ops = torch.ops._vllm_fa3_C
        self.ops.fwd  # noqa: B018  fails here, not in the middle of a measurement

    @staticmethod
    def _load():
        problems = []
        for name in filter(None, os.environ.get("RELAY_FA3", "").split(":")):
            path = Path(name)
            try:
                if path.suffix == ".xz":
                    unpacked = Path(tempfile.gettempdir()) / path.name.removesuffix(".xz")
                    if not unpacked.exists():
                        part = unpacked.with_suffix(f".{os.getpid()}")
                        with lzma.open(path) as packed, part.open("wb") as file:
                            while piece := packed.read(1 << 24):
                                file.write(piece)
                        part.rename(unpacked)
                    path = unpacked
                torch.ops.load_library(str(path.resolve()))
                return path.name.split("_fa3")[0] + "".join(f"; not {p}" for p in problems)
            except Exception as error:
                problems.append(f"{path.name}: {str(error)[:160]}")
        if problems:
            raise RuntimeError("; ".join(problems))
        import vllm
        import vllm.vllm_flash_attn  # noqa: F401  loads the library

        return f"vllm-{vllm.__version__}"

    def metadata(self, p, splits):
        """The schedule, which vLLM has made once per step, outside of the layers."""
        return self.ops.get_scheduler_metadata(
            p.batch, 1, p.max_length, p.q_heads, p.kv_heads, p.dim, p.dim, p.kv.dtype,
            p.lengths, p.starts, None, None, None, None, p.block_size, 0, True, -1, -1, False,
            splits, None, 0,
        )  # fmt: skip

    def variants(self, p, out):
        # Over fp8 it multiplies in fp8, so that queries are rounded too: as vLLM does, beforehand.
        q = p.q.to(p.kv.dtype)
        scales = None
        if p.kv.element_size() == 1:
            scales = torch.ones(p.batch, p.kv_heads, dtype=torch.float32, device=p.device)

        def call(metadata, splits):
            def run():
                self.ops.fwd(
                    q, p.k, p.v, None, None, None, out, p.starts, None, None, None, p.lengths,
                    1, p.max_length, p.table, None, None, None, None, None, scales, scales, scales,
                    p.scale, True, -1, -1, 0.0, True, metadata, splits, None, 0, None, 1, 0, None,
                )  # fmt: skip

            return run

        yield "plain", lambda: call(None, 0)
        yield "planned", lambda: call(self.metadata(p, 0), 0)
        # What vLLM passes where it replays CUDA graphs: at most 32 splits.
        yield "planned, 32 splits", lambda: call(self.metadata(p, 32), 32)


class FlashInfer:
    def __init__(self, jit=False):
        # Without it a module that is missing is a reason given at once, not minutes of compiling.
        # Any value disables it, 0 as well.
        os.environ.pop("FLASHINFER_DISABLE_JIT", None)
        if not jit:
            os.environ["FLASHINFER_DISABLE_JIT"] = "1"
        import flashinfer

        self.lib = flashinfer
        self.source = f"flashinfer-{flashinfer.__version__}"
        self.scratch = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        self.decoders = {}
        self.cascades = {}

    @staticmethod
    def caches(p):
        """vLLM's layout, and FlashInfer's own over the same memory (other values: only timed)."""
        return {
            "": (p.k, p.v),
            ", own layout": p.kv.view(p.blocks, 2, p.block_size, p.kv_heads, p.dim),
        }

    def decode(self, p, out):
        for tensor_cores in (False, True):
            for layout, cache in self.caches(p).items():

                def make(tensor_cores=tensor_cores, cache=cache):
                    if tensor_cores not in self.decoders:
                        self.decoders[tensor_cores] = self.lib.BatchDecodeWithPagedKVCacheWrapper(
                            self.scratch, "NHD", use_tensor_cores=tensor_cores
                        )
                    wrapper = self.decoders[tensor_cores]
                    counts = (p.lengths_host + p.block_size - 1) // p.block_size
                    indices = torch.cat([p.table[i, :n] for i, n in enumerate(counts.tolist())])
                    wrapper.plan(
                        p.offsets(counts), indices, p.last_page(p.lengths_host), p.q_heads,
                        p.kv_heads, p.dim, p.block_size, q_data_type=p.q.dtype,
                        kv_data_type=p.q.dtype,
                    )  # fmt: skip
                    return lambda: wrapper.run(p.q, cache, out=out)

                yield ("tensor cores" if tensor_cores else "CUDA cores") + layout, make

    def cascade(self, p, out, backend="auto"):
        """All levels, as the caller would have to know them. `fa2` is not offered by the wrapper,
        but splits a shared prefix over the whole GPU, which the default on Hopper does not."""
        if not p.levels:
            raise RuntimeError("nothing is shared")
        for layout, cache in self.caches(p).items():

            def make(cache=cache):
                levels = len(p.levels) + 1
                if (levels, backend) not in self.cascades:
                    wrapper = self.lib.MultiLevelCascadeAttentionWrapper(
                        levels, self.scratch, "NHD"
                    )
                    for inner in wrapper._batch_prefill_wrappers:
                        inner._backend = backend
                    self.cascades[levels, backend] = wrapper
                wrapper = self.cascades[levels, backend]
                rows, pages, indices, last = [], [], [], []
                for ids in p.level_ids:
                    groups, columns = ids.shape
                    step = p.batch // groups
                    rows.append(torch.arange(0, p.batch + 1, step, dtype=torch.int32).to(p.device))
                    pages.append(p.offsets(torch.full((groups,), columns)))
                    indices.append(ids.flatten())
                    last.append(p.last_page(torch.full((groups,), p.block_size)))
                counts = (p.own_host + p.block_size - 1) // p.block_size
                rows.append(p.starts)
                pages.append(p.offsets(counts))
                own = enumerate(counts.tolist())
                indices.append(torch.cat([p.own_ids[i, :n] for i, n in own]))
                last.append(p.last_page(p.own_host))
                wrapper.plan(
                    rows, pages, indices, last, p.q_heads, p.kv_heads, p.dim, p.block_size,
                    q_data_type=p.q.dtype,
                )  # fmt: skip

                def run():
                    out_of_run = wrapper.run(p.q, cache)
                    run.out = out_of_run  # it has no `out`
                    return out_of_run

                return run

            yield backend + layout, make
