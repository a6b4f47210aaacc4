"""A whole vLLM on a GPU, with Relay and without: how long a set of requests takes.

    python plugins/vllm/bench/cuda_throughput.py --shape llama-2-7b --cases 64x256,2048x256,8192x128

What `vllm bench throughput` measures, over many system prompts in one engine: all requests come at
once, and vLLM batches them as it can. A case is a system prompt's length and a number
of requests below it, whose own lengths and answers vary as in ShareGPT. The system prompt is
computed before. Each engine has a whole GPU; with --gpus 0,1 two run at the same time, and who runs
where changes from round to round.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from arguments import write_csv
from cuda_engine import ENVIRONMENT, Engine
from serving_requests import SHAREGPT_INPUT, SHAREGPT_OUTPUT, Workload, requests_below
from shapes import SHAPES, write_config
from turns import Remote

VARIANTS = {"no-caching": "no caching", "vllm": "vLLM", "relay": "Relay"}


@dataclass(frozen=True)
class Case:
    prompt: int  # tokens
    requests: int

    @staticmethod
    def parse(text: str) -> "Case":
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text} is no case: 2048x256 is one")
        return Case(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.prompt}x{self.requests}"

    def workload(self, seed: int) -> Workload:
        return requests_below(self.prompt, 1, self.requests, seed, SHAREGPT_INPUT, SHAREGPT_OUTPUT)


def measure(
    variant: str, gpu: str, folder: str, options: dict, cases: list[Case], turn: int
) -> list[dict]:
    """One engine over all cases."""
    options = options | {"enable_prefix_caching": variant != "no-caching"}
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": gpu}
    engine = Remote(variant == "relay", Engine, folder, options, **environment).ready()
    rows = []
    for case in cases:
        workload = case.workload(turn)
        for prefix in workload.prefixes:
            engine.call("answer", [prefix], 1)
        prompts = [r.prompt for r in workload.requests]
        answers = engine.call("answer", prompts, [r.output for r in workload.requests])
        rows.append(
            dict(
                variant=variant,
                turn=turn,
                prompt=case.prompt,
                requests=case.requests,
                seconds=answers.seconds,
                tokens_per_s=answers.tokens / answers.seconds,
                requests_per_s=case.requests / answers.seconds,
            )
        )
        print(
            f"  round {turn + 1}, GPU {gpu}, {VARIANTS[variant]}, {case}: "
            f"{answers.tokens / answers.seconds:.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
    engine.close()
    return rows


def report(cases: list[Case], variants: list[str], rows: list[dict]) -> None:
    print("case         | " + " ".join(f"{VARIANTS[v]:>22}" for v in variants) + "  Relay by each")
    for case in cases:
        found = {
            v: [
                r["tokens_per_s"]
                for r in rows
                if (r["variant"], r["prompt"], r["requests"]) == (v, case.prompt, case.requests)
            ]
            for v in variants
        }
        medians = {v: statistics.median(f) for v, f in found.items()}
        columns = " ".join(
            f"{medians[v]:8.0f} ({min(found[v]):.0f} to {max(found[v]):.0f})".rjust(22)
            for v in variants
        )
        gains = " ".join(
            f"{medians['relay'] / medians[v]:5.2f}x"
            for v in variants
            if v != "relay" and "relay" in medians
        )
        print(f"{case!s:12} | {columns}  {gains}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--cases", type=lambda t: [Case.parse(c) for c in t.split(",")])
    parser.add_argument(
        "--variants",
        type=lambda t: t.split(","),
        default=["vllm", "relay"],
        help=f"of {', '.join(VARIANTS)} (vllm,relay)",
    )
    parser.add_argument("--concurrency", type=int, default=256, help="requests in a batch (256)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--gpus", type=lambda t: t.split(","), default=["0"], help="indices (0)")
    parser.add_argument("--csv", type=Path, help="write every result here too")
    args = parser.parse_args()
    cases = args.cases or [Case(n, 256) for n in (64, 512, 2048)]
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"no variant is called {', '.join(unknown)}")

    multiprocessing.set_start_method("spawn")
    max_len = max(c.workload(0).longest for c in cases) + 8  # the same for every seed
    options = dict(
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max_len,
        max_num_seqs=args.concurrency,
    )
    free: Queue[str] = Queue()
    rows: list[dict] = []

    def job(turn: int, variant: str, folder: str) -> None:
        gpu = free.get()
        try:
            rows.extend(measure(variant, gpu, folder, options, cases, turn))
        finally:
            free.put(gpu)
        write_csv(args.csv, rows)

    print(
        f"{args.shape}, bf16; output tokens/s of all requests at once; own tokens "
        f"{SHAREGPT_INPUT:g}, answered {SHAREGPT_OUTPUT:g} in the mean; {args.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), max_len, SHAPES[args.shape])
        with ThreadPoolExecutor(len(args.gpus)) as pool:
            for turn in range(args.rounds):
                shift = turn % len(args.gpus)
                for gpu in args.gpus[shift:] + args.gpus[:shift]:
                    free.put(gpu)
                jobs = [pool.submit(job, turn, v, folder) for v in args.variants]
                for done in jobs:
                    done.result()
                while not free.empty():
                    free.get()
    report(cases, args.variants, rows)


if __name__ == "__main__":
    main()
