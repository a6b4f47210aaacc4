"""Whether answers stay right: the little model is asked in each engine for facts of its prompt.

usage: python scripts/demo/answers.py [--questions N]          (make demo asks, too)

A model with random weights shows that two engines say the same, not that what they say is right.
This one is trained (scripts/little_model) to look facts up in its system prompt. Engines: relay
serve with sharing on and off, llama-server, and, where plugins/vllm/setup_vllm.sh has put one, vLLM
with and without Relay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from console import DemoError, Ticker, say
from servers import Server, clean_environment
from setup import ROOT, Setup, llama_server, relay_server
from users import run_round

LITTLE_MODEL = ROOT / "scripts/little_model"
sys.path.insert(0, str(LITTLE_MODEL))

import task  # noqa: E402
import vocabulary  # noqa: E402

MADE = ROOT / "build/little_model"
ANSWER_TOKENS = 8  # twice what an answer has
AT_ONCE = 16
SEED = 17


@dataclass
class Exam:
    """A system prompt that tells of every person, and questions about some of them."""

    prompt: str
    facts: list[task.Fact]

    @staticmethod
    def draw(questions: int, seed: int = SEED) -> Exam:
        facts = task.draw_facts(len(task.NAMES), seed)
        return Exam(task.system_prompt(facts), facts[:: len(facts) // questions][:questions])

    def chats(self) -> list[list[dict]]:
        system = {"role": "system", "content": self.prompt}
        return [[system, {"role": "user", "content": fact.question()}] for fact in self.facts]

    def bodies(self) -> list[dict]:
        options = {"temperature": 0, "max_tokens": ANSWER_TOKENS, "stream": True}
        options["stream_options"] = {"include_usage": True}
        return [{"messages": chat, **options} for chat in self.chats()]

    def right(self, answers: list[str]) -> int:
        return sum(a == fact.answer() for a, fact in zip(answers, self.facts, strict=True))


def make_little_model() -> None:
    if subprocess.run([LITTLE_MODEL / "make.sh"], env=clean_environment()).returncode != 0:
        raise DemoError("the little model could not be made, see above")


def little_setup(exam: Exam, build: Path, out: Path) -> Setup:
    out.mkdir(parents=True, exist_ok=True)
    prompt_file = out / "prompt.txt"
    prompt_file.write_text(exam.prompt)
    tokens = len(vocabulary.encode(exam.prompt))
    model = MADE / "little.gguf"
    return Setup(model, prompt_file, exam.prompt, tokens, AT_ONCE, 1, ANSWER_TOKENS, build, out)


def ask_server(server: Server, exam: Exam) -> list[str]:
    server.wait_ready(120)
    return [answer.text for answer in run_round(server, exam.bodies(), server.name)]


def vllm_python() -> Path | None:
    """Of the vLLM that setup_vllm.sh has installed, complete with its stamp."""
    default = Path.home() / ".cache/relay/vllm-0.32.0"
    venv = Path(os.environ.get("RELAY_VLLM_VENV", default))
    return venv / "bin/python" if (venv / "relay-stamp").is_file() else None


def ask_vllm(python: Path, exam: Exam, out: Path) -> dict[str, list[str]]:
    asked, answered = out / "chats.json", out / "vllm-answers.json"
    asked.write_text(json.dumps(exam.chats()))
    command = [python, LITTLE_MODEL / "ask_vllm.py", MADE / "hf", asked, answered]
    with Ticker(lambda: "vLLM answers, with and without Relay"):
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise DemoError(f"vLLM could not be asked:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    answers = json.loads(answered.read_text())
    return {"vLLM": answers["own"], "vLLM with Relay": answers["relay"]}


OWN = {
    "relay serve": lambda setup: relay_server(setup, "on"),
    "relay serve, sharing off": lambda setup: relay_server(setup, "off"),
    "llama-server": lambda setup: llama_server(setup, "on", AT_ONCE),
}


def ask_own(exam: Exam, build: Path, out: Path, *engines: str) -> dict[str, list[str]]:
    """The answers of some of the engines that are built here; of all, where none is named."""
    setup = little_setup(exam, build, out)
    answers = {}
    for name in engines or OWN:
        with OWN[name](setup) as server:
            answers[name] = ask_server(server, exam)
    return answers


def ask_all(exam: Exam, build: Path, out: Path, vllm: bool = True) -> dict[str, list[str]]:
    """Each engine's answers."""
    answers = ask_own(exam, build, out)
    if vllm and (python := vllm_python()):
        answers |= ask_vllm(python, exam, out)
    return answers


def report(exam: Exam, answers: dict[str, list[str]]) -> list[str]:
    lines = [f"{name}: {exam.right(given)} of {len(given)}" for name, given in answers.items()]
    if "vLLM" not in answers:
        lines.append("vLLM: not asked, as it is not installed (plugins/vllm/setup_vllm.sh does so)")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--build", type=Path, default=ROOT / "build/release")
    args = parser.parse_args()
    if not 1 <= args.questions <= len(task.NAMES):
        parser.error(f"--questions: from 1 to {len(task.NAMES)}")
    try:
        make_little_model()
        exam = Exam.draw(args.questions)
        say(f"asking for {args.questions} of {len(task.NAMES)} facts")
        out = ROOT / "build/demo/answers"
        answers = ask_all(exam, args.build.resolve(), out)
    except DemoError as error:
        print(f"answers: {error}", file=sys.stderr)
        return 1
    print("\n".join(["Answers right:", *(f"  {line}" for line in report(exam, answers))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
