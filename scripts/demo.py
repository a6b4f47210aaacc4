"""Relay beside stock llama-server: one long system prompt, many users at once.

Makes a model (or takes RELAY_DEMO_MODEL), cuts a real text to a system prompt of several thousand
tokens, starts llama-server and `relay serve` in turn, sends both the same concurrent streaming chat
requests, and ends with one table. Then it repeats a round with sharing off and compares the greedy
answers. Results go to build/demo/: results.json, requests.csv and, with matplotlib, demo.png.

llama-server is given its best: the prompt is computed once, saved, and restored into every slot
through its slot API (as it stands, it would compute it once per slot); each slot has a KV cache of
its own, which its attention reads fastest; flash attention on or off, whichever a short measurement
on this machine finds faster.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT_CANDIDATES = ["/usr/share/common-licenses/GPL-3", str(ROOT / "LICENSE")]

# What each user wants to know; the numbers make every request different.
QUESTIONS = [
    "May I sell copies of a program that I changed, and what must go with them?",
    "Which duties begin when I give somebody only the compiled program?",
    "What happens to my rights if I break the terms once and then stop?",
    "Does running the program on my own machines need anybody's permission?",
    "How are patents of contributors treated?",
    "What counts as the corresponding source, and what does not?",
    "May I add terms of my own, and which ones?",
    "Who gives a warranty for the program?",
]


class DemoError(Exception):
    """Something that the user can act on; printed without a traceback."""


# --- Printing -------------------------------------------------------------------------------------

START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


class Ticker:
    """Shows a line that renews itself on a terminal, and one every ten seconds elsewhere."""

    def __init__(self, text) -> None:
        self.text = text
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Ticker:
        self.thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self.done.set()
        self.thread.join()
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)

    def _run(self) -> None:
        terminal = sys.stdout.isatty()
        while not self.done.wait(0.5 if terminal else 10):
            line = f"[{time.monotonic() - START:5.0f} s]   {self.text()}"
            print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", flush=True)


# --- Servers --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """In the child: the kernel ends it should this script be killed outright."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class Server:
    """A server process that is gone when the `with` block ends, however it ends."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path):
        self.name = name
        self.command = command
        self.environment = environment
        self.log = log
        self.port = int(command[command.index("--port") + 1])
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this script, which then ends the server
                preexec_fn=die_with_parent,
            )
        return self

    def __exit__(self, *_exc) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join("    " + line for line in text[-lines:])

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise DemoError(
                f"{self.name} ended with status {self.process.returncode}; "
                f"its log ({self.log}) ends with\n{self.log_tail()}"
            )

    def wait_ready(self, limit: float) -> float:
        """Seconds until /health says yes."""
        start = time.monotonic()
        with Ticker(lambda: f"{self.name}: {self.last_log_line()}"):
            while time.monotonic() - start < limit:
                self.check_alive()
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if self.request("GET", "/health", timeout=5)[0] == 200:
                        return time.monotonic() - start
                time.sleep(0.25)
        raise DemoError(
            f"{self.name} was not ready within {limit:.0f} s; its log ({self.log}) ends with\n"
            + self.log_tail()
        )

    def last_log_line(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        for line in reversed(lines):
            if line.strip() and "/health" not in line:  # our own asking
                return line[:80]
        return "starting"

    def request(self, method: str, path: str, body=None, timeout: float = 600) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body=None) -> dict:
        status, data = self.request(method, path, body)
        if status != 200:
            raise DemoError(f"{self.name}: {method} {path}: {status} {data[:500].decode()}")
        return json.loads(data)


# --- One user -------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What one user saw. Times in seconds since the round began."""

    user: int
    first: float = 0.0
    last: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    pieces: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def ask(server: Server, body: dict, answer: Answer, begin: float) -> None:
    """Sends one streaming chat request and fills `answer`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    try:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"{response.status} {response.read(500).decode(errors='replace')}"
            return
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                break
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = json.dumps(event["error"])
                return
            now = time.monotonic() - begin
            for choice in event.get("choices", []):
                delta = choice["delta"]
                piece = delta.get("content") or delta.get("reasoning_content")
                if piece:
                    answer.first = answer.first or now
                    answer.last = now
                    answer.pieces.append(piece)
            if usage := event.get("usage"):
                answer.prompt_tokens = usage["prompt_tokens"]
                answer.completion_tokens = usage["completion_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                answer.cached_tokens = details.get("cached_tokens", 0)
        if not answer.completion_tokens:
            answer.error = "the stream ended without a usage"
    except (OSError, http.client.HTTPException, ValueError) as error:
        answer.error = repr(error)
    finally:
        connection.close()


def chat_body(prompt: str, user: int, round_number: int, tokens: int) -> dict:
    question = QUESTIONS[user % len(QUESTIONS)]
    return {
        "messages": [
            {"role": "system", "content": prompt},
            {"role": "user", "content": f"Question {round_number}.{user}: {question}"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
    }


def run_round(server: Server, bodies: list[dict], label: str) -> list[Answer]:
    answers = [Answer(user) for user in range(len(bodies))]
    begin = time.monotonic()
    threads = [
        threading.Thread(target=ask, args=(server, body, answer, begin), daemon=True)
        for body, answer in zip(bodies, answers, strict=True)
    ]

    def status() -> str:
        begun = sum(1 for answer in answers if answer.pieces)
        pieces = sum(len(answer.pieces) for answer in answers)
        return f"{label}: {begun} of {len(answers)} users served, about {pieces} tokens"

    with Ticker(status):
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # short, so that Ctrl-C is heard
                server.check_alive()
    if failed := [answer for answer in answers if answer.error]:
        raise DemoError(
            f"{server.name}: {len(failed)} of {len(answers)} requests failed, the first with\n"
            f"    {failed[0].error}"
        )
    return answers


# --- Results --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One server's figures."""

    name: str
    given: str
    prompt_seconds: float = 0.0  # computing the system prompt for the first time
    ready_seconds: float = 0.0  # from start to the first request that finds the prompt in place
    kv_bytes: int = 0  # held for the prompt and one round of users
    rounds: list[list[Answer]] = field(default_factory=list)

    def answers(self) -> list[Answer]:
        return [answer for answers in self.rounds for answer in answers]

    def first_token(self, percent: int) -> float:
        values = sorted(answer.first for answer in self.answers())
        return percentile(values, percent)

    def decode_rate(self) -> float:
        """Tokens after each user's first, over the time from the first token to the last."""
        tokens = 0
        seconds = 0.0
        for answers in self.rounds:
            tokens += sum(answer.completion_tokens - 1 for answer in answers)
            seconds += max(a.last for a in answers) - min(a.first for a in answers)
        return tokens / seconds

    def wall(self) -> float:
        return sum(max(answer.last for answer in answers) for answers in self.rounds)

    def cached_share(self) -> float:
        return statistics.fmean(a.cached_tokens / a.prompt_tokens for a in self.answers())


