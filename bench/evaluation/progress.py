"""A progress bar with the time left: on a terminal one line that renews itself, elsewhere a line a
task."""

import sys
import threading
import time

WIDTH = 24
TRUST = 60.0  # seconds of guesses that count as right: one task alone is no verdict


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Tasks have guessed costs; those that are done tell how far off the guesses are."""

    def __init__(self, guesses: list[float], done: list[float], out=sys.stderr) -> None:
        self._left = sum(guesses)
        self._done_guess = 0.0
        self._done_seconds = 0.0
        self._count, self._total = len(done), len(guesses) + len(done)
        self._out, self._terminal = out, out.isatty()
        self._begin = time.monotonic()
        self._task = ("", 0.0, self._begin)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def pace(self) -> float:
        return (self._done_seconds + TRUST) / (self._done_guess + TRUST)

    def seconds_left(self) -> float:
        _, guess, begin = self._task
        running = min(time.monotonic() - begin, self.pace() * guess)
        return max(0.0, self.pace() * self._left - running)

    def fits(self, guess: float, budget: float) -> bool:
        """Whether a task that begins now ends before `budget` seconds of the whole are over."""
        return time.monotonic() - self._begin + self.pace() * guess <= budget

    def skip(self, guess: float) -> None:
        """Of a task that is not begun, or that failed: how long that took tells nothing."""
        self._left -= guess
        self._task = ("", 0.0, time.monotonic())

    def line(self) -> str:
        filled = WIDTH * self._count // max(1, self._total)
        bar = "█" * filled + "░" * (WIDTH - filled)
        left = duration(self.seconds_left())
        return f"{bar} {self._count}/{self._total}, {left} left | {self._task[0]}"

    def begin(self, name: str, guess: float) -> None:
        self._task = (name, guess, time.monotonic())
        if not self._terminal:
            print(self.line(), file=self._out, flush=True)

    def end(self) -> float:
        """Seconds that the task took."""
        _, guess, begin = self._task
        seconds = time.monotonic() - begin
        self._left -= guess
        self._done_guess += guess
        self._done_seconds += seconds
        self._count += 1
        self._task = ("", 0.0, time.monotonic())
        return seconds

    def __enter__(self) -> "Progress":
        if self._terminal:
            self._thread = threading.Thread(target=self._renew, daemon=True)
            self._thread.start()
        return self

    def _renew(self) -> None:
        while not self._stop.wait(0.5):
            print(f"\r\033[K{self.line()[:100]}", end="", file=self._out, flush=True)

    def __exit__(self, *_error) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
            print("\r\033[K", end="", file=self._out, flush=True)
