"""Whether what is answered is right: the little model is asked for facts that stand in its prompt
(scripts/demo/answers.py), or that a tuned prefix stands for."""

import importlib
import json
from pathlib import Path

from fields import Field
from programs import ROOT, Programs, clean_environment, servers_errors
from tasks import EvaluationError, Row, Task

SECTION = "little_model"
# What the demo calls a system, and how long it is guessed to take.
ENGINES = {
    "relay": ({"relay serve": "relay"}, 2),
    "relay-off": ({"relay serve, sharing off": "relay-off"}, 2),
    "llama-server": ({"llama-server": "llama-server"}, 2),
    "vllm": ({"vLLM": "vllm", "vLLM with Relay": "vllm with Relay"}, 30),
}
TUNED = "relay, tuned prefix"
FIELDS = {
    "questions": Field(int, default=64, least=1),
    "systems": Field(str, many=True, choices=(*ENGINES, TUNED)),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    asked = list(dict.fromkeys(problem["systems"]))
    answers = importlib.import_module("answers")
    if not answers.MADE.joinpath("little.gguf").is_file():
        raise EvaluationError("the little model is not there; run: make little-model")
    if problem["questions"] > len(answers.task.NAMES):
        most = len(answers.task.NAMES)
        raise EvaluationError(f"{SECTION}: its prompt holds {most} facts, no more questions")
    return [[task_of(problem["questions"], programs, system, answers) for system in asked]]


def task_of(questions: int, programs: Programs, system: str, answers) -> Task:
    if system == TUNED:
        return tuned_task(programs, answers)
    if system == "vllm":
        programs.vllm_python()
    else:
        programs.binary("llama-server" if system == "llama-server" else "relay")
    names, seconds = ENGINES[system]

    def run() -> list[Row]:
        exam = answers.Exam.draw(questions)
        folder = programs.out / "little_model"
        with servers_errors():
            if system == "vllm":
                programs.note_vllm()
                folder.mkdir(parents=True, exist_ok=True)
                given = answers.ask_vllm(programs.vllm_python(), exam, folder)
            else:
                given = answers.ask_own(exam, programs.build, folder, *names)
        return [row_of(ours, exam.right(given[name]), questions) for name, ours in names.items()]

    return Task(SECTION, {"system": system, "questions": questions}, seconds, run)


def row_of(system: str, right: int, questions: int) -> Row:
    case, share = {"model": "little", "questions": questions}, right / questions
    return Row(SECTION, case, system, "answers right", "", "higher", share, share, share, 1)


# --- A tuned prefix in place of the prompt --------------------------------------------------------


def tuned_task(programs: Programs, answers) -> Task:
    """Of as many facts as the prefix is tuned for; the prompt is the question alone."""
    python, relay = programs.vllm_python(), programs.binary("relay")

    def run() -> list[Row]:
        from servers import Server, free_port
        from users import run_round

        programs.note_versions(python, "torch", "transformers", "peft")
        folder = programs.out / "little_model/tuned"
        folder.mkdir(parents=True, exist_ok=True)
        programs.run([python, Path(__file__).resolve().parents[1] / "tune_prefix.py", folder])
        prefix = folder / "prefix.gguf"
        converter = [ROOT / ".venv-jax/bin/python", ROOT / "scripts/kv_prefix_from_peft.py"]
        programs.run([*converter, folder, prefix])
        facts = json.loads((folder / "facts.json").read_text())
        command = [relay, "serve", "-m", answers.MADE / "little.gguf", "--port", free_port()]
        command += ["-c", 4096, "--kv-prefix", prefix]
        command = [str(part) for part in command]
        log = folder / "relay.log"
        with servers_errors(), Server(TUNED, command, clean_environment(), log) as server:
            server.wait_ready(120)
            bodies = [body_of(question, answers.ANSWER_TOKENS) for question, _ in facts]
            given = [answer.text for answer in run_round(server, bodies, TUNED)]
        right = sum(text == answer for text, (_, answer) in zip(given, facts, strict=True))
        return [row_of(TUNED, right, len(facts))]

    return Task(SECTION, {"system": TUNED}, 20, run)


def body_of(question: str, tokens: int) -> dict:
    return dict(
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