def percentile(ordered: list[float], percent: int) -> float:
    """Linear between the neighbours, as numpy does it."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(stock: Outcome, relay: Outcome) -> str:
    """The one table. A ratio above 1 is in Relay's favour."""
    rows = [("", stock.name, relay.name, "ratio")]

    def row(label: str, ours: float, theirs: float, text: str, more_is_better: bool = False):
        ratio = ours / theirs if more_is_better else theirs / ours
        rows.append((label, text.format(theirs), text.format(ours), f"{ratio:.2f}x"))

    row("time to first token, p50", relay.first_token(50), stock.first_token(50), "{:.2f} s")
    row("time to first token, p95", relay.first_token(95), stock.first_token(95), "{:.2f} s")
    row("decode tokens/s", relay.decode_rate(), stock.decode_rate(), "{:.1f}", True)
    row("wall time, all rounds", relay.wall(), stock.wall(), "{:.1f} s")
    row("KV held", relay.kv_bytes / 2**20, stock.kv_bytes / 2**20, "{:.0f} MiB")
    row("prompt computed once", relay.prompt_seconds, stock.prompt_seconds, "{:.1f} s")
    row("start until prompt in place", relay.ready_seconds, stock.ready_seconds, "{:.1f} s")

    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for number, cells in enumerate(rows):
        first, *others = cells
        line = first.ljust(widths[0])
        for cell, width in zip(others, widths[1:], strict=True):
            line += "   " + cell.rjust(width)
        lines.append(line)
        if number == 0:
            lines.append("-" * len(line))
    return "\n".join(lines)


