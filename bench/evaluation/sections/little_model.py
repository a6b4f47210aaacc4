"""Whether what is answered is right: the little model is asked for facts that stand in its prompt
(scripts/demo/answers.py)."""

import importlib

from fields import Field
from programs import Programs
from tasks import EvaluationError, Row, Task

SECTION = "little_model"
# What the demo calls a system, and how long it is guessed to take.
ENGINES = {
    "relay": ({"relay serve": "relay"}, 8),
    "relay-off": ({"relay serve, sharing off": "relay-off"}, 8),
    "llama-server": ({"llama-server": "llama-server"}, 8),
    "vllm": ({"vLLM": "vllm", "vLLM with Relay": "vllm with Relay"}, 60),
}
FIELDS = {
    "questions": Field(int, default=64, least=1),
    "systems": Field(str, many=True, choices=tuple(ENGINES)),
    "if_installed": Field(str, many=True, default=[], choices=("vllm",)),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    asked = list(dict.fromkeys(problem["systems"]))
    for name in problem["if_installed"]:
        there = programs.if_there(f"{SECTION}, {name}", programs.vllm_python) is not None
        if there and name not in asked:
            asked.append(name)
    answers = importlib.import_module("answers")
    if not answers.MADE.joinpath("little.gguf").is_file():
        raise EvaluationError("the little model is not there; run: make little-model")
    if problem["questions"] > len(answers.task.NAMES):
        most = len(answers.task.NAMES)
        raise EvaluationError(f"{SECTION}: its prompt holds {most} facts, no more questions")
    return [[task_of(problem["questions"], programs, system, answers) for system in asked]]


def task_of(questions: int, programs: Programs, system: str, answers) -> Task:
    if system == "vllm":
        programs.vllm_python()
    else:
        programs.binary("llama-server" if system == "llama-server" else "relay")
    names, seconds = ENGINES[system]

    def run() -> list[Row]:
        exam = answers.Exam.draw(questions)
        folder = programs.out / "little_model"
        try:
            if system == "vllm":
                folder.mkdir(parents=True, exist_ok=True)
                given = answers.ask_vllm(programs.vllm_python(), exam, folder)
            else:
                given = answers.ask_own(exam, programs.build, folder, *names)
        except answers.DemoError as error:
            raise EvaluationError(str(error)) from error
        rows = []
        for name, ours in names.items():
            share = exam.right(given[name]) / questions
            case = {"model": "little", "questions": questions}
            row = (SECTION, case, ours, "answers right", "", "higher", share, share, share, 1)
            rows.append(Row(*row))
        return rows

    return Task(SECTION, {"system": system, "questions": questions}, seconds, run)
