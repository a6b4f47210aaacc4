"""The report from made-up results: each figure is drawn, each section says what was found."""

import document
import pytest
import store
from tasks import EvaluationError, Row


def row(section, case, system, metric, value, better="lower", n=5):
    return Row(section, case, system, metric, "", better, value, 0.95 * value, 1.05 * value, n)


def operator(gain: float) -> list[Row]:
    """Sharing makes batch b `gain` times the formula's speed-up as fast."""
    rows = []
    for prefix in (64, 16384):
        for batch in (1, 32):
            case = dict(model="llama-2-7b", kv_type="f16", prefix=prefix, context=128, batch=batch)
            formula = batch * (prefix + 128) / (prefix + batch * 128)
            on = 1e-6 * prefix
            off = on * (formula * gain if batch > 1 else 1)
            rows += [
                row("operator", case, "relay", "latency", on),
                row("operator", case, "relay-off", "latency", off),
                row("operator", case, "ggml", "latency", 2 * off),
                row("operator", case, "cost model", "latency", on, "", 1),
                row("operator", case, "cost model, off", "latency", off, "", 1),
                row("operator", case, "formula", "speed-up", formula, "", 1),
            ]
    return rows


def serving(experiment: str, **more) -> list[Row]:
    rows = []
    for prompt in (64, 2048):
        case = dict(experiment=experiment, model="tiny", prompt=prompt, input=16, output=32) | more
        for system, speed in (("relay", 100.0), ("relay-off", 80.0), ("llama-server", 50.0)):
            rows.append(row("serving", case, system, "output throughput", speed, "higher"))
            rows.append(row("serving", case, system, "normalised latency p95", 1 / speed))
    return rows


def results(rows: list[Row]) -> dict:
    return dict(
        set="made-up", machine="a machine, 2 threads", commit="abc", versions={"relay": "0"},
        finished="2026-01-01T00:00:00", seconds=60.0, most_load=0.1, tasks=2, tasks_done=2,
        left_out=["operator, vllm: vLLM is not installed (/a/path is missing): run that"],
        rows=rows,
    )  # fmt: skip


def report(tmp_path, rows: list[Row]) -> str:
    document.write([results(rows)], tmp_path / "docs/evaluation.md", tmp_path / "docs/images")
    return (tmp_path / "docs/evaluation.md").read_text()


def test_figures_are_drawn_and_linked(tmp_path):
    text = report(tmp_path, operator(1.0) + serving("throughput"))
    for name in ("operator-latency", "operator-batch", "operator-gain", "throughput"):
        image = f"images/evaluation-made-up-{name}.png"
        assert f"]({image})" in text
        assert (tmp_path / "docs" / image).stat().st_size > 10000
    assert "2.00x" in text, "throughput over llama-server's"
    assert "operator, vllm: vLLM is not installed" in text and "/a/path" not in text
    assert "Not measured: " not in text
    for name in ("trace", "arrivals", "vllm-steps"):
        title = document.TEXTS[name]["title"]
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        assert "Not measured in these results." in section


@pytest.mark.parametrize(
    "gain, said", [(1.0, "**Agrees** with"), (0.3, "in direction, not in size")]
)
def test_the_verdict_follows_the_numbers(tmp_path, gain, said):
    text = report(tmp_path, operator(gain))
    assert said in text
    formula = 32 * (16384 + 128) / (16384 + 32 * 128)
    assert f"up to {formula * gain:.2f}x" in text or f"up to {formula * gain:.1f}x" in text


def test_the_highest_rate_that_holds(tmp_path):
    rows = []
    for system, latencies in (("relay", (0.1, 0.15, 0.9)), ("llama-server", (0.1, 0.5, 0.9))):
        for rate, latency in zip((1.0, 2.0, 4.0), latencies, strict=True):
            case = dict(
                experiment="arrivals", model="tiny", prompt=64, rate=rate, input=1, output=1
            )
            rows.append(row("serving", case, system, "normalised latency p95", latency))
            rows.append(row("serving", case, system, "bound", 0.2, "", 1))
    text = report(tmp_path, rows)
    assert "Relay: holds 2 requests/s" in text and "llama-server: holds 1 requests/s" in text
    assert "**Agrees**: a higher rate holds" in text


def test_what_there_was_no_time_for_is_named(tmp_path):
    found = results(operator(1.0)) | {"missing": ["serving: relay, levels", "trace: tiny"]}
    document.write([found], tmp_path / "docs/evaluation.md", tmp_path / "docs/images")
    text = (tmp_path / "docs/evaluation.md").read_text()
    assert "Not measured: serving: relay, levels; trace: tiny.\n" in text


def test_how_many_were_measured_is_told(tmp_path):
    rows = [r for r in operator(1.0) if r.system in ("relay", "relay-off", "formula")]
    assert "*made-up; medians of 5.*" in report(tmp_path, rows)
    case = rows[0].case
    text = report(tmp_path, [*rows, row("operator", case, "ggml", "latency", 1.0, n=3)])
    assert "*made-up; medians of 3 or 5.*" in text


def test_every_part_has_its_text():
    assert {part.name for part in document.PARTS} | {"introduction"} == document.TEXTS.keys()


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="cannot read"):
        store.read(tmp_path)
    (tmp_path / "results.json").write_text('{"rows": [{"median": 1}]}')
    with pytest.raises(EvaluationError, match="is no results.json"):
        store.read(tmp_path)