@dataclass
class Agreement:
    """How far two sets of greedy answers agree: a difference ends an answer's agreement."""

    answers: int = 0
    equal_answers: int = 0
    tokens: int = 0
    equal_tokens: int = 0

    def __str__(self) -> str:
        return (
            f"{self.equal_answers} of {self.answers} answers, "
            f"{self.equal_tokens} of {self.tokens} tokens up to the first difference"
        )


def compare(ours: list[Answer], theirs: list[Answer]) -> Agreement:
    result = Agreement()
    for a, b in zip(ours, theirs, strict=True):
        tokens = max(a.completion_tokens, b.completion_tokens)
        result.answers += 1
        result.tokens += tokens
        if a.text == b.text and a.completion_tokens == b.completion_tokens:
            result.equal_answers += 1
            result.equal_tokens += tokens
            continue
        common = len(os.path.commonprefix([a.text, b.text]))
        # A piece is one token's text (now and then two, where a character needs both).
        length = 0
        for piece in a.pieces:
            length += len(piece)
            if length > common:
                break
            result.equal_tokens += 1
    return result


# --- The demo -------------------------------------------------------------------------------------


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


def clean_environment(**more: str) -> dict[str, str]:
    """Without anything that would load Relay into llama-server or change Relay's ways."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", "GGML_", "LLAMA_"))}
    return {**kept, **more}


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


def best_flash_attention(setup: Setup) -> tuple[str, dict[str, float]]:
    """Decode speed of eight rows with flash attention on and off, briefly and without Relay."""
    rates = {flash: decode_rate_of_batched_bench(setup, flash) for flash in ("on", "off")}
    return max(rates, key=rates.get), rates


def decode_rate_of_batched_bench(setup: Setup, flash: str) -> float:
    command = [str(setup.build / "bin/llama-batched-bench"), "-m", str(setup.model)]
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


def run_stock(setup: Setup, flash: str) -> Outcome:
    outcome = Outcome(
        f"llama-server (-fa {flash})",
        "the prompt computed once, then restored into each slot; one KV cache per slot",
    )
    with tempfile.TemporaryDirectory(dir=setup.out, prefix="slots-") as saves:
        with llama_server(setup, flash, setup.users, "--slot-save-path", f"{saves}/") as server:
            loaded = server.wait_ready(300)
            begin = time.monotonic()
            body = {**chat_body(setup.prompt, 0, 0, 1), "id_slot": 0}
            first = run_round(server, [body], "llama-server computes the prompt")[0]
            outcome.prompt_seconds = first.last
            say(f"llama-server: prompt of {first.prompt_tokens} tokens in {first.last:.1f} s")
            server.json("POST", "/slots/0?action=save", {"filename": "prompt"})
            for slot in range(1, setup.users):
                server.json("POST", f"/slots/{slot}?action=restore", {"filename": "prompt"})
            outcome.ready_seconds = loaded + time.monotonic() - begin
            for number in range(1, setup.rounds + 1):
                bodies = [
                    {**body, "id_slot": slot} for slot, body in enumerate(setup.bodies(number))
                ]
                answers = run_round(server, bodies, f"llama-server, round {number}")
                outcome.rounds.append(answers)
                held = sum(a.prompt_tokens + a.completion_tokens for a in answers)
                outcome.kv_bytes = max(outcome.kv_bytes, held * setup.kv_bytes_per_token)
                say(f"llama-server: round {number} took {max(a.last for a in answers):.1f} s")
    if outcome.cached_share() < 0.5:
        outcome.given += "; it could NOT reuse the prompt (a sliding window, perhaps)"
    return outcome


def relay_kv_bytes(server: Server) -> int:
    text = server.request("GET", "/metrics", timeout=10)[1].decode()
    found = re.search(r"^relay:kv_bytes_used(?:\{.*\})? (\S+)$", text, re.M)
    if found is None:
        raise DemoError("relay serve's /metrics does not tell relay:kv_bytes_used")
    return int(float(found[1]))


def run_relay(setup: Setup, sharing: str, rounds: int) -> Outcome:
    outcome = Outcome("relay serve", "--pin-prompt")
    name = "relay serve" if sharing == "on" else "relay serve, sharing off"
    with relay_server(setup, sharing) as server:
        outcome.ready_seconds = server.wait_ready(600)
        log = server.log.read_text(errors="replace")
        pinned = re.search(r"pinned .*: (\d+) tokens, .* ([\d.]+) s$", log, re.M)
        if pinned is None:
            raise DemoError(f"relay serve does not tell that it pinned the prompt:\n{server.log}")
        if "Relay active" not in log:
            raise DemoError(f"relay serve runs without the Relay module, see {server.log}")
        outcome.prompt_seconds = float(pinned[2])
        say(f"{name}: prompt of {pinned[1]} tokens pinned in {pinned[2]} s")
        for number in range(1, rounds + 1):
            answers = run_round(server, setup.bodies(number), f"{name}, round {number}")
            outcome.rounds.append(answers)
            if number == 1:
                # The prompt and what every user of this round added: finished requests stay cached
                # until room is needed. Later rounds would count the earlier ones' too.
                outcome.kv_bytes = relay_kv_bytes(server)
            say(f"{name}: round {number} took {max(a.last for a in answers):.1f} s")
    return outcome


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


def write_results(setup: Setup, outcomes: list[Outcome], summary: dict) -> None:
    for outcome in outcomes:
        summary["servers"][outcome.name] = {
            "given": outcome.given,
            "time_to_first_token_p50_s": outcome.first_token(50),
            "time_to_first_token_p95_s": outcome.first_token(95),
            "decode_tokens_per_s": outcome.decode_rate(),
            "wall_s": outcome.wall(),
            "kv_bytes": outcome.kv_bytes,
            "prompt_s": outcome.prompt_seconds,
            "ready_s": outcome.ready_seconds,
            "cached_share": outcome.cached_share(),
        }
    (setup.out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (setup.out / "requests.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["server", "round", "user", "first_s", "last_s", "prompt_tokens", "cached_tokens"]
            + ["completion_tokens"]
        )
        for outcome in outcomes:
            for number, answers in enumerate(outcome.rounds, 1):
                for a in answers:
                    writer.writerow(
                        [outcome.name, number, a.user, f"{a.first:.4f}", f"{a.last:.4f}"]
                        + [a.prompt_tokens, a.cached_tokens, a.completion_tokens]
                    )


def plot(stock: Outcome, relay: Outcome, title: str, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("time to first token, p95 (s)", [o.first_token(95) for o in (stock, relay)], "{:.1f}"),
        ("decode (tokens/s)", [o.decode_rate() for o in (stock, relay)], "{:.0f}"),
        ("KV held (MiB)", [o.kv_bytes / 2**20 for o in (stock, relay)], "{:.0f}"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 3.4))
    for axis, (label, values, text) in zip(axes, panels, strict=True):
        bars = axis.bar(["llama-server", "relay serve"], values, color=["#9aa5b1", "#2f6fde"])
        axis.bar_label(bars, [text.format(value) for value in values], padding=2)
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, max(values) * 1.15)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def demo(args: argparse.Namespace) -> None:
    build = Path(args.build).resolve()
    for program in ("relay", "llama-server", "llama-batched-bench"):
        if not (build / "bin" / program).is_file():
            raise DemoError(f"there is no {build}/bin/{program}; run: make build")
    out = ROOT / "build/demo"
    out.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out).free < 2**30 + args.prompt_tokens * 2**18:
        raise DemoError(f"{out} has too little space left (1 GiB and the saved prompt are needed)")

    model = make_model(args, build, out)
    source, text = find_prompt(args)
    setup = Setup(
        model, out / "prompt.txt", "", 64, args.users, args.rounds, args.tokens, build, out
    )
    look_up(setup, text, args.prompt_tokens)
    setup.prompt_file.write_text(setup.prompt)
    if setup.prompt_tokens < 0.9 * args.prompt_tokens:
        say(f"note: {source} has only {setup.prompt_tokens} tokens")
    say(f"system prompt: the first {setup.prompt_tokens} tokens of {source}")

    flash, rates = args.stock_fa, {}
    if flash == "best":
        flash, rates = best_flash_attention(setup)
        say(
            "llama-server's flash attention, decode of 8 rows: "
            + ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates.items())
            + f"; it gets '{flash}'"
        )
    stock = run_stock(setup, flash)
    relay = run_relay(setup, "on", args.rounds)
    unshared = run_relay(setup, "off", 1)
    agreement = compare(relay.rounds[0], unshared.rounds[0])
    with_stock = compare(relay.answers(), stock.answers())

    machine = f"{cpu_name()}, {os.cpu_count()} CPUs"
    title = (
        f"{args.users} users at once, system prompt of {setup.prompt_tokens} tokens, "
        f"{args.tokens} tokens each, {args.rounds} rounds"
    )
    summary = {
        "commit": commit(),
        "machine": machine,
        "model": model.name,
        "prompt_source": source,
        "prompt_tokens": setup.prompt_tokens,
        "users": args.users,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "stock_flash_attention_tokens_per_s": rates,
        "kv_bytes_per_token": setup.kv_bytes_per_token,
        "greedy_sharing_on_off": asdict(agreement),
        "greedy_relay_stock": asdict(with_stock),
        "sharing_off_decode_tokens_per_s": unshared.decode_rate(),
        "servers": {},
    }
    write_results(setup, [stock, relay], summary)
    plotted = plot(stock, relay, title, out / "demo.png")

    print(f"\n{title}\n{model.name}, {machine}\n")
    print(table(stock, relay))
    print(f"\nllama-server was given: {stock.given}.")
    print(
        f"Left to itself it computes the prompt once per slot: {args.users} x "
        f"{stock.prompt_seconds:.0f} s = {args.users * stock.prompt_seconds:.0f} s (not run)."
    )
    print(f"Relay's decode with sharing off: {unshared.decode_rate():.1f} tokens/s (one round).")
    print(f"Greedy, sharing on and off: {agreement} agree.")
    print(f"Greedy, Relay and llama-server: {with_stock} agree.")
    files = "results.json, requests.csv" + (", demo.png" if plotted else "")
    print(f"\nResults: {out}: {files}. Took {time.monotonic() - START:.0f} s.")


def parse_arguments() -> argparse.Namespace:
    def env(name: str, default) -> str:  # argparse converts defaults that are strings
        return os.environ.get(f"RELAY_DEMO_{name}", str(default))

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parser = argparse.ArgumentParser(
        description="Relay beside stock llama-server: one long system prompt, many users at once.",
        epilog="Each option can be given as RELAY_DEMO_<NAME> in the environment, for make demo.",
    )
    add = parser.add_argument
    add("--model", default=env("MODEL", ""), help="a GGUF model; default: made with relay synth")
    add("--prompt", default=env("PROMPT", ""), help="text file; default: the system's GPL-3")
    add(
        "--prompt-tokens",
        type=positive,
        default=env("PROMPT_TOKENS", 4096),
        help="cut it to so many (%(default)s)",
    )
    add("--users", type=positive, default=env("USERS", 16), help="requests at once (%(default)s)")
    add("--rounds", type=positive, default=env("ROUNDS", 2), help="(%(default)s)")
    add("--tokens", type=positive, default=env("TOKENS", 32), help="per answer (%(default)s)")
    flash_attention = ["best", "on", "off"]
    add(
        "--stock-fa",
        choices=flash_attention,
        default=env("STOCK_FA", "best"),
        help="llama-server's flash attention; best: measured first",
    )
    build = env("BUILD", ROOT / "build/release")
    add("--build", default=build, help="build folder (%(default)s)")
    args = parser.parse_args()
    if args.stock_fa not in flash_attention:  # argparse does not look at defaults
        parser.error(f"RELAY_DEMO_STOCK_FA is one of {', '.join(flash_attention)}")
    return args


def main() -> int:
    def stop(*_args) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    try:
        demo(parse_arguments())
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the servers are stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
