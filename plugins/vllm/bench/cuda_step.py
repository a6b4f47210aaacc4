"""A whole vLLM on a GPU, with Relay and without: how long decode steps take.

    python plugins/vllm/bench/cuda_step.py --shape llama-2-7b --cases 16384x32,4096x32,0x1

Two engines stand side by side on one GPU, each in a process of its own, over the same model with
random weights: one as it is, one with Relay; both with vLLM's defaults (CUDA graphs, asynchronous
scheduling). They take turns. A turn is two calls of generate(), whose numbers of tokens differ by
--steps: what the longer one takes more is that many decode steps.

Cases, several with commas between:
    16384x32        32 requests over one prompt of 16384 tokens
    4x4096x16       4 prompts of 4096 tokens, 16 requests over each
    4096+8x2048x8   one prompt of 4096 tokens; under it 8 of 2048, 8 requests over each
    4096x32+32      32 requests over one prompt of 4096 tokens, 32 that share nothing, as long
    n4x8192x16      4 prompts of 8192 tokens, 16 samples of each (n=16)
"""

import argparse
import multiprocessing
import random
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from arguments import add_budget, numbers, write_csv
from cuda_engine import ENVIRONMENT, OWN_ALLREDUCE, OWN_ALLREDUCE_PASSES, Engine
from shapes import SHAPES, VOCABULARY, write_config
from turns import Comparison, Remote, in_turns

OWN = 16  # tokens of a request's own


@dataclass(frozen=True)
class Case:
    """`prompts` of `tokens` tokens each below one of `root`, with `requests` over each of them, and
    `alone` requests that share nothing. sampled: a prompt's requests are one request's samples."""

    root: int
    prompts: int
    tokens: int
    requests: int
    alone: int = 0
    sampled: bool = False

    @staticmethod
    def parse(text: str) -> "Case":
        found = re.fullmatch(
            r"(?:(?P<root>\d+)\+)?(?P<sampled>n?)(?:(?P<prompts>\d+)x)?(?P<tokens>\d+)x(?P<requests>\d+)"
            r"(?:\+(?P<alone>\d+))?",
            text,
        )
        if found is None:
            raise argparse.ArgumentTypeError(f"{text} is no case, see --help")
        return Case(
            int(found["root"] or 0),
            int(found["prompts"] or 1),
            int(found["tokens"]),
            int(found["requests"]),
            int(found["alone"] or 0),
            bool(found["sampled"]),
        )

    @property
    def batch(self) -> int:
        return self.prompts * self.requests + self.alone

    @property
    def longest(self) -> int:
        return self.root + self.tokens + OWN

    def kv_tokens(self, generated: int) -> int:
        """Tokens that the KV cache has to hold."""
        shared = self.root + self.prompts * self.tokens
        return shared + self.alone * self.longest + self.batch * (OWN + generated + 32)

    def make(self, seed: int) -> list[list[int]]:
        """The requests' prompts; the same seed gives the same."""
        r = random.Random(f"{self} {seed}")
        shared = random.Random(f"{self}")

        def words(count: int, source: random.Random) -> list[int]:
            return [source.randrange(3, VOCABULARY) for _ in range(count)]

        root = words(self.root, shared)
        made = []
        for _ in range(self.prompts):
            prompt = root + words(self.tokens, shared)
            if self.sampled:
                made.append(prompt + words(OWN, r))
            else:
                made += [prompt + words(OWN, r) for _ in range(self.requests)]
        return made + [words(self.longest, shared) for _ in range(self.alone)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=["16384x32", "4096x32", "0x1"]
    )
    parser.add_argument("--steps", type=int, default=48, help="decode steps in a turn (48)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine (3)")
    parser.add_argument("--sizes", type=numbers, help="sizes of CUDA graphs (those of the cases)")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument(
        "--own-allreduce",
        action="store_true",
        help="all-reduce by vLLM's own kernels; FlashInfer's, its default, compile for minutes",
    )
    parser.add_argument("--kv-cache-dtype", default="auto")
    add_budget(parser)
    parser.add_argument("--csv", type=Path, help="write every turn here too")
    args = parser.parse_args()

    multiprocessing.set_start_method("spawn")
    cases = {text: Case.parse(text) for text in args.cases}
    shape = SHAPES[args.shape]
    generated = 8 + args.steps
    max_len = max(c.longest for c in cases.values()) + generated + 16
    per_token = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    # Each case has prompts of its own, so the cache may forget the last one's.
    kv_tokens = max(c.kv_tokens(generated) for c in cases.values())
    kv_bytes = kv_tokens * per_token // args.tensor_parallel + (512 << 20)
    sizes = args.sizes or sorted({c.batch for c in cases.values()})
    compilation: dict = dict(cudagraph_capture_sizes=sizes)
    environment = ENVIRONMENT
    if args.own_allreduce:
        environment = ENVIRONMENT | OWN_ALLREDUCE
        compilation["pass_config"] = OWN_ALLREDUCE_PASSES
    options = dict(
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max_len,
        max_num_seqs=max(sizes),
        kv_cache_memory_bytes=kv_bytes,
        gpu_memory_utilization=0.45,
        compilation_config=compilation,
        tensor_parallel_size=args.tensor_parallel,
        kv_cache_dtype=args.kv_cache_dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), max_len, shape)
        engines = [Remote(relay, Engine, folder, options, **environment) for relay in (False, True)]
        for engine in engines:
            engine.ready()
        print(f"{args.shape}; milliseconds a step, medians of {args.rounds} turns of {args.steps}")
        print(
            "case               |       vLLM      Relay   ratio  (least to most)   KV slots read",
            flush=True,
        )
        rows = []
        for text, case in cases.items():
            if args.budget.spent:
                print(f"{text:18} | left out, the budget is spent", flush=True)
                continue
            prompts, samples = case.make(1), case.requests if case.sampled else 1
            for engine in engines:
                engine.call("answer", prompts, 2, samples)  # computes the prompts, warms up
            engines[1].call("watch_kv_slots", case.batch)
            found: Comparison = in_turns(engines, args.rounds, "step", prompts, args.steps, samples)
            slots = engines[1].call("kv_slots")
            read, attended = slots or ("", "")
            note = f"{read} of {attended}" if slots else "left to vLLM's own kernel"
            print(f"{text:18} | {found}   {note}", flush=True)
            rows += [
                dict(
                    shape=args.shape,
                    case=text,
                    turn=turn,
                    vllm_ms=1e3 * found.vllm[turn],
                    relay_ms=1e3 * found.relay[turn],
                    ratio=statistics.median(found.ratios),
                    kv_read=read,
                    kv_attended=attended,
                )
                for turn in range(args.rounds)
            ]
            write_csv(args.csv, rows)
        for engine in engines:
            engine.close()


if __name__ == "__main__":
    main()
