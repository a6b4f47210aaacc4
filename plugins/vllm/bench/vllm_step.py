"""A whole vLLM, with Relay and without: how long prefill and decode steps take.

    ~/.cache/relay/vllm-0.32.0/bin/python plugins/vllm/bench/vllm_step.py --prefix 128,4096

Two engines stand side by side, each in a process of its own, over the same model with random
weights: one as it is, one with Relay. For each prefix both compute it once (prefill), then requests
that all begin with it, so that prefix caching holds it once. When all of a batch are decoding, the
engines take turns, a few steps at a time; the steps' medians are compared, turn by turn.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from arguments import numbers
from shapes import SHAPE, VOCABULARY, write_config


class Engine:
    """One vLLM in this process; its methods are what the other process asks for."""

    def __init__(self, model: str, dtype: str, tokens: int) -> None:
        from vllm import LLM

        self._llm = LLM(
            model,
            dtype=dtype,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=tokens,
            max_num_seqs=64,
            kv_cache_memory_bytes=self._kv_bytes(tokens, dtype),
            disable_log_stats=True,
        )
        self._engine = self._llm.llm_engine
        self._requests = 0

    @staticmethod
    def _kv_bytes(tokens: int, dtype: str) -> int:
        size = 4 if dtype == "float32" else 2
        per_token = 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"]
        return (tokens + 64 * 512) * per_token * SHAPE["head_dim"] * size

    def served_by(self) -> str:
        runner = self._engine.model_executor.driver_worker.model_runner
        return runner.attn_groups[0][0].backend.__name__

    def prefill(self, prompt: list[int]) -> float:
        """Seconds to the first token after `prompt`, which stays in the prefix cache."""
        begin = time.perf_counter()
        self._add(prompt, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - begin

    def start(self, prompts: list[list[int]], tokens: int) -> None:
        """Brings all `prompts` to where they decode; each is to answer `tokens` tokens."""
        waiting = {self._add(prompt, tokens) for prompt in prompts}
        while waiting:
            waiting -= {o.request_id for o in self._engine.step() if o.outputs[0].token_ids}

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` decode steps."""
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            outputs = self._engine.step()
            seconds.append(time.perf_counter() - begin)
            if any(o.finished for o in outputs):
                raise RuntimeError("a request ended while it was measured")
        return seconds

    def stop(self) -> None:
        self._engine.abort_request([str(i) for i in range(self._requests)], internal=False)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def planning(self) -> tuple[int, float]:
        """Plans that Relay has made, and the seconds that took."""
        runner = self._engine.model_executor.driver_worker.model_runner
        costs = [
            builder._planner.cost
            for groups in runner.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]
        return sum(c.plans for c in costs), sum(c.seconds for c in costs)

    def _add(self, prompt: list[int], tokens: int) -> str:
        from vllm import SamplingParams

        name = str(self._requests)
        self._requests += 1
        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        return name


def serve(connection: Connection, relay: bool, model: str, dtype: str, tokens: int) -> None:
    """A process with an engine: calls what it is asked to, until it is asked nothing more."""
    os.environ |= {
        "RELAY_DISABLE": "0" if relay else "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    engine = Engine(model, dtype, tokens)
    connection.send(engine.served_by())
    while (call := connection.recv()) is not None:
        name, arguments = call
        connection.send(getattr(engine, name)(*arguments))


class Remote:
    """An Engine in another process."""

    def __init__(self, relay: bool, *arguments: object) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=serve, args=(theirs, relay, *arguments))
        self._process.start()
        theirs.close()
        backend = self._connection.recv()
        if ("Relay" in backend) != relay:
            sys.exit(f"vLLM uses {backend}: python -m relay_attention.doctor says why")

    def call(self, name: str, *arguments: object) -> object:
        self._connection.send((name, arguments))
        try:
            return self._connection.recv()
        except EOFError:
            sys.exit("an engine died, see above")

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


@dataclass
class Comparison:
    """Seconds of one thing in each engine, measured in turns."""

    vllm: list[float]
    relay: list[float]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.vllm, self.relay, strict=True)]

    def __str__(self) -> str:
        vllm, relay = (1e3 * statistics.median(s) for s in (self.vllm, self.relay))
        ratios = self.ratios
        return (
            f"{vllm:10.1f} {relay:10.1f} {statistics.median(ratios):7.2f}x"
            f"  ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def in_turns(engines: list[Remote], rounds: int, name: str, *arguments: object) -> Comparison:
    """Both engines, one after the other, the first one changing from round to round."""
    found: list[list[float]] = [[], []]
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds = engines[i].call(name, *arguments)
            found[i].append(statistics.median(seconds) if isinstance(seconds, list) else seconds)
    return Comparison(*found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", type=numbers, default=[128, 4096], help="(128,4096)")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32, 64], help="(1,8,32,64)")
    parser.add_argument("--context", type=int, default=16, help="own tokens of a request (16)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each engine (7)")
    parser.add_argument("--steps", type=int, default=4, help="decode steps in a turn (4)")
    parser.add_argument("--json", help="write the results here too")
    args = parser.parse_args()

    multiprocessing.set_start_method("spawn")
    tokens = args.context + (args.rounds + 1) * args.steps + 8
    random.seed(0)

    def words(count: int) -> list[int]:
        return [random.randrange(3, VOCABULARY) for _ in range(count)]

    with tempfile.TemporaryDirectory() as folder:
        context = max(args.prefix) + tokens
        write_config(Path(folder), max_tokens=context + 1)
        engines = [Remote(relay, folder, args.dtype, context) for relay in (False, True)]
        for engine in engines:
            engine.call("prefill", words(64))  # warms up
        print(f"1B shape, {args.dtype}; milliseconds, medians of {args.rounds} turns")
        print("prefix  what        |       vLLM      Relay   ratio  (least to most)")
        results = []

        def report(prefix: int, what: str, found: Comparison, **more: object) -> None:
            note = f"  planning {100 * more['planning']:.2f} %" if "planning" in more else ""
            print(f"{prefix:6}  {what:11} | {found}{note}", flush=True)
            results.append(dict(prefix=prefix, what=what, **vars(found), **more))

        for prefix in args.prefix:
            shared = words(prefix)
            report(prefix, "prefill", in_turns(engines, 1, "prefill", shared))
            for batch in args.batch:
                prompts = [shared + words(args.context) for _ in range(batch)]
                for engine in engines:
                    engine.call("start", prompts, tokens)
                    engine.call("steps", args.steps)
                plans, seconds = engines[1].call("planning")
                found = in_turns(engines, args.rounds, "steps", args.steps)
                plans_then, seconds_then = engines[1].call("planning")
                planning = (seconds_then - seconds) / (plans_then - plans)
                report(
                    prefix,
                    f"decode {batch:4}",
                    found,
                    planning=planning / statistics.median(found.relay),
                )
                for engine in engines:
                    engine.call("stop")
        for engine in engines:
            engine.close()
    if args.json:
        Path(args.json).write_text(json.dumps(dict(vars(args), results=results), indent=1))


if __name__ == "__main__":
    main()
