"""docs/evaluation.md, from results and figures.toml: each figure with the paper's claim beside it,
and whether what was measured agrees with it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import findings
import plots
import tomllib
from tasks import Row

TEXTS = tomllib.loads((Path(__file__).resolve().parent / "figures.toml").read_text())


@dataclass(frozen=True)
class Part:
    """One figure, or table. Its text is figures.toml's of that name. served: by an engine, to
    requests that are to be described."""

    name: str
    rows: Callable[[list[Row]], list[Row]]
    draw: Callable[[list[Row], str, Path], Path | None] | None
    found: Callable[[list[Row]], list[str]]
    served: bool = False


def section(name: str, **case) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [r for r in plots.choose(rows, **case) if r.section == name]


def operator_rows(rows: list[Row]) -> list[Row]:
    found = [r for r in rows if r.section in ("operator", "cuda_operator")]
    # Of the GPU's problems the paper's sweep: its models, and one prefix that all share.
    found = [r for r in found if r.case["model"] != r.case.get("heads")]
    return [r for r in found if r.case.get("levels", "").count("[") <= 2]


def vllm_serving(at_once: bool) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [
        r
        for name in ("vllm_serving", "vllm_throughput")
        for r in section(name, prompts=1)(rows)
        if (r.case["rate"] == "all at once") == at_once
    ]


def vllm_prompts(rows: list[Row]) -> list[Row]:
    """All at once over several prompts, beside one: of those lengths that have several."""
    found = section("vllm_serving", rate="all at once")(rows)
    lengths = {r.case["prompt"] for r in found if r.case["prompts"] > 1}
    return [r for r in found if r.case["prompt"] in lengths]


def serving(experiment: str) -> Callable[[list[Row]], list[Row]]:
    return section("serving", experiment=experiment)


PARTS = [
    Part("operator-latency", operator_rows, plots.operator_latency, findings.operator_latency),
    Part("operator-batch", operator_rows, plots.operator_batch, findings.operator_batch),
    Part("operator-gain", operator_rows, plots.operator_gain, findings.operator_gain),
    Part("kernels", section("kernels"), None, findings.kernels),
    Part("llama-cpp", section("llama_cpp"), None, findings.llama_cpp),
    Part("vllm-steps", section("vllm_steps"), plots.decode_steps, findings.decode_steps),
    Part("throughput", serving("throughput"), plots.throughput, findings.throughput, served=True),
    Part(
        "vllm-throughput",
        vllm_serving(True),
        plots.throughput,
        findings.vllm_throughput,
        served=True,
    ),
    Part("arrivals", serving("arrivals"), plots.arrivals, findings.arrivals, served=True),
    Part("vllm-arrivals", vllm_serving(False), plots.arrivals, findings.arrivals, served=True),
    Part("prompts", serving("prompts"), plots.prompts, findings.by_field("prompts"), served=True),
    Part(
        "vllm-prompts",
        vllm_prompts,
        plots.prompts,
        findings.by_field("prompts", "vllm with Relay"),
        served=True,
    ),
    Part("without", serving("without"), plots.without, findings.by_field("without"), served=True),
    Part("levels", serving("levels"), plots.levels, findings.by_field("levels"), served=True),
    Part("sharers", serving("sharers"), plots.sharers, findings.sharers, served=True),
    Part("trace", section("trace"), plots.trace_levels, findings.trace),
    Part("replay", serving("trace"), plots.replay, findings.replay, served=True),
    Part("errors", section("quality", what="operator"), plots.errors, findings.errors),
    Part("answers", section("quality", what="answers"), None, findings.answers),
    Part("little-model", section("little_model"), None, findings.little_model),
]


def origin(results: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v)
    return f"{results['machine']}; commit {results['commit']}; {versions}"


def write(all_results: list[dict], document: Path, images: Path) -> None:
    document.parent.mkdir(parents=True, exist_ok=True)
    text = TEXTS["introduction"] + "\n## Where these results are from\n\n"
    for results in all_results:
        text += f"- **{results['set']}**: {origin(results)}. {results['tasks_done']} of "
        text += f"{results['tasks']} tasks, {results['seconds'] / 60:.0f} minutes, until "
        text += f"{results['finished']}; highest load average {results['most_load']:.1f}.\n"
        if results["most_load"] > 2 * (machine_threads(results) or 1e9):
            text += "  Others were at work on this machine: mistrust the numbers.\n"
        for reason in results["left_out"]:
            text += f"  Left out: {shortly(reason)}.\n"
        failed = results.get("failed", {})
        if missing := [name for name in results.get("missing", []) if name not in failed]:
            text += f"  Not measured: {'; '.join(missing)}.\n"
        for name, reason in failed.items():
            text += f"  Failed: {name} ({shortly(reason)}).\n"
    for part in PARTS:
        about = TEXTS[part.name]
        text += f"\n## {about['title']}\n\n**The paper**: {about['claim']}\n{about['about']}"
        said = [paragraph(part, results, document, images) for results in all_results]
        said = [s for s in said if s]
        text += "".join(said) or "\nNot measured in these results.\n"
    document.write_text(text)


def machine_threads(results: dict) -> int | None:
    for word in results["machine"].split(", "):
        if word.endswith(" threads"):
            return int(word.split()[0])
    return None


def shortly(reason: str) -> str:
    """Without paths of the machine it was run on, and without logs."""
    return reason.split("\n")[0].split(" (")[0].split(": run ")[0].split("; ")[0].rstrip(".:")


def paragraph(part: Part, results: dict, document: Path, images: Path) -> str:
    rows = part.rows(results["rows"])
    if not rows:
        return ""
    text = "\n"
    note = f"{results['set']}: {results['machine']}, commit {results['commit']}"
    if part.draw is not None:
        path = part.draw(rows, note, images / f"evaluation-{results['set']}-{part.name}.png")
        if path is not None:
            link = os.path.relpath(path, document.parent)
            text += f"![{TEXTS[part.name]['title']}]({link})\n\n"
    sentences = part.found(rows)
    if part.served:
        sentences += findings.setting(rows)
    counts = sorted({r.n for r in rows if r.better and r.n > 1})
    once = "; measured once" if any(r.better for r in rows) else ""
    measured = f"; medians of {' or '.join(map(str, counts))}" if counts else once
    text += f"*{results['set']}{measured}.*\n\n" if sentences else ""
    return text + "\n".join(sentences) + "\n"
