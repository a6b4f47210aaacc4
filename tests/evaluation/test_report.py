"""The report from made-up results: each figure is drawn, each section says what was found."""

import document
import findings
import made_up
import plots
import pytest
import store
from made_up import operator, row
from tasks import EvaluationError, Row


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
    text = report(tmp_path, operator(1.0) + made_up.throughput())
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
    "gain, said", [(1.0, "**Agrees**: reading is the limit"), (0.3, "in direction, not in size")]
)
def test_the_verdict_follows_the_numbers(tmp_path, gain, said):
    text = report(tmp_path, operator(gain))
    assert said in text
    formula = 32 * (16384 + 128) / (16384 + 32 * 128)
    assert f"up to {formula * gain:.2f}x" in text or f"up to {formula * gain:.1f}x" in text


def test_the_highest_rate_that_holds(tmp_path):
    seconds = {"relay": (0.1, 0.15, 0.9), "llama-server": (0.1, 0.5, 0.9)}
    text = report(tmp_path, made_up.arrivals(seconds))
    assert "Relay: holds 2 requests/s" in text and "llama-server: holds 1 requests/s" in text
    assert "**Agrees**: Relay holds 2 requests/s, llama-server 1 requests/s." in text


def test_what_holds_no_rate_is_not_said_to_hold_one():
    rows = made_up.arrivals({"relay": (0.195, 0.9, 0.9), "llama-server": (0.5, 0.5, 0.9)})
    text = "\n".join(findings.arrivals(rows))
    assert "llama-server: holds none of the rates measured with" in text
    assert "**Agrees**: Relay holds 1 requests/s, llama-server none of the rates measured." in text
    assert "200 ms/token (its upper quartile does not)." in text
    rows = made_up.arrivals({"relay": (0.5, 0.9), "llama-server": (0.5, 0.9)})
    assert "**Undecided**: neither holds any" in "\n".join(findings.arrivals(rows))


def test_what_is_slower_is_told_with_its_spread():
    case = dict(model="phi-2", prefix=64, batch=8)

    def told(gain: float, high: float) -> str:
        row = Row("operator", case, "relay", "speed-up", "x", "higher", gain, 0.8, high, 5)
        return "\n".join(findings.losses([row]))

    assert "beyond the spread in 1 of them: 0.90x (0.80x to 0.95x)" in told(0.9, 0.95)
    assert "beyond the spread in none of them: 0.90x (0.80x to 1.10x)" in told(0.9, 1.1)
    assert not told(0.96, 0.97)


def test_no_gain_is_no_gain_in_direction(tmp_path):
    for name in ("operator-latency", "operator-gain"):
        found = document.paragraph(part(name), results(operator(0.03)), tmp_path / "e.md", tmp_path)
        assert "**Does not agree** here" in found and "in direction" not in found


@pytest.mark.parametrize(
    "ours, theirs, said",
    [
        ((0.1, 0.1, 0.1), (0.1, 0.1, 0.1), "**Undecided**: both hold the highest rate measured"),
        ((0.1, 0.9, 0.9), (0.1, 0.9, 0.9), "**Undecided**: both hold the same of the rates"),
        ((0.1, 0.9, 0.9), (0.1, 0.1, 0.9), "**Does not agree** here: vLLM with Relay holds 1"),
        # What was not tried, as a lower rate broke the bound, holds not.
        ((0.1, 0.1, 0.9), (0.1, 0.9), "**Agrees**: vLLM with Relay holds 2 requests/s, vLLM 1"),
    ],
)
def test_rates_of_vllm_are_judged(ours, theirs, said):
    rows = made_up.arrivals({"vllm with Relay": ours, "vllm": theirs}, "vllm_serving")
    assert said in "\n".join(findings.arrivals(rows))


def test_without_a_bound_nothing_is_decided():
    rows = made_up.arrivals({"relay": (0.1, 0.1), "llama-server": (0.1, 0.2)}, bound=0)
    assert "**Undecided**: no bound was stated" in "\n".join(findings.arrivals(rows))


