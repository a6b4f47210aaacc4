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
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from arguments import numbers
from shapes import SHAPE, VOCABULARY, write_config
from turns import Comparison, Remote, in_turns


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
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        engines = []
        for relay in (False, True):  # the second starts when the first is there
            engine = Remote(relay, Engine, folder, args.dtype, context, **environment).ready()
            backend = engine.call("served_by")
            if ("Relay" in backend) != relay:
                sys.exit(f"vLLM uses {backend}: python -m relay_attention.doctor says why")
            engine.call("prefill", words(64))  # warms up
            engines.append(engine)
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
