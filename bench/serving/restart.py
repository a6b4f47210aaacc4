"""A start that computes a pinned prompt, and one that finds it in the prompt cache."""

import re
import tempfile
import time
from pathlib import Path

from common import relay_server, require, words
from console import DemoError, say


def run(args) -> None:
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
        require(ten_times_sooner=ratio >= 10)