def part(name: str) -> document.Part:
    (found,) = [part for part in document.PARTS if part.name == name]
    return found


VLLM_RATES = (2.0, 4.0, 8.0, "all at once")
# A part, rows for it, and what its text says. Each is drawn that has a figure.
SECTIONS = [
    ("operator-latency", made_up.operator(0.3), "slower by more than 5 %"),
    ("operator-latency", made_up.cuda(), "which counts reading alone. The step takes"),
    ("operator-batch", made_up.operator(0.3), "**Agrees**: with sharing it grows"),
    ("operator-batch", made_up.cuda(), "FlashInfer decode"),
    ("operator-gain", made_up.operator(0.3), "| cost model |"),
    ("operator-gain", made_up.cuda(), "50% of what the formula says"),
    ("kernels", made_up.kernels(), "| f16 | 64 | 1.0 | 32.0 |"),
    ("llama-cpp", made_up.llama_cpp(), "| decode | 1k | 32 | 320.0 | 256.0 | 480.0 | 1.50x |"),
    ("vllm-steps", made_up.vllm_steps(), "With Relay a step is 1.11x as fast"),
    ("vllm-steps", made_up.vllm_steps((64, 1024, 4096, 8192)), "**Agrees**"),
    ("vllm-steps", made_up.vllm_steps(batches=(8, 16)), "less than the 7.22x that the formula"),
    ("throughput", made_up.throughput(1.5), "sharing alone raises throughput by up to 1.50x"),
    ("throughput", made_up.throughput(1.0), "**Does not agree** here: with sharing alone"),
    ("throughput", made_up.throughput(), "costs $0.09 (stated, not measured): Llama-3.2-1B, 4"),
    ("throughput", made_up.throughput(), "Llama-2-7B, 2 layers, weights in q4_0; 16 requests"),
    ("vllm-throughput", made_up.vllm(), "it reaches up to 1.25x of what prefix caching does"),
    ("vllm-throughput", made_up.vllm(n=1), "**Undecided**: 1.25x of what prefix caching"),
    ("arrivals", made_up.arrivals({"relay": (0.1, 0.3, 0.9)}), "Relay: holds 1 requests/s"),
    ("vllm-arrivals", made_up.vllm(rates=VLLM_RATES), "vLLM over vLLM with Relay: 1.25x"),
    ("prompts", made_up.over("prompts", "prompts", [1, 4, 8, 16]), "1: 2.00x, 4: 2.00x, 8:"),
    ("vllm-prompts", made_up.vllm((1, 4, 16)), "vLLM with Relay's throughput over that of vLLM: 1"),
    ("without", made_up.over("without", "without", [0.0, 0.5, 1.0]), "0%: 2.00x, 50%: 2.00x"),
    ("levels", made_up.over("levels", "levels", ["1x64+2x32+4x8", "1x64+4x32"]),
     "1x64+4x32: 2.00x, 1x64+2x32+4x8: 2.00x"),
    ("sharers", made_up.over("sharers", "requests", [1, 4, 8, 16]), "a step takes 4.0 times"),
    ("trace", made_up.trace(), "| Mistral-7B, f16 | 50 | none | 50 | 12% (1.13x) |"),
    ("replay", made_up.over("trace", "prompt", [0]), "time to first token p50: Relay 2.00x"),
    ("replay", made_up.over("trace", "prompt", [0], {"vllm with Relay": 9.0, "vllm": 6.0}),
     "output throughput: vLLM with Relay 1.50x as good as vLLM"),
    ("errors", made_up.errors(), "| q8_0 | realistic | 5.0e-03 | 1.0e-02 | none |"),
    ("answers", made_up.answers(1.0, None), "**Agrees**: all answers stay"),
    ("answers", made_up.answers(0.9, 0.03), "**Agrees**: answers part only at near ties"),
    ("answers", made_up.answers(0.9, 0.5), "**Does not agree** here: answers part where"),
    ("answers", made_up.answers(0.9, None), "**Undecided**"),
    ("little-model", made_up.little_model(), "| Relay, a tuned prefix in place of the prompt | 24"),
]  # fmt: skip


