"""Starts the relay of an installed prefix on a model it makes itself, and asks it one question.

usage: serve.py <prefix>
"""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

START_SECONDS = 120
STOP_SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(server: subprocess.Popen, base: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"relay serve ended with {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass  # not listening yet, or still loading
        time.sleep(0.2)
    raise RuntimeError(f"relay serve was not healthy within {START_SECONDS} s")


def ask(base: str) -> dict:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    request = urllib.request.Request(
        f"{base}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def check_libraries(pid: int, prefix: pathlib.Path) -> None:
    """Every library of ours that the process has mapped comes from the prefix."""
    lines = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
    mapped = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    ours = {path for path in mapped if "ggml" in path or "llama" in path or "relay" in path}
    ours = {path for path in ours if ".so" in path}
    strangers = {path for path in ours if not path.startswith(f"{prefix}/")}
    if strangers:
        raise RuntimeError(f"loaded from outside the prefix: {sorted(strangers)}")
    for name in ("libggml-relay.so", "libggml-cpu.so"):
        if not any(path.endswith(name) for path in ours):
            raise RuntimeError(f"{name} was not loaded; loaded were {sorted(ours)}")


def main() -> None:
    prefix = pathlib.Path(sys.argv[1]).resolve()
    relay = prefix / "bin" / "relay"
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "tiny.gguf"
        subprocess.run([relay, "synth", "tiny", model], check=True, stdout=subprocess.DEVNULL)
        port = free_port()
        server = subprocess.Popen([relay, "serve", "-m", model, "--port", str(port)], cwd=folder)
        try:
            base = f"http://127.0.0.1:{port}"
            wait_until_healthy(server, base)
            answer = ask(base)
            if answer["usage"]["completion_tokens"] < 1:
                raise RuntimeError(f"no tokens in the answer: {answer}")
            check_libraries(server.pid, prefix)
            server.send_signal(signal.SIGINT)
            if server.wait(timeout=STOP_SECONDS) != 0:
                raise RuntimeError(f"relay serve ended with {server.returncode} after Ctrl-C")
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()
    print(f"install: served {answer['usage']['completion_tokens']} tokens")


if __name__ == "__main__":
    main()
