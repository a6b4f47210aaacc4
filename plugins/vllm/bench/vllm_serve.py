"""vLLM's own benchmarks, with Relay and without: `vllm bench serve` and `vllm bench throughput`.

    ~/.cache/relay/vllm-0.32.0/bin/python plugins/vllm/bench/vllm_serve.py --rounds 2
    ~/.cache/relay/vllm-cuda-0.33.0/bin/python plugins/vllm/bench/vllm_serve.py --shape llama-2-7b \
        --variants no-caching,vllm,relay --concurrency 256 --no-offline \
        --cases 2048x1@2,2048x1@4,2048x1@8,2048x1@16 --bound 100

The requests begin with one system prompt, or with one of several, and go on with words of their
own; how many, and how many tokens they are answered, varies as in ShareGPT. Each system prompt is
computed once before a measurement begins. A case is a prompt's length, how many there are, and,
after @, how many requests arrive in a second, at random (Poisson); all at once without. --prefix,
--prefixes and --rates name cases as well: all combinations.
The model has random weights, its tokenizer knows one word per token. Rounds alternate between vLLM
as it is and vLLM with Relay (and vLLM without prefix caching); each starts a server of its own.
Reported are medians over the rounds. Each result is said, and written to --json, as soon as it is
there.
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from arguments import add_budget, numbers, rates
from serving_requests import SHAREGPT_INPUT, SHAREGPT_OUTPUT, Workload, requests_below
from shapes import SHAPES, VOCABULARY, write_config
from variants import VARIANTS, Variant, add_variants
from vllm.platforms import current_platform

VLLM = [sys.executable, str(Path(__file__).with_name("vllm_cli.py"))]
# What is reported: a name, the key in vLLM's result, and whether more is better.
PERCENTILES = (50, 95, 99)
SERVE = [
    ("output tokens/s", "output_throughput", True),
    *((f"time to first token, p{p} ms", f"p{p}_ttft_ms", False) for p in PERCENTILES),
    *((f"inter-token latency, p{p} ms", f"p{p}_itl_ms", False) for p in PERCENTILES),
    *((f"whole answer, p{p} ms a token", f"p{p}_normalised_ms", False) for p in PERCENTILES),
]
BOUNDED = "p95_normalised_ms"  # what --bound is about
THROUGHPUT = [
    ("requests/s", "requests_per_second", True),
    ("tokens/s, prompts too", "tokens_per_second", True),
]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Case:
    prefix: int  # tokens
    prefixes: int  # how many
    rate: float  # arrivals a second; inf: all at once

    @staticmethod
    def parse(text: str) -> "Case":
        found = re.fullmatch(r"(\d+)x(\d+)(?:@([\d.]+|inf))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text} is no case, see --help")
        return Case(int(found[1]), int(found[2]), float(found[3] or "inf"))


def cases_of(args: argparse.Namespace) -> list[Case]:
    return args.cases or [Case(args.prefix, p, r) for p in args.prefixes for r in args.rates]


def as_text(tokens: list[int]) -> str:
    return " ".join(f"w{t}" for t in tokens)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Special tokens are found inside of words too, so no word may begin like one. vLLM refuses a
    # text with more characters a token than its longest token has, so one is longer than a word.
    special = {"<unknown>": 0, "<s>": 1, "</s>": 2}
    words = special | {f"w{i}": i for i in range(len(special), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unknown>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


class Bench:
    """The model, written into `folder`, and vLLM's benchmarks of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        self._cases = cases_of(args)
        self._workloads = [self._workload(seed, c) for seed, c in enumerate(self._cases)]
        longest = [w.longest for w in self._workloads]
        longest.append(self._cases[0].prefix + 2 * int(args.input_mean + args.output_mean))
        max_tokens = max(longest) + 8
        write_config(folder, max_tokens, SHAPES[args.shape])
        write_tokenizer(folder)
        self._model = ["--dtype", args.dtype, "--load-format", "dummy"]
        if current_platform.is_cpu():
            self._model.append("--enforce-eager")
        self._model += ["--max-model-len", str(max_tokens)]
        self._model += ["--max-num-seqs", str(args.concurrency)]

    def _workload(self, seed: int, case: Case) -> Workload:
        a = self._args
        count = (
            a.requests if math.isinf(case.rate) else max(a.requests, round(case.rate * a.seconds))
        )
        return requests_below(case.prefix, case.prefixes, count, seed, a.input_mean, a.output_mean)

    def _model_of(self, variant: Variant) -> list[str]:
        return self._model + ([] if variant.caching else ["--no-enable-prefix-caching"])

    def _environment(self, variant: Variant) -> dict[str, str]:
        return os.environ | {
            "RELAY_DISABLE": "0" if variant.relay else "1",
            "VLLM_CPU_KVCACHE_SPACE": str(self._args.kv_gib),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def _dataset(self, workload: Workload) -> list[str]:
        file = self._folder / "requests.jsonl"
        with file.open("w") as out:
            for request in workload.requests:
                row = dict(prompt=as_text(request.prompt), output_tokens=request.output)
                out.write(json.dumps(row) + "\n")
        return [
            *("--dataset-name", "custom", "--dataset-path", str(file), "--skip-chat-template"),
            *("--num-prompts", str(len(workload.requests)), "--custom-output-len", "-1"),
            *("--disable-shuffle", "--no-oversample"),
        ]

    def _random(self, case: Case) -> list[str]:
        """For `throughput`, which takes no file of ours: lengths equally distributed around the
        means, below one system prompt."""
        return [
            *("--dataset-name", "random", "--num-prompts", str(self._args.requests)),
            *("--random-prefix-len", str(case.prefix), "--random-range-ratio", "0.9"),
            *("--random-input-len", str(int(self._args.input_mean))),
            *("--random-output-len", str(int(self._args.output_mean))),
        ]

    def _run(self, command: list[str], variant: Variant) -> None:
        done = subprocess.run(
            [*VLLM, *command],
            env=self._environment(variant),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"vllm {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")

    def serve(self, variant: Variant) -> Iterator[dict[str, float] | None]:
        """One server. Gives a result of `vllm bench serve` for each case, none where --bound says
        so, and ends early when the budget is spent."""
        address = ["--host", "127.0.0.1", "--port", str(self._args.port)]
        log = self._folder / "server.log"
        with log.open("w") as out:
            server = subprocess.Popen(
                [*VLLM, "serve", str(self._folder), *self._model_of(variant), *address],
                env=self._environment(variant),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_for(server, log)
            overloaded: dict[tuple[int, int], float] = {}  # the rate that broke the bound
            for case, workload in zip(self._cases, self._workloads, strict=True):
                name = f"{case.prefix}x{case.prefixes}@{case.rate}"
                if self._args.budget.spent:
                    say(f"  {name} and what follows: left out, the budget is spent")
                    return
                bound = None if math.isinf(case.rate) else self._args.bound
                broken = overloaded.get((case.prefix, case.prefixes), math.inf)
                if bound is not None and case.rate > broken:
                    say(f"  {name}: left out, a lower rate broke the bound")
                    yield None
                    continue
                self._compute(workload.prefixes)
                result = self._serve(variant, address, case, workload, log)
                if bound is not None and result[BOUNDED] > bound:
                    overloaded.setdefault((case.prefix, case.prefixes), case.rate)
                say(
                    f"  {name}: {result['output_throughput']:.0f} tokens/s, "
                    f"p50 of the first {result['p50_ttft_ms']:.0f} ms, "
                    f"p95 of a whole answer {result[BOUNDED]:.1f} ms a token"
                )
                yield result
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGINT)
                try:
                    server.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)

    def _compute(self, prompts: list[list[int]]) -> None:
        """Has the server compute these prompts, whose KV it then keeps."""
        for prompt in prompts:
            body = dict(model=str(self._folder), prompt=as_text(prompt), max_tokens=1)
            request = urllib.request.Request(
                f"http://127.0.0.1:{self._args.port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            urllib.request.urlopen(request, timeout=600).read()

    def _serve(
        self, variant: Variant, address: list[str], case: Case, workload: Workload, log: Path
    ) -> dict[str, float]:
        file = self._folder / "serve.json"
        self._run(
            [
                *("bench", "serve", "--model", str(self._folder), *address),
                *self._dataset(workload),
                *("--max-concurrency", str(self._args.concurrency), "--ignore-eos"),
                *("--request-rate", str(case.rate), "--percentile-metrics", "ttft,itl,e2el"),
                *("--metric-percentiles", ",".join(map(str, PERCENTILES))),
                *("--disable-tqdm", "--save-result", "--save-detailed"),
                *("--result-dir", str(file.parent), "--result-filename", file.name),
            ],
            variant,
        )
        result = json.loads(file.read_text())
        if result["completed"] != len(workload.requests):
            end = log.read_text()[-3000:]
            sys.exit(f"only {result['completed']} requests were answered:\n{end}")
        # Of each answer, its whole time by its tokens, as the vLLM paper has it.
        per_token = [
            1e3 * (first + sum(later)) / tokens
            for first, later, tokens in zip(
                result["ttfts"], result["itls"], result["output_lens"], strict=True
            )
        ]
        for p in PERCENTILES:
            result[f"p{p}_normalised_ms"] = float(numpy.percentile(per_token, p))
        return {k: v for k, v in result.items() if not isinstance(v, list)}

    def _wait_for(self, server: subprocess.Popen, log: Path) -> None:
        for _ in range(300):
            if server.poll() is not None:
                sys.exit(f"vllm serve ended:\n{log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._args.port}/health", timeout=1)
                return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(1)
        sys.exit("vllm serve does not answer after 5 minutes")

    def throughput(self, variant: Variant) -> dict[str, float]:
        file = self._folder / "throughput.json"
        model = ["--model", str(self._folder), *self._model_of(variant), "--output-json", str(file)]
        self._run(
            [
                "bench",
                "throughput",
                *model,
                *self._random(self._cases[0]),
            ],
            variant,
        )
        return json.loads(file.read_text())


def results_of(case: int, runs: list[list]) -> list:
    """Those of one case, of all rounds; a round that the budget ended may have none."""
    return [run[case] for run in runs if len(run) > case]


def report(what: str, rows: list[tuple[str, str, bool]], found: dict[Variant, list]) -> None:
    """A table of medians; the last column is what Relay gains over vLLM, where both were tried."""
    alone, relay = VARIANTS["vllm"], VARIANTS["relay"]
    for name, key, more_is_better in rows:
        medians = {
            v: statistics.median(r[key] for r in results)
            for v, results in found.items()
            if results and None not in results
        }
        gain = ""
        if alone in medians and relay in medians:
            ratio = medians[relay] / medians[alone]
            gain = f"{ratio if more_is_better else 1 / ratio:6.2f}x"
        columns = " ".join(f"{medians[v]:10.2f}" if v in medians else f"{'-':>10}" for v in found)
        print(f"{what:28} {name:30} | {columns} {gain}", flush=True)


def report_bound(bound: float, cases: list[Case], served: dict[Variant, list]) -> None:
    """The highest of the tried rates that every round held below the bound."""
    for prompt in sorted({(c.prefix, c.prefixes) for c in cases if not math.isinf(c.rate)}):
        held = []
        for runs in served.values():
            rates = [
                case.rate
                for i, case in enumerate(cases)
                if (case.prefix, case.prefixes) == prompt
                and not math.isinf(case.rate)
                and (of_case := results_of(i, runs))
                and all(r is not None and r[BOUNDED] <= bound for r in of_case)
            ]
            held.append(f"{max(rates, default=0):10g}")
        what = f"serve, {prompt[0]} x {prompt[1]}"
        print(f"{what:28} {f'requests/s, p95 <= {bound:g} ms a token':30} | {' '.join(held)}")


def write_json(path: str | None, served: dict, offline: dict) -> None:
    """All results so far, so that a run that is ended early leaves what it has."""
    if path:
        results = {v.name: dict(serve=served[v], throughput=offline[v]) for v in served}
        unfinished = Path(path + ".unfinished")
        unfinished.write_text(json.dumps(results, indent=1))
        unfinished.replace(path)


def main() -> None:
    # So that the server ends with this: it has a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-1b", choices=SHAPES)
    parser.add_argument("--rates", type=rates, default=[math.inf], help="requests a second (inf)")
    parser.add_argument("--cases", type=lambda t: [Case.parse(c) for c in t.split(",")])
    add_variants(parser)
    parser.add_argument("--no-offline", action="store_true", help="no `vllm bench throughput`")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens of a prefix (2048)")
    parser.add_argument("--prefixes", type=numbers, default=[1, 4], help="how many (1,4)")
    parser.add_argument(
        "--input-mean", type=float, default=SHAREGPT_INPUT, help="own tokens of a request"
    )
    parser.add_argument(
        "--output-mean", type=float, default=SHAREGPT_OUTPUT, help="tokens answered"
    )
    parser.add_argument("--requests", type=int, default=32, help="of a case, at least (32)")
    parser.add_argument("--seconds", type=float, default=30, help="for which requests arrive (30)")
    parser.add_argument(
        "--bound",
        type=float,
        help="ms a token of a whole answer, p95: no higher rate is tried once it is broken; not of "
        "all at once",
    )
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kv-gib", type=int, default=2, help="size of the KV cache on CPUs (2)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--port", type=int, default=18765)
    add_budget(parser)
    parser.add_argument("--json", help="write vLLM's results here too")
    args = parser.parse_args()

    variants = args.variants
    served: dict[Variant, list] = {v: [] for v in variants}
    offline: dict[Variant, list] = {v: [] for v in variants}
    try:
        with tempfile.TemporaryDirectory() as name:
            bench = Bench(args, Path(name))
            for turn in range(args.rounds):
                for variant in variants if turn % 2 == 0 else reversed(variants):
                    if args.budget.spent:
                        say("the budget is spent")
                        return
                    say(f"round {turn + 1} of {args.rounds}: {variant.name} ...")
                    served[variant].append([])
                    for result in bench.serve(variant):
                        served[variant][-1].append(result)
                        write_json(args.json, served, offline)
                    if not args.no_offline:
                        offline[variant].append(bench.throughput(variant))
                        write_json(args.json, served, offline)
    finally:
        report_all(args, served, offline)


def report_all(args: argparse.Namespace, served: dict, offline: dict) -> None:
    print(
        f"{args.shape}, {args.dtype}; own tokens {args.input_mean:g}, answered "
        f"{args.output_mean:g} in the mean"
    )
    print(f"{'':59} | {' '.join(f'{v.name:>10}' for v in served)}  ratio")
    for i, case in enumerate(cases_of(args)):
        results = {variant: results_of(i, runs) for variant, runs in served.items()}
        report(f"serve, {case.prefix} x {case.prefixes}, {case.rate:g}/s", SERVE, results)
    if args.bound is not None:
        report_bound(args.bound, cases_of(args), served)
    if not args.no_offline:
        report("throughput, the first case", THROUGHPUT, offline)


if __name__ == "__main__":
    main()
