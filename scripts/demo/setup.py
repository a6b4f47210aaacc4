"""What both servers are given: model, prompt, and their command lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from console import DemoError, Ticker, say
from servers import Server, clean_environment, free_port
from users import chat_body

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT_CANDIDATES = ["/usr/share/common-licenses/GPL-3", str(ROOT / "LICENSE")]


@dataclass
class Setup:
    """What the two servers have in common."""

    model: Path
    prompt_file: Path
    prompt: str
    prompt_tokens: int
    users: int
    rounds: int
    tokens: int
    build: Path
    out: Path
    kv_bytes_per_token: int = 0

    def slot_tokens(self) -> int:
        """One request: the prompt, the template around it, the question, the answer."""
        return self.prompt_tokens + 256 + self.tokens

    def bodies(self, round_number: int) -> list[dict]:
        return [
            chat_body(self.prompt, user, round_number, self.tokens) for user in range(self.users)
        ]


def make_model(args: argparse.Namespace, build: Path, out: Path) -> Path:
    if args.model:
        model = Path(args.model)
        if not model.is_file():
            raise DemoError(f"RELAY_DEMO_MODEL: there is no file {model}")
        say(f"model: {model}")
        return model
    # Its size is part of the name, so that a change of either makes a new file.
    model = out / "llama-3.2-1b-ffn5632-q4_0-seed1.gguf"
    if model.is_file():
        say(f"model: {model} (made earlier)")
        return model
    say("model: a 1B Llama in Q4_0 with random weights (relay synth)")
    command = [str(build / "bin/relay"), "synth", "llama-3.2-1b", str(model)]
    command += ["--ffn", "5632", "--type", "q4_0", "--seed", "1"]
    if subprocess.run(command, env=clean_environment()).returncode != 0:
        raise DemoError("relay synth failed, see above")
    return model


def llama_server(setup: Setup, flash: str, slots: int, *more: str) -> Server:
    command = [str(setup.build / "bin/llama-server"), "-m", str(setup.model)]
    command += ["--host", "127.0.0.1", "--port", str(free_port()), "-np", str(slots)]
    command += ["-c", str(slots * setup.slot_tokens()), "-fa", flash, "--no-webui"]
    # A cache for each slot: in a unified one, every row's attention walks over the cells of all
    # slots. The copies of idle slots in host memory would only cost time here.
    command += ["--no-kv-unified", "--cache-ram", "0"]
    command += more
    log = setup.out / f"llama-server-fa-{flash}-{slots}.log"
    return Server("llama-server", command, clean_environment(), log)


def relay_server(setup: Setup, sharing: str) -> Server:
    own = 256 + setup.tokens
    cells = setup.prompt_tokens + 256 + setup.users * own
    command = [str(setup.build / "bin/relay"), "serve", "-m", str(setup.model)]
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    command += ["--parallel", str(setup.users)]
    command += ["-c", str(cells), "--max-model-len", str(setup.slot_tokens())]
    command += ["--pin-prompt", str(setup.prompt_file), "--pin-budget", "1.0"]
    log = setup.out / f"relay-serve-sharing-{sharing}.log"
    return Server("relay serve", command, clean_environment(RELAY_SHARING=sharing), log)


def cut_prompt(server: Server, text: str, wanted: int) -> tuple[str, int]:
    """The longest beginning of `text`, in whole lines, of at most `wanted` tokens of the model."""

    def count(candidate: str) -> int:
        return len(server.json("POST", "/tokenize", {"content": candidate})["tokens"])

    lines = text.splitlines(keepends=True)
    total = count(text)
    if total <= wanted:
        return text, total
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        if count("".join(lines[:middle])) <= wanted:
            low = middle
        else:
            high = middle
    prompt = "".join(lines[:low])
    return prompt, count(prompt)


def look_up(setup: Setup, text: str, wanted: int) -> None:
    """What only a look into the model tells: the prompt's tokens, and the KV bytes of one."""
    log_model_details = ("-lv", "4")
    with llama_server(setup, "auto", 1, *log_model_details) as server:
        server.wait_ready(300)
        setup.prompt, setup.prompt_tokens = cut_prompt(server, text, wanted)
        setup.kv_bytes_per_token = kv_bytes_per_token(server.log.read_text(errors="replace"))


def find_prompt(args: argparse.Namespace) -> tuple[str, str]:
    for path in [args.prompt] if args.prompt else PROMPT_CANDIDATES:
        if Path(path).is_file():
            return path, Path(path).read_text(errors="replace")
    raise DemoError("no text for the system prompt; give one: RELAY_DEMO_PROMPT=file make demo")


def best_flash_attention(programs: Path, model: Path) -> tuple[str, dict[str, float]]:
    """Decode speed of eight rows with flash attention on and off, briefly and without Relay."""
    rates = {flash: batched_bench_rate(programs, model, flash) for flash in ("on", "off")}
    return max(rates, key=rates.get), rates


def batched_bench_rate(programs: Path, model: Path, flash: str) -> float:
    command = [str(programs / "llama-batched-bench"), "-m", str(model)]
    command += ["-c", "16384", "-npp", "1024", "-pps", "-ntg", "8", "-npl", "8"]
    command += ["-fa", flash, "--output-format", "jsonl"]
    attempts = 3  # on a busy machine its logger can lose the one line that matters
    for _ in range(attempts):
        with Ticker(lambda: f"llama-batched-bench, flash attention {flash}"):
            done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode == 0 and lines:
            return json.loads(lines[-1])["speed_tg"]
    raise DemoError(
        f"llama-batched-bench ended with status {done.returncode}:\n"
        f"{done.stdout[-1000:]}{done.stderr[-1000:]}"
    )


def kv_bytes_per_token(log: str) -> int:
    """From llama.cpp's own line about its KV cache."""
    total = 0
    pattern = r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells, .*?(\d+)/(\d+) seqs\)"
    for size, cells, _used, streams in re.findall(pattern, log):
        total += round(float(size) * 2**20 / (int(cells) * int(streams)))
    if not total:
        raise DemoError("llama-server's log does not tell the size of its KV cache")
    return total


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.machine()


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