@pytest.mark.parametrize("name, rows, said", SECTIONS)
def test_every_section_is_drawn_and_worded(tmp_path, name, rows, said):
    found = document.paragraph(part(name), results(rows), tmp_path / "e.md", tmp_path)
    assert said in found
    assert "nan" not in found and "inf" not in found
    if part(name).draw is not None:
        (image,) = tmp_path.glob("*.png")
        assert f"]({image.name})" in found and image.stat().st_size > 10000


def test_every_section_is_among_them():
    assert {name for name, _, _ in SECTIONS} == {part.name for part in document.PARTS}


def test_a_gpus_results_are_not_held_against_a_cpus_model():
    text = "\n".join(findings.operator_latency(document.operator_rows(made_up.cuda())))
    assert "cost model" not in text and "others at work" not in text


def test_only_the_papers_models_are_drawn():
    shown = document.operator_rows(made_up.cuda())
    assert {row.case["model"] for row in shown} == {
        "Llama-2-7B", "Llama-2-13B", "Mistral-7B", "phi-2", "Llama-3.2-1B"
    }  # fmt: skip
    titles = [case["model"] for case in plots.panels_of(shown)]
    assert titles[0] == "Llama-2-7B" and titles[-1] == "Llama-3.2-1B", "in the paper's order"


def test_systems_of_one_figure_can_be_told_apart():
    figures = [
        ["relay", "relay-off", "ggml", "vllm", "vllm with Relay", "cost model"],
        ["relay", "relay-off", "fa3", "fi", "fi-cascade", "fi-cascade-fa2", "limit"],
        ["relay", "relay-off", "relay, llama.cpp's attention", "llama-server"],
        ["vllm", "vllm, no prefix caching", "vllm with Relay"],
    ]
    for systems in figures:
        colours, markers, _ = zip(*(plots.LOOKS[s] for s in systems), strict=True)
        assert len(set(colours)) == len(set(markers)) == len(systems)
    hatches = [plots.fill_of(system)["hatch"] for system in figures[-1] + figures[-2]]
    assert len(set(hatches)) == len(hatches), "bars by more than their colour"


def test_a_line_far_above_the_others_does_not_press_them_flat():
    near = made_up.arrivals({"vllm": (0.1, 0.2, 0.4), "vllm with Relay": (0.1, 0.1, 0.2)})
    far = near + made_up.arrivals({"vllm, no prefix caching": (9.0,)})
    latency = "normalised latency p95"
    assert not plots.far_apart(plots.choose(near, latency))
    assert plots.far_apart(plots.choose(far, latency))


def test_what_there_was_no_time_for_is_named(tmp_path):
    found = results(operator(1.0)) | {"missing": ["serving: relay, levels", "trace: tiny"]}
    document.write([found], tmp_path / "docs/evaluation.md", tmp_path / "docs/images")
    text = (tmp_path / "docs/evaluation.md").read_text()
    assert "Not measured: serving: relay, levels; trace: tiny.\n" in text


def test_what_failed_is_named_with_its_reason(tmp_path):
    failed = {
        "serving: relay": "relay ended with status 1; its log (/a/b) ends with\n    no memory"
    }
    found = results(operator(1.0)) | {"missing": ["serving: relay", "trace: t"], "failed": failed}
    document.write([found], tmp_path / "docs/evaluation.md", tmp_path / "docs/images")
    text = (tmp_path / "docs/evaluation.md").read_text()
    assert "Not measured: trace: t.\n" in text
    assert "Failed: serving: relay (relay ended with status 1).\n" in text


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
