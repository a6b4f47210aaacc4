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
        ready, prompt_there = {}, {}
        for name in ("computed", "restored"):
            log = Path(folder) / f"{name}.log"
            with relay_server(args, log, *options) as server:
                ready[name] = server.wait_ready(3600)
                deadline = time.monotonic() + 120
                while not list(cache.glob("*.kv")):
                    if time.monotonic() > deadline:
                        raise DemoError("the prompt was not stored\n" + server.log_tail())
                    time.sleep(0.1)
            text = log.read_text()
            pinned = re.search(r"pinned \S+: (\d+) tokens, \S+ MiB of KV, (\S+) s", text)
            back = re.search(r"restored \d+ tokens of prompts from \S+ in (\S+) s", text)
            prompt_there[name] = float(pinned[2]) + float(back[1])
            say(
                f"{name}: {pinned[1]} tokens, {prompt_there[name]:.2f} s; "
                f"ready {ready[name]:.1f} s after the start, with the model"
            )
        sooner = [each["computed"] / max(each["restored"], 0.01) for each in (prompt_there, ready)]
        say(
            f"the prompt is there {sooner[0]:.0f} times sooner than by prefill, and the server "
            f"ready {sooner[1]:.1f} times"
        )
        require(ready_ten_times_sooner=sooner[1] >= 10)
