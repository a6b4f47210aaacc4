"""Two engines, each in a process of its own, that are measured in turns."""

import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

MakeEngine = Callable[..., object]  # a class, whose methods can then be called


def _serve(
    connection: Connection, environment: Mapping[str, str], make: MakeEngine, arguments: tuple
) -> None:
    """A process with an engine: calls what it is asked to, until it is asked nothing more."""
    os.environ |= environment
    engine = make(*arguments)
    try:
        connection.send(None)
        while (call := connection.recv()) is not None:
            name, called_with = call
            connection.send(getattr(engine, name)(*called_with))
    except BaseException:
        traceback.print_exc()  # at once: closing may take long
        raise
    finally:
        if hasattr(engine, "close"):
            engine.close()


class Remote:
    """An engine in another process, which starts at once; `ready` waits for it."""

    def __init__(self, relay: bool, make: MakeEngine, *arguments: object, **environment: str):
        environment |= {"RELAY_DISABLE": "0" if relay else "1"}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=_serve, args=(theirs, environment, make, arguments)
        )
        self._process.start()
        theirs.close()

    def ready(self) -> "Remote":
        self._answer()
        return self

    def call(self, name: str, *arguments: object) -> object:
        self._connection.send((name, arguments))
        return self._answer()

    def _answer(self) -> object:
        try:
            return self._connection.recv()
        except EOFError:
            for other in multiprocessing.active_children():  # or the exit waits for them
                other.terminate()
            sys.exit("an engine died, see above")

    def close(self) -> None:
        self._connection.send(None)
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


@dataclass
class Comparison:
    """Seconds of one thing in each engine, measured in turns."""

    vllm: list[float]
    relay: list[float]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.vllm, self.relay, strict=True)]

    def __str__(self) -> str:
        vllm, relay = (1e3 * statistics.median(s) for s in (self.vllm, self.relay))
        ratios = self.ratios
        return (
            f"{vllm:10.2f} {relay:10.2f} {statistics.median(ratios):7.2f}x"
            f"  ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def in_turns(engines: list[Remote], rounds: int, name: str, *arguments: object) -> Comparison:
    """Both engines, one after the other, the first one changing from round to round."""
    found: list[list[float]] = [[], []]
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds = engines[i].call(name, *arguments)
            found[i].append(statistics.median(seconds) if isinstance(seconds, list) else seconds)
    return Comparison(*found)
