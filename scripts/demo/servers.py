"""A server as a child process, and questions to it over HTTP."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from console import DemoError, Ticker


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

    def pause(self) -> None:
        """From now on it takes no time of any CPU. Should this script be killed outright, a server
        that is paused stays: the signal to end reaches it only when it goes on."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def __exit__(self, *_exc) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.resume()
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


def clean_environment(**more: str) -> dict[str, str]:
    """Without anything that would load Relay into llama-server or change Relay's ways."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", "GGML_", "LLAMA_"))}
    return {**kept, **more}
