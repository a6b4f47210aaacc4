#!/usr/bin/env python3
"""Two figures of relay serve, each from one run on one machine.

  bench/serving.py restart -m model.gguf       a start that computes a pinned prompt, and one that
                                               finds it in the prompt cache
  bench/serving.py inter-token -m model.gguf   time between tokens of requests that decode, without
                                               and with a long prompt arriving among them

`relay synth llama-3.2-1b model.gguf --type q4_0` makes a model; relay serve gets what follows --.
"""

import argparse
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts/demo"))

from console import DemoError, say  # noqa: E402
from servers import Server, clean_environment, free_port  # noqa: E402
from users import Answer, ask  # noqa: E402


def relay_server(args, log: Path, *more: str) -> Server:
    command = [str(args.relay), "serve", "-m", str(args.model), "--port", str(free_port())]
    command += ["--drain-timeout", "0", *more, *args.more]
    return Server("relay serve", command, clean_environment(), log)


def words(tokens: int) -> str:
    """A text of about so many tokens: a short word and a number of three digits are two."""
    return " ".join(f"word {i % 900 + 100}" for i in range(tokens // 2))


def restart(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text(words(args.prompt_tokens))
        cache = Path(folder) / "cache"
        options = ["--pin-prompt", str(prompt), "--pin-budget", "0.9"]
        options += ["-c", str(2 * args.prompt_tokens), "--prompt-cache-dir", str(cache)]
        seconds = {}
        for name in ("computed", "restored"):
            log = Path(folder) / f"{name}.log"
            with relay_server(args, log, *options) as server:
                server.wait_ready(3600)
                deadline = time.monotonic() + 120
                while not list(cache.glob("*.kv")):
                    if time.monotonic() > deadline:
                        raise DemoError("the prompt was not stored\n" + server.log_tail())
                    time.sleep(0.1)
            text = log.read_text()
            pinned = re.search(r"pinned \S+: (\d+) tokens, \S+ MiB of KV, (\S+) s", text)
            back = re.search(r"restored \d+ tokens of prompts from \S+ in (\S+) s", text)
            seconds[name] = float(pinned[2]) + float(back[1])
            say(f"{name}: {pinned[1]} tokens, {seconds[name]:.2f} s")
        ratio = seconds["computed"] / max(seconds["restored"], 0.01)
        say(f"the prompt is there {ratio:.0f} times sooner than by prefill")


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def inter_token(args) -> None:
    def body(content: str, tokens: int) -> dict:
        return {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "logprobs": True,  # so that a token without a whole character is sent as well
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    with tempfile.TemporaryDirectory() as folder:
        cells = args.prompt_tokens + args.users * 4096 + 1024
        options = ["-c", str(cells), "--max-model-len", str(args.prompt_tokens + 1024)]
        with relay_server(args, Path(folder) / "serve.log", *options) as server:
            server.wait_ready(600)
            start = time.monotonic()
            answers = [Answer(user) for user in range(args.users)]
            for answer in answers:
                question = body(f"Question {answer.user}: {words(32)}", 4000)
                asked = (server, question, answer, start)
                threading.Thread(target=ask, args=asked, daemon=True).start()
            while any(len(answer.times) < 8 for answer in answers):
                server.check_alive()
                time.sleep(0.1)
            begin = time.monotonic() - start
            time.sleep(args.seconds)
            middle = time.monotonic() - start
            arriving = Answer(args.users)
            ask(server, body(words(args.prompt_tokens), 1), arriving, start)
            end = time.monotonic() - start
            for answer in [*answers, arriving]:
                if answer.error:
                    raise DemoError(f"user {answer.user}: {answer.error}")
            say(f"{arriving.prompt_tokens} tokens among {args.users}: {end - middle:.1f} s")

        def gaps(since: float, until: float) -> list[float]:
            result = []
            for answer in answers:
                times = [t for t in answer.times if since <= t <= until]
                result += [b - a for a, b in zip(times, times[1:], strict=False)]
            return result

        for name, share in (("p50", 0.5), ("p99", 0.99)):
            without = quantile(gaps(begin, middle), share)
            beside = quantile(gaps(middle, end), share)
            say(
                f"between tokens, {name}: {1000 * without:.0f} ms, beside the long prompt "
                f"{1000 * beside:.0f} ms: {beside / without:.2f}x"
            )


def main() -> None:
    own, more = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, more = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=["restart", "inter-token"])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--relay", type=Path, default=ROOT / "build/release/bin/relay")
    parser.add_argument("--prompt-tokens", type=int, help="default: 4096, and 6000 for inter-token")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30, help="of decoding alone")
    args = parser.parse_args(own)
    args.more = more
    args.prompt_tokens = args.prompt_tokens or (4096 if args.figure == "restart" else 6000)
    try:
        restart(args) if args.figure == "restart" else inter_token(args)
    except DemoError as error:
        sys.exit(f"serving: {error}")


if __name__ == "__main__":
    main()
