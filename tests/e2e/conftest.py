"""relay serve as a process, with a small random model, and clients for it.

RELAY_BIN names another program than build/release/bin/relay.
"""

import os
import pathlib
import re
import signal
import subprocess
import threading
import time

import httpx
import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RELAY = pathlib.Path(os.environ.get("RELAY_BIN", ROOT / "build/release/bin/relay"))

# About two thousand tokens: several times longer than what is asked below it.
LONG_PROMPT = "You answer questions about the rules of the house. " + " ".join(
    f"Rule {i}: whoever opens door {i * 7 % 101} closes door {i * 13 % 97} first."
    for i in range(120)
)


class Server:
    """A running `relay serve`. Standard error is kept, for messages of failed tests.

    under: the command that runs it.
    """

    def __init__(self, *arguments, env=None, wait=True, under=()):
        command = [*map(str, under), str(RELAY), "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.log = []
        self.ready_line = ""
        self.url = ""
        self._listening = threading.Event()
        self._ready = threading.Event()
        threading.Thread(target=self._read_stderr, daemon=True).start()
        threading.Thread(target=self._read_stdout, daemon=True).start()
        self._wait_for(self._listening)
        if wait:
            self._wait_for(self._ready)

    def _wait_for(self, event):
        deadline = time.monotonic() + 120
        while not event.wait(0.05):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"relay serve did not start:\n{self.errors()}")

    def _read_stderr(self):
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listening on (https?://[^\s\"]+)", line):
                self.url = found[1]
                self._listening.set()

    def _read_stdout(self):
        for line in self.process.stdout:
            if line.startswith("relay is ready"):
                self.ready_line = line
                self._ready.set()

    def errors(self):
        return "".join(self.log)

    def wait_ready(self):
        self._wait_for(self._ready)

    def client(self, key="none", **options):
        options.setdefault("max_retries", 0)
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, timeout=120, **options)

    def http(self, **options):
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def metric(self, name, **headers):
        """The sum over all labels."""
        text = httpx.get(self.url + "/metrics", headers=headers, timeout=30).text
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name} in:\n{text}"
        return sum(float(value) for value in values)

    def private_cells(self):
        """KV cells held by running requests alone: neither pinned nor kept for later ones."""
        return (
            self.cells_used()
            - self.metric("relay:cached_tokens")
            - self.metric("relay:pinned_tokens")
        )

    def cells_used(self):
        text = httpx.get(self.url + "/metrics", timeout=30).text
        blocks = int(re.search(r'num_gpu_blocks="(\d+)"', text)[1])
        size = int(re.search(r'block_size="(\d+)"', text)[1])
        return round(self.metric("vllm:kv_cache_usage_perc") * blocks * size)

    def stop(self, sig=signal.SIGINT, timeout=60):
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"relay serve did not end:\n{self.errors()}") from None


def eventually(condition, seconds):
    """Waits until it holds; returns the seconds that took, or fails."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - begin


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    assert RELAY.exists(), f"{RELAY} is not there: build it, or set RELAY_BIN"
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    subprocess.run([RELAY, "synth", "tiny", path, "--type", "f16", "--seed", "7"], check=True)
    return path


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "rules.txt"
    path.write_text(LONG_PROMPT)
    return path


@pytest.fixture(scope="session")
def start_server(model):
    """Starts servers with more arguments; all are ended with the session."""
    servers = []

    def start(*arguments, **options):
        server = Server("-m", model, *arguments, **options)
        servers.append(server)
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="session")
def server(start_server, prompt_file):
    server = start_server(
        "--pin-prompt", prompt_file, "--pin-budget", "0.5", "-np", "32", "-c", "16384"
    )
    yield server
    assert server.stop() == 0, server.errors()


@pytest.fixture(scope="session")
def client(server):
    return server.client()
