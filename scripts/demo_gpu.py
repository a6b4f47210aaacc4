"""vLLM on a GPU, with Relay and without: many requests over one long text.

Run by scripts/demo_gpu.sh in the environment that it sets up. Two engines stand side by side on one
GPU and answer the same requests in turns: all begin with the same real text, and each goes on with
words of its own. Ends with one table; results go to build/demo-gpu/: results.json and demo.png.

The model has random weights in the shape of Llama 3 8B, and each word of the text is a token. With
RELAY_DEMO_MODEL it is yours (a folder as vLLM takes it), and so is the tokenizer.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "plugins/vllm/bench"))

from cuda_engine import ENVIRONMENT, Engine  # noqa: E402
from shapes import SHAPES, VOCABULARY, write_config  # noqa: E402
from turns import Comparison, Remote, in_turns  # noqa: E402

TEXTS = ["/usr/share/common-licenses/GPL-3", str(ROOT / "LICENSE")]
OWN = 32  # tokens of a request's own


def read_text(args: argparse.Namespace) -> tuple[str, str]:
    """Where the text is from, and the text."""
    for path in [args.text] if args.text else TEXTS:
        if Path(path).is_file():
            return path, Path(path).read_text(errors="replace")
    sys.exit(f"demo-gpu: no text at {args.text or ' or '.join(TEXTS)}; name one with --text")


def tokenize(text: str, model: str | None) -> list[int]:
    if model is not None:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model).encode(text)
    numbers: dict[str, int] = {}
    words = re.findall(r"\w+|[^\w\s]", text)
    return [3 + numbers.setdefault(word, len(numbers)) % (VOCABULARY - 3) for word in words]


def plot(rows: list[dict], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (step, kv) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    users = [r["users"] for r in rows]
    for axis, what, label in (
        (step, "step_ms", "decode step (ms)"),
        (kv, "kv_gb", "KV read a step (GB)"),
    ):
        for who, colour in (("vllm", "#9aa5b1"), ("relay", "#2f6fde")):
            name = "vLLM" if who == "vllm" else "vLLM with Relay"
            axis.plot(users, [r[f"{who}_{what}"] for r in rows], "o-", color=colour, label=name)
        axis.set_xlabel("requests at once")
        axis.set_title(label, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.set_xticks(users)
        axis.spines[["top", "right"]].set_visible(False)
    step.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


HEAD = (
    "requests | decode step, ms       ratio | tokens/s        | first token, ms | "
    "KV read a step, GB"
)


def line(row: dict) -> str:
    return (
        f"{row['users']:8}"
        f" | {row['vllm_step_ms']:8.2f} {row['relay_step_ms']:8.2f} {row['ratio']:9.2f}x"
        f" | {row['vllm_tokens_per_s']:7.0f} {row['relay_tokens_per_s']:7.0f}"
        f" | {row['vllm_first_token_ms']:7.1f} {row['relay_first_token_ms']:7.1f}"
        f" | {row['vllm_kv_gb']:8.2f} {row['relay_kv_gb']:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="a text file (the GPL, or this repository's licence)")
    parser.add_argument("--prompt-tokens", type=int, default=6144, help="cut the text here (6144)")
    parser.add_argument("--users", default="1,8,32,64", help="requests at once (1,8,32,64)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (64)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine (3)")
    args = parser.parse_args()

    multiprocessing.set_start_method("spawn")
    model = os.environ.get("RELAY_DEMO_MODEL")
    source, text = read_text(args)
    prompt = tokenize(text, model)[: args.prompt_tokens]
    users = [int(n) for n in args.users.split(",")]
    source_of_words = random.Random(1)
    largest = max(users)
    requests = [prompt + source_of_words.choices(prompt, k=OWN) for _ in range(largest)]
    out = ROOT / "build/demo-gpu"
    out.mkdir(parents=True, exist_ok=True)
    gpu = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.splitlines()[0]
    options = dict(
        max_model_len=len(prompt) + OWN + args.tokens + 64,
        max_num_seqs=largest,
        gpu_memory_utilization=0.45,
        skip_tokenizer_init=True,
        compilation_config=dict(cudagraph_capture_sizes=users),
    )
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            options["load_format"] = "dummy"
            write_config(Path(folder), options["max_model_len"], SHAPES["llama-3-8b"])
        engines = []
        for relay in (False, True):  # one after the other: each looks how much memory is free
            print(f"demo-gpu: starting vLLM {'with' if relay else 'without'} Relay", flush=True)
            engines.append(Remote(relay, Engine, model or folder, options, **ENVIRONMENT).ready())
        vllm, relay = engines
        slot_bytes = relay.call("kv_bytes_of_a_slot")
        for engine in engines:
            engine.call("answer", requests, 2)  # computes the text, warms up
        print(f"demo-gpu: {HEAD}", flush=True)
        rows = []
        for count in users:
            asked = requests[:count]
            relay.call("watch_kv_slots", count)
            steps: Comparison = in_turns(engines, args.rounds, "step", asked, args.tokens)
            # None: left to vLLM's own kernel, so nothing is shared.
            nothing_shared = sum(len(p) for p in asked) * slot_bytes
            read, attended = relay.call("kv_bytes") or (nothing_shared, nothing_shared)
            whole: list[list] = [[], []]
            for turn in range(args.rounds):
                for i in (0, 1) if turn % 2 == 0 else (1, 0):
                    whole[i].append(engines[i].call("answer", asked, args.tokens))
            row = dict(users=count, ratio=statistics.median(steps.ratios))
            for who, seconds, answers, kv_bytes in (
                ("vllm", steps.vllm, whole[0], attended),
                ("relay", steps.relay, whole[1], read),
            ):
                first = [f for a in answers for f in a.first]
                row |= {
                    f"{who}_step_ms": 1e3 * statistics.median(seconds),
                    f"{who}_tokens_per_s": statistics.median(a.tokens / a.seconds for a in answers),
                    f"{who}_first_token_ms": 1e3 * statistics.median(first),
                    f"{who}_kv_gb": kv_bytes / 1e9,
                }
            rows.append(row)
            print(f"demo-gpu: {line(row)}", flush=True)  # at once: the table comes last
            results = dict(
                model=model, source=source, prompt_tokens=len(prompt), gpu=gpu, rows=rows
            )
            (out / "results.json").write_text(json.dumps(results, indent=1))
        for engine in engines:
            engine.close()

    title = (
        f"{model or 'Llama 3 8B shape, random weights'}; {len(prompt)} tokens of {source}; {gpu}"
    )
    print(f"\n{title}; medians of {args.rounds} turns; vLLM, and vLLM with Relay\n")
    print("\n".join([HEAD, *map(line, rows)]))
    plot(rows, title, out / "demo.png")
    print(f"\nplot and numbers: {out}")


if __name__ == "__main__":
    main()
