"""Time on the GPU: cold caches, CUDA events, competitors in turn."""

import statistics
import time
from dataclasses import dataclass, field

import torch


@dataclass
class Entry:
    """Something to be timed: what it is called, how it runs, and its times in microseconds."""

    key: tuple
    run: object
    reps: int = 9
    host_us: float = 0.0
    us: list = field(default_factory=list)

    def stats(self):
        ordered = sorted(self.us)

        def at(share):
            return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

        return {
            "median_us": statistics.median(ordered), "p10_us": at(0.1), "p25_us": at(0.25),
            "p75_us": at(0.75), "p90_us": at(0.9), "min_us": ordered[0], "max_us": ordered[-1],
            "n": len(ordered),
        }  # fmt: skip


class Timer:
    """Before each run the L2 cache is filled with other data. By reading: after writes, the timed
    kernel would wait for their way back to memory, which no layer of a model leaves behind."""

    def __init__(self, flush="read", megabytes=256):
        self.buffer = torch.zeros(megabytes << 18, dtype=torch.float32, device="cuda")
        self.sink = torch.zeros((), dtype=torch.float32, device="cuda")
        self.write = flush == "write"
        self.side = torch.cuda.Stream()
        # Some 1.98 GHz: a sleep that is a little long costs nothing.
        self.cycles_per_us = 2000

    def flush(self):
        if self.write:
            self.buffer.zero_()
        else:
            torch.sum(self.buffer, 0, out=self.sink)

    def once(self, run, host_us=0.0, cold=True):
        """One timed run. The GPU sleeps until the host has enqueued it, so that no gap counts."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        if cold:
            self.flush()
        torch.cuda._sleep(int((1.5 * host_us + 40) * self.cycles_per_us))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def warm(self, run):
        """Runs twice, so that everything lazy has happened; returns microseconds of host time and
        of GPU time."""
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        host_us = min((time.perf_counter() - begin) * 1e6, 2000.0)
        torch.cuda.synchronize()
        return host_us, self.once(run, host_us)

    def graph(self, run):
        """`run` as a captured CUDA graph. (torch.cuda.graph would empty the allocator's cache.)"""
        graph = torch.cuda.CUDAGraph()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.side)
        return graph

    def measure(self, entries, cold=True):
        """All entries in turn, round by round, another one first in each round."""
        for number in range(max((entry.reps for entry in entries), default=0)):
            shift = number % len(entries)
            for entry in entries[shift:] + entries[:shift]:
                if number < entry.reps:
                    entry.us.append(self.once(entry.run, entry.host_us, cold))

    def median(self, run, n=9, cold=True):
        host_us, _ = self.warm(run)
        return statistics.median(self.once(run, host_us, cold) for _ in range(n))

    def limits(self, data):
        """What this GPU reaches here and now: reading, copying, and multiplying bf16."""
        ints, floats = data.view(torch.int32), data.view(torch.float32)
        size = data.numel() * data.element_size()
        reads = [lambda: ints.sum(), lambda: floats.sum(), lambda: floats.amax()]
        read = max(size / self.median(run) / 1e3 for run in reads)
        front, back = data.chunk(2)
        copy = size / self.median(lambda: back.copy_(front)) / 1e3
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        peak = 2 * 8192**3 / self.median(lambda: a @ a) / 1e6
        one = torch.zeros(1, device="cuda")

        def nothing():
            one.add_(1)

        empty = self.median(nothing)
        nothing_graph = self.graph(nothing)
        empty_graph = self.median(nothing_graph.replay)
        return {
            "read_gbs": read,
            "copy_gbs": copy,
            "bf16_tflops": peak,
            "empty_us": empty,
            "empty_graph_us": empty_graph,
        }
