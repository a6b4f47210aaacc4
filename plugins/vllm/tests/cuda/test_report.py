"""What benches ask of plans, without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from relay_attention.cuda import report
from relay_attention.cuda.plan import Plan

STREAM = 7


@pytest.fixture
def plan(monkeypatch):
    def make(self, requests, rows, stream):
        assert stream == STREAM
        self._batch = SimpleNamespace(requests=requests, rows=rows)
        self.made += 1

    def summary(self, stream):
        assert stream == STREAM
        return SimpleNamespace(kv_slots_read=self.requests, kv_slots_attended=10 * self.requests)

    monkeypatch.setattr(Plan, "make", make)
    monkeypatch.setattr(Plan, "summary", summary)
    made = object.__new__(Plan)
    made.made = 0
    return made


def layer(kind: str, kv_heads: int) -> SimpleNamespace:
    return SimpleNamespace(
        kv_cache=torch.empty(1, kv_heads, 16, 2 * 64, dtype=torch.bfloat16),
        impl=SimpleNamespace(operator=SimpleNamespace(kind=kind)),
    )


@pytest.fixture
def worker(plan):
    layers = [layer("a kind", 2), layer("a kind", 2), layer("another kind", 8)]
    builder = SimpleNamespace(_plans={"a kind": plan}, _served=layers)
    group = SimpleNamespace(metadata_builders=[builder])
    return SimpleNamespace(model_runner=SimpleNamespace(attn_groups=[[group]]))


def test_watches_the_first_step_in_which_enough_requests_decode(plan, worker):
    report.watch_kv_slots(worker, 4)
    for requests, rows in ((3, 3), (4, 64), (4, 5), (5, 5), (6, 6)):
        plan.make(requests, rows, STREAM)
    slot = 2 * 2 * 2 * 64 * 2  # layers, KV heads, K and V, bf16
    assert report.watched_kv_slots(worker) == (5, 5, 50, 5 * slot, 50 * slot)
    assert plan.made == 5


def test_tells_nothing_where_no_step_was_attended(plan, worker):
    report.watch_kv_slots(worker, 4)
    plan.make(3, 3, STREAM)
    assert report.watched_kv_slots(worker) is None
    plan.make(5, 5, STREAM)
    assert report.watched_kv_slots(worker) is None, "no longer watched"


def test_tells_a_step_once(plan, worker):
    report.watch_kv_slots(worker, 4)
    plan.make(4, 4, STREAM)
    assert report.watched_kv_slots(worker) is not None
    assert report.watched_kv_slots(worker) is None
