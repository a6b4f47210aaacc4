"""The attention operator on vLLM's own tensors: Relay beside vLLM's kernel, alternating in one run.

    ~/.cache/relay/vllm-0.32.0/bin/python plugins/vllm/bench/vllm_op.py --batch 8,32 --prefix 0,4096

One decode row per request, over `prefix` tokens that all share and `context` of its own. Each
attends its own copy of the KV, in its own layout, through as many layers as it takes to leave the
caches. Planning is done once per step, as in a model: a 16th of it is part of each one's time.
"""

import argparse
import json
import statistics
import time

import torch
from arguments import numbers
from relay_attention.cpu import native
from relay_attention.cpu.operator import Operator
from relay_attention.cpu.plan import Planner, Step
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

BLOCK = 128
LAYERS_PER_PLAN = 16  # of the 1B shape
CACHE_BYTES = 256 << 20  # KV that does not fit a cache


def block_table(batch: int, prefix: int, context: int) -> torch.Tensor:
    """int32 [batch, blocks]: whole shared blocks first, then blocks of each request's own."""
    shared = prefix // BLOCK
    own = -(-(prefix % BLOCK + context) // BLOCK)
    first = torch.arange(1, 1 + shared).expand(batch, shared)
    rest = 1 + shared + torch.arange(batch * own).reshape(batch, own)
    return torch.cat([first, rest], 1).to(torch.int32)


class Case:
    """One batch, over a few layers' KV caches."""

    def __init__(self, args: argparse.Namespace, batch: int, prefix: int, context: int) -> None:
        self.heads = (args.heads, args.kv_heads, args.head_dim)
        self.scale = args.head_dim**-0.5
        self.batch = batch
        dtype = getattr(torch, args.dtype)
        table = block_table(batch, prefix, context)
        blocks = int(table.max()) + 1
        layer_bytes = blocks * args.kv_heads * BLOCK * 2 * args.head_dim * dtype.itemsize
        self.layers = max(1, min(LAYERS_PER_PLAN, -(-CACHE_BYTES // layer_bytes)))
        self.query = torch.randn(batch, args.heads, args.head_dim).to(dtype)
        self.out = torch.empty_like(self.query)
        self.starts = torch.arange(batch + 1, dtype=torch.int32)
        self.lengths = torch.full((batch,), prefix + context, dtype=torch.int32)
        self.table = table
        self.isa = _get_attn_isa(dtype, BLOCK, args.head_dim)
        shape = (blocks, args.kv_heads, BLOCK, 2 * args.head_dim)
        slots = torch.arange(blocks * BLOCK)
        key = torch.randn(len(slots), args.kv_heads, args.head_dim).to(dtype)
        self.operators = [Operator(*self.heads, self.scale) for _ in range(self.layers)]
        self.relay_kv = [torch.zeros(shape, dtype=dtype) for _ in range(self.layers)]
        self.vllm_kv = [torch.zeros(shape, dtype=dtype) for _ in range(self.layers)]
        for operator, ours, theirs in zip(self.operators, self.relay_kv, self.vllm_kv, strict=True):
            operator.write(key, key, ours, slots)
            k, v = self._chunks(theirs)
            ops.cpu_attn_reshape_and_cache(key, key, k, v, slots, self.isa)
        self.planner = Planner()

    @staticmethod
    def _chunks(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, heads, size, _ = kv.shape
        return kv.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)

    def relay(self) -> float:
        """Seconds per layer."""
        begin = time.perf_counter()
        step = Step(self.starts, self.lengths, self.table)
        self.planner.plan(step, self.operators[0].shape)
        planned = time.perf_counter()
        for operator, kv in zip(self.operators, self.relay_kv, strict=True):
            operator.attend(self.query, kv, self.out, self.planner, step)
        end = time.perf_counter()
        return (planned - begin) / LAYERS_PER_PLAN + (end - planned) / self.layers

    def vllm(self) -> float:
        """Seconds per layer."""
        begin = time.perf_counter()
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.batch,
            num_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            head_dim=self.heads[2],
            seq_lens=self.lengths,
            dtype=self.query.dtype,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )
        planned = time.perf_counter()
        for kv in self.vllm_kv:
            k, v = self._chunks(kv)
            ops.cpu_attention_with_kv_cache(
                query=self.query,
                key_cache=k,
                value_cache=v,
                output=self.out,
                query_start_loc=self.starts,
                seq_lens=self.lengths,
                scale=self.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=self.table,
                softcap=0.0,
                scheduler_metadata=metadata,
                s_aux=None,
            )
        end = time.perf_counter()
        return (planned - begin) / LAYERS_PER_PLAN + (end - planned) / self.layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prefix", type=numbers, default=[0, 512, 4096, 16384])
    parser.add_argument("--context", type=numbers, default=[16, 512])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=9, help="of each, alternating")
    parser.add_argument("--json", help="write the results here too")
    args = parser.parse_args()
    current_platform.import_kernels()
    torch.manual_seed(0)

    print(f"{native.isa()} kernels, {torch.get_num_threads()} threads, {args.dtype}, us per layer")
    print("prefix context batch |     vLLM    Relay   ratio (of medians)")
    results = []
    for prefix in args.prefix:
        for context in args.context:
            for batch in args.batch:
                case = Case(args, batch, prefix, context)
                case.relay(), case.vllm()
                times = [(case.vllm(), case.relay()) for _ in range(args.rounds)]
                all_theirs, all_ours = zip(*times, strict=True)
                theirs, ours = statistics.median(all_theirs), statistics.median(all_ours)
                print(
                    f"{prefix:6} {context:7} {batch:5} | {theirs * 1e6:8.0f} {ours * 1e6:8.0f} "
                    f"{theirs / ours:7.2f}",
                    flush=True,
                )
                results.append(
                    dict(
                        prefix=prefix,
                        context=context,
                        batch=batch,
                        vllm_s=theirs,
                        relay_s=ours,
                        vllm_rounds_s=all_theirs,
                        relay_rounds_s=all_ours,
                    )
                )
    if args.json:
        with open(args.json, "w") as f:
            json.dump(dict(isa=native.isa(), dtype=args.dtype, cases=results), f, indent=1)


if __name__ == "__main__":
    main()
