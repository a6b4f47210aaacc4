"""What the demo says while it runs."""

from __future__ import annotations

import sys
import threading
import time


class DemoError(Exception):
    """Something that the user can act on; printed without a traceback."""


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
