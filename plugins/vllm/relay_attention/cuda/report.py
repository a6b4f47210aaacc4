"""What RELAY_VERBOSE=1 says while vLLM runs on a GPU."""

from collections import Counter
from collections.abc import Mapping
from functools import partial

from relay_attention.cuda.native import Summary
from relay_attention.cuda.plan import Kind, Plan
from relay_attention.log import logger


def kv_slots(worker: object) -> tuple[int, int, int]:
    """Of a vLLM worker: plans made so far, and the KV slots that the last ones read, and would read
    if nothing were shared, summed over kinds of layers. Waits for the GPU: for benches, tests."""
    plans = _plans(worker)
    summaries = [plan.summary(_stream()) for plan in plans]
    return _sum(plans, summaries)


def watch_kv_slots(worker: object, requests: int) -> None:
    """Remembers what kv_slots tells after the next step in which so many requests, or more, decode
    and nothing else happens: requests neither come nor go at once, and before they decode they may
    all have rows of their prompts in one step."""
    for plan in _plans(worker):
        plan.make = partial(_make_watched, plan, requests)


def watched_kv_slots(worker: object) -> tuple[int, int, int, int, int] | None:
    """What kv_slots told then, and what that is in bytes of all layers: read, and attended. None if
    Relay has attended no such step since."""
    plans = _plans(worker)
    watched = [vars(plan).pop("watched", None) for plan in plans]
    for plan in plans:
        vars(plan).pop("make", None)
    if not watched or None in watched:
        return None
    sizes = _slot_bytes(worker)
    return (
        *_sum(plans, watched),
        sum(s.kv_slots_read * size for s, size in zip(watched, sizes, strict=True)),
        sum(s.kv_slots_attended * size for s, size in zip(watched, sizes, strict=True)),
    )


def _make_watched(plan: Plan, requests: int, *args: object) -> None:
    Plan.make(plan, *args)
    *_, stream = args
    if plan.requests >= requests and plan.rows <= plan.requests:
        plan.watched = plan.summary(stream)
        del plan.make


def _plans(worker: object) -> list[Plan]:
    return [plan for _, _, plan in _kinds(worker)]


def _slot_bytes(worker: object) -> list[int]:
    """Of each plan, bytes of a token's KV in all layers that it plans."""
    return [
        sum(
            # [num_blocks, kv_heads, block_size, 2 * head_size]
            layer.kv_cache.shape[1] * layer.kv_cache.shape[3] * layer.kv_cache.element_size()
            for layer in builder._served
            if layer.impl.operator.kind == kind
        )
        for builder, kind, _ in _kinds(worker)
    ]


def _kinds(worker: object) -> list[tuple[object, Kind, Plan]]:
    return [
        (builder, kind, plan)
        for groups in worker.model_runner.attn_groups
        for group in groups
        for builder in group.metadata_builders
        for kind, plan in (getattr(builder, "_plans", None) or {}).items()
    ]


def _sum(plans: list[Plan], summaries: list[Summary]) -> tuple[int, int, int]:
    return (
        sum(plan.made for plan in plans),
        sum(s.kv_slots_read for s in summaries),
        sum(s.kv_slots_attended for s in summaries),
    )


def _stream() -> int:
    import torch

    return torch.cuda.current_stream().cuda_stream


class Report:
    """Logs, every hundred steps, who attended them, and what the last one's plans take. Waits for
    the GPU then, as nothing else of Relay does."""

    STEPS = 100

    def __init__(self) -> None:
        self._reasons: Counter[str | None] = Counter()

    def next_step(self, reason: str | None, plans: Mapping[Kind, Plan], stream: int) -> None:
        """reason: why vLLM's own kernel attends this step; None if Relay does."""
        self._reasons[reason] += 1
        if self._reasons.total() < self.STEPS:
            return
        served = self._reasons.pop(None, 0)
        others = ", ".join(f"{count} were {why}" for why, count in self._reasons.items())
        logger.info(
            "Relay attended %d of %d steps%s", served, self.STEPS, f"; {others}" if others else ""
        )
        self._reasons.clear()
        if reason is not None:
            return
        for kind, plan in plans.items():
            s = plan.summary(stream)
            logger.info(
                "Relay: window %d: reads %d KV slots for %d that are attended, in %d segments, "
                "%d of them shared, by %d workers, %d partial rows",
                kind.window,
                s.kv_slots_read,
                s.kv_slots_attended,
                s.segments,
                s.shared_segments,
                s.workers,
                s.partial_rows,
            )
