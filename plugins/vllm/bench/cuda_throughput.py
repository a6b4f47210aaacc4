"""A whole vLLM on a GPU, with Relay and without: how long a set of requests takes.

    python plugins/vllm/bench/cuda_throughput.py --shape llama-2-7b --cases 64x256,2048x256,8192x96
    python plugins/vllm/bench/cuda_throughput.py --shape llama-3-8b --cases n4x8192x16

What `vllm bench throughput` measures, over many system prompts in one engine: all requests come at
once, and vLLM batches them as it can. Each result is said as soon as it is there. Cases, the most
wanted first, with commas between:
    2048x256      256 requests below a system prompt of 2048 tokens, which is computed before; their
                  own lengths and answers vary as in ShareGPT
    n4x8192x16    16 samples (n=16) of 512 tokens of each of 4 prompts of 8192 tokens, as rollouts
                  in reinforcement learning; computing the prompts is part of it

The variant without prefix caching is the same engine as vLLM: its requests do not read the cache,
so each computes its prompt and keeps that KV for itself. An engine has a whole GPU; with
--gpus 0,1 two run at the same time, and who runs where changes from round to round.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Lock

from arguments import Budget, add_budget, write_csv
from cuda_engine import ENVIRONMENT, Engine
from serving_requests import SHAREGPT_INPUT, SHAREGPT_OUTPUT, requests_below
from shapes import SHAPES, write_config
from turns import Remote
from variants import Variant, add_variants

SAMPLED = 512  # tokens of a sample


@dataclass(frozen=True)
class Work:
    computed: list[list[int]]  # prompts whose KV is there before
    prompts: list[list[int]]
    tokens: list[int]  # to answer


@dataclass(frozen=True)
class Case:
    prompts: int
    tokens: int  # of each prompt
    requests: int  # below one prompt, or samples of it
    sampled: bool

    @staticmethod
    def parse(text: str) -> "Case":
        found = re.fullmatch(r"(?:n(?P<prompts>\d+)x)?(?P<tokens>\d+)x(?P<requests>\d+)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text} is no case, see --help")
        sampled = found["prompts"] is not None
        return Case(
            int(found["prompts"] or 1), int(found["tokens"]), int(found["requests"]), sampled
        )

    def __str__(self) -> str:
        return f"{f'n{self.prompts}x' if self.sampled else ''}{self.tokens}x{self.requests}"

    def work(self, seed: int) -> Work:
        """Only texts depend on the seed, not lengths."""
        count = self.prompts if self.sampled else self.requests
        made = requests_below(
            self.tokens, self.prompts, count, seed, SHAREGPT_INPUT, SHAREGPT_OUTPUT
        )
        if self.sampled:
            return Work([], made.prefixes, [SAMPLED] * self.prompts)
        return Work(
            made.prefixes, [r.prompt for r in made.requests], [r.output for r in made.requests]
        )

    @property
    def longest(self) -> int:
        work = self.work(0)
        return max(len(p) + t for p, t in zip(work.prompts, work.tokens, strict=True))


class Results:
    """What was measured, written and said as soon as it is there."""

    def __init__(self, csv: Path | None) -> None:
        self._csv = csv
        self._lock = Lock()
        self.rows: list[dict] = []

    def add(self, row: dict, told: str) -> None:
        with self._lock:
            self.rows.append(row)
            write_csv(self._csv, self.rows)
            print(f"  {told}", file=sys.stderr, flush=True)


def measure(
    engine: Remote,
    where: str,
    turn: int,
    variants: list[Variant],
    cases: list[Case],
    most_seconds: float,
    budget: Budget,
    results: Results,
) -> None:
    """One engine over all cases, in each of the variants that it can be."""
    for case, variant in itertools.product(cases, variants):
        told = f"round {turn + 1}, {where}, {variant.name}, {case}"
        if budget.spent:
            print(f"  {told}: left out, the budget is spent", file=sys.stderr, flush=True)
            continue
        work = case.work(turn)
        engine.call("forget")
        if variant.caching:
            for prompt in work.computed:
                engine.call("answer", [prompt], 1)
        samples = case.requests if case.sampled else 1
        asked = len(work.prompts) * samples
        found = engine.call(
            "answer", work.prompts, work.tokens, samples, most_seconds, variant.caching
        )
        answered = asked - found.unfinished
        row = dict(
            variant=variant.key,
            case=str(case),
            turn=turn,
            prompt=case.tokens,
            requests=asked,
            answered=answered,
            cached_tokens=found.cached,
            seconds=found.seconds,
            tokens_per_s=found.tokens / found.seconds,
            requests_per_s=answered / found.seconds,
        )
        stopped = f", stopped when {answered} of {asked} were answered" if found.unfinished else ""
        told += f": {row['tokens_per_s']:.0f} tokens/s in {found.seconds:.1f} s{stopped}"
        results.add(row, told)


def report(cases: list[Case], variants: list[Variant], rows: list[dict]) -> None:
    """Medians, and what Relay gains."""
    print("case         | " + " ".join(f"{v.name:>22}" for v in variants) + "  Relay by each")
    for case in cases:
        columns, medians = [], {}
        for variant in variants:
            of_case = [r for r in rows if (r["variant"], r["case"]) == (variant.key, str(case))]
            if not of_case:
                columns.append("-")
                continue
            rates = [r["tokens_per_s"] for r in of_case]
            medians[variant.key] = statistics.median(rates)
            stopped = "*" if any(r["answered"] < r["requests"] for r in of_case) else ""
            columns.append(
                f"{medians[variant.key]:.0f}{stopped} ({min(rates):.0f} to {max(rates):.0f})"
            )
        gains = " ".join(
            f"{medians['relay'] / medians[v.key]:5.2f}x"
            for v in variants
            if not v.relay and v.key in medians and "relay" in medians
        )
        print(f"{case!s:12} | {' '.join(c.rjust(22) for c in columns)}  {gains}")
    if any(r["answered"] < r["requests"] for r in rows):
        print("* stopped early; the last requests run in small batches, with fewer tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--cases", type=lambda t: [Case.parse(c) for c in t.split(",")])
    add_variants(parser)
    parser.add_argument("--concurrency", type=int, default=256, help="requests in a batch (256)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--gpus",
        type=lambda t: t.split(","),
        default=os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[:1],
        help="indices (the first that CUDA_VISIBLE_DEVICES names, or 0)",
    )
    parser.add_argument(
        "--most-seconds",
        type=float,
        default=float("inf"),
        help="of a set of requests: then it is stopped, and its tokens/s are those until then",
    )
    add_budget(parser)
    parser.add_argument("--csv", type=Path, help="write every result here too")
    args = parser.parse_args()
    cases = args.cases or [Case.parse(f"{n}x256") for n in (64, 512, 2048)]

    multiprocessing.set_start_method("spawn")
    max_len = max(c.longest for c in cases) + 8
    options = dict(
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max_len,
        max_num_seqs=args.concurrency,
    )
    free: Queue[str] = Queue()
    results = Results(args.csv)
    # In the order of --variants.
    kinds = dict.fromkeys(v.relay for v in args.variants)
    engines = [[v for v in args.variants if v.relay == kind] for kind in kinds]

    def job(turn: int, variants: list[Variant], folder: str) -> None:
        if args.budget.spent:
            return
        gpu = free.get()
        try:
            environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": gpu}
            engine = Remote(variants[0].relay, Engine, folder, options, **environment).ready()
            measure(
                engine,
                f"GPU {gpu}",
                turn,
                variants,
                cases,
                args.most_seconds,
                args.budget,
                results,
            )
            engine.close()
        finally:
            free.put(gpu)

    print(
        f"{args.shape}, bf16; output tokens/s of all requests at once; own tokens "
        f"{SHAREGPT_INPUT:g}, answered {SHAREGPT_OUTPUT:g} in the mean; {args.rounds} rounds",
        flush=True,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), max_len, SHAPES[args.shape])
            with ThreadPoolExecutor(len(args.gpus)) as pool:
                for turn in range(args.rounds):
                    shift = turn % len(args.gpus)
                    for gpu in args.gpus[shift:] + args.gpus[:shift]:
                        free.put(gpu)
                    jobs = [pool.submit(job, turn, v, folder) for v in engines]
                    for done in jobs:
                        done.result()
                    while not free.empty():
                        free.get()
    finally:
        report(cases, args.variants, results.rows)


if __name__ == "__main__":
    main()
