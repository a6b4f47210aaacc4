"""Problem files: TOML, an array of tables for each section. `problems/` has what `make` runs."""

import itertools
from pathlib import Path

import sections
import tomllib
from fields import check
from programs import Programs
from tasks import EvaluationError, Task

FOLDER = Path(__file__).resolve().parent / "problems"


def find(name: str) -> Path:
    path = Path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise EvaluationError(f"there is no problem file {path}; known sets: {known}")
    return path


def load(path: Path) -> dict[str, list[dict]]:
    """Section -> its problems, checked."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # text that is no UTF-8 among it
        raise EvaluationError(f"{path.name}: this is no TOML: {error}") from error
    if not isinstance(data.pop("about", ""), str):
        raise EvaluationError(f"{path.name}: about: has to be a text")
    checked = {}
    for name, problems in data.items():
        section = sections.ALL.get(name)
        if section is None:
            raise EvaluationError(
                f"{path.name}: there is no section '{name}'; sections are {', '.join(sections.ALL)}"
            )
        if not isinstance(problems, list):
            raise EvaluationError(f"{path.name}: {name}: write [[{name}]], there may be several")
        checked[name] = [
            check(problem, section.FIELDS, f"{path.name}: {name}[{i}]")
            for i, problem in enumerate(problems)
        ]
    if not any(checked.values()):
        raise EvaluationError(f"{path.name}: there is no problem in it")
    return checked


def tasks_of(problems: dict[str, list[dict]], programs: Programs, only: list[str]) -> list[Task]:
    """All tasks: each problem's first point in the file's order, then each one's second, so that a
    run without the time for all lacks points and not figures. Raises EvaluationError for a peer
    that is missing."""
    for name in only:
        if name not in problems:
            raise EvaluationError(f"--only {name}: the problem file has no such section")
    points = [
        sections.ALL[name].points(problem, programs)
        for name, items in problems.items()
        if not only or name in only
        for problem in items
    ]
    made = [
        task
        for turn in itertools.zip_longest(*points, fillvalue=[])
        for point in turn
        for task in point
    ]
    keys = set()
    for task in made:
        if task.key in keys:
            raise EvaluationError(f"two problems of the file ask for the same: {task.name}")
        keys.add(task.key)
    return made
