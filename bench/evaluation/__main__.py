"""The paper's evaluation, reproduced and extended, on this machine and against real peers.

    .venv/bin/python bench/evaluation run --budget 15      # the set `bench`: what `make bench` runs
    .venv/bin/python bench/evaluation run --set full       # everything; or --set my.toml
    .venv/bin/python bench/evaluation run --device cuda    # what runs on an NVIDIA GPU
    .venv/bin/python bench/evaluation report build/evaluation/bench/results.json
    .venv/bin/python bench/evaluation compare before/results.json after/results.json

A run that was stopped, or that had no time for all, goes on when it is started again. A task that
fails ends nothing but itself: it is named at the end, with status 1, and the next run tries it
again after all others. Results lie in build/evaluation/<set>: results.json, a CSV for each section.
`report` draws the plots and writes docs/evaluation.md from any number of results.
"""

import argparse
import math
import os
import signal
import sys
import traceback
from pathlib import Path

import compare
import problems
import store
from programs import ROOT, Programs
from progress import Progress
from tasks import EvaluationError, Task, reason_of


def run(args: argparse.Namespace) -> None:
    file = problems.find(args.set or {"cpu": "bench", "cuda": "cuda"}[args.device])
    checked = problems.load(file)
    out = args.out or ROOT / "build/evaluation" / file.stem
    programs = Programs(args.build.resolve(), args.device, args.trace, out)
    tasks = problems.tasks_of(checked, programs, args.only)
    guess = sum(task.seconds for task in tasks)
    if args.list:
        for task in tasks:
            print(f"{task.seconds:7.0f} s  {task.name}")
        print(f"{guess:7.0f} s  {len(tasks)} tasks, guessed")
        print_left_out(programs.left_out)
        return
    identity = {
        "set": file.stem,
        "machine": store.machine(),
        "commit": store.commit(),
        "versions": store.versions(args.build / "bin/relay"),
    }
    results = store.Store(out, identity, args.fresh)
    # What has failed before comes last, so that it cannot hold up the others a second time.
    todo = sorted((t for t in tasks if not results.has(t)), key=lambda t: bool(results.failure(t)))
    done = [task for task in tasks if results.has(task)]
    if done:
        print(f"{len(done)} of {len(tasks)} tasks were done before", file=sys.stderr)
    print_left_out(programs.left_out)
    if (load := os.getloadavg()[0]) > 0.5 and todo:
        print(f"warning: the machine is busy (load {load:.1f}): expect noise", file=sys.stderr)
    skipped, failed = 0, []
    try:
        with Progress([t.seconds for t in todo], [results.seconds(t) for t in done]) as progress:
            for task in todo:
                if not progress.fits(task.seconds, 60 * args.budget):
                    progress.skip(task.seconds)
                    skipped += 1
                    continue
                progress.begin(task.name, task.seconds)
                programs.begin(task.seconds)
                if reason := attempt(task, programs, results, progress):
                    failed.append(f"  {task.name}: {reason.splitlines()[0]}")
    finally:  # what a run that is stopped has measured can be reported, too
        print(results.write(tasks, programs.left_out))
    if skipped:
        said = f"{skipped} of {len(tasks)} tasks do not fit into {args.budget:g} minutes"
        print(f"{said}; the same command goes on with them", file=sys.stderr)
    if failed:
        raise EvaluationError(
            f"{len(failed)} of {len(tasks)} tasks failed; the same command tries them again, after "
            "those not yet tried:\n" + "\n".join(failed)
        )


def attempt(task: Task, programs: Programs, results: store.Store, progress: Progress) -> str:
    """Runs a task and keeps its results; why it, or a part of it, failed, or "". Whatever goes
    wrong in one task, be it an answer of a peer that nobody foresaw, is no reason to lose any."""
    try:
        rows = task.run()
        if not rows:
            raise EvaluationError("it measured nothing")
    except EvaluationError as error:
        reason = reason_of(error)
        print(f"\nfailed: {task.name}: {reason}", file=sys.stderr)
    except Exception as error:
        reason = reason_of(error)
        print(f"\nfailed: {task.name}\n{traceback.format_exc()}", file=sys.stderr)
    else:
        results.put(task, rows, progress.end(), programs)
        return "; ".join(programs.failures)
    progress.skip(task.seconds)
    results.put_failure(task, reason)
    return reason


def print_left_out(reasons: list[str]) -> None:
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)


def report(args: argparse.Namespace) -> None:
    import document  # matplotlib, which a machine that only measures may lack

    document.write([store.read(path) for path in args.results], args.document, args.images)
    print(args.document)


def compare_two(args: argparse.Namespace) -> None:
    text, worse = compare.report(store.read(args.before), store.read(args.after))
    print(text)
    if worse:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="run | report | compare")
    add = commands.add_parser("run", help="measure a set of problems").add_argument
    add("--set", help="a file of bench/evaluation/problems, or any other such file")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--only", action="append", default=[], metavar="SECTION", help="may be repeated")
    add("--build", type=Path, default=ROOT / "build/release", help="build folder")
    add("--trace", default=os.environ.get("RELAY_TRACE"), help="a trace in Mooncake's format")
    add("--out", type=Path, help="folder of the results (build/evaluation/<set>)")
    add("--budget", type=float, default=math.inf, metavar="MINUTES", help="begin no task that"
        " would end later; the report names what is missing")  # fmt: skip
    add("--fresh", action="store_true", help="forget what was measured before")
    add("--list", action="store_true", help="only tell the tasks and their guessed time")
    commands.choices["run"].set_defaults(do=run)
    add = commands.add_parser("report", help="draw plots, write docs/evaluation.md").add_argument
    add("results", type=Path, nargs="+", help="results.json files or their folders")
    add("--document", type=Path, default=ROOT / "docs/evaluation.md")
    add("--images", type=Path, default=ROOT / "docs/images")
    commands.choices["report"].set_defaults(do=report)
    add = commands.add_parser("compare", help="what became faster or slower").add_argument
    add("before", type=Path)
    add("after", type=Path)
    commands.choices["compare"].set_defaults(do=compare_two)
    return parser.parse_args()


def main() -> None:
    def stop(*_args) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    args = parse_arguments()
    try:
        args.do(args)
    except EvaluationError as error:
        sys.exit(f"evaluation: {error}")
    except KeyboardInterrupt:
        sys.exit("\nevaluation: stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
