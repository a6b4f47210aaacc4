"""The programs that measure, and the peers: where they are, what they need, how they are run."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fields import Field
from shapes import SHAPES
from tasks import EvaluationError

ROOT = Path(__file__).resolve().parents[2]
# The demo's way of starting a server and of asking it is the evaluation's too.
sys.path.append(str(ROOT / "scripts/demo"))

VLLM_BENCH = ROOT / "plugins/vllm/bench"
TRACE_SOURCE = (
    "the trace is Mooncake's (github.com/kvcache-ai/Mooncake, Apache-2.0): "
    "FAST25-release/traces/conversation_trace.jsonl; name your copy by --trace FILE or RELAY_TRACE"
)
# What a problem says of the model that a server gets.
MODEL_FIELDS = {
    "shape": Field(str, default="llama-3.2-1b", choices=tuple(SHAPES)),
    "ffn": Field(int, default=0, least=0, about="0: the shape's"),
    "layers": Field(int, default=0, least=0, about="0: the shape's"),
    "vocabulary": Field(str, default="", about="'': the shape's"),
    "weights": Field(str, default="q4_0"),
}


class Programs:
    """left_out: what an optional peer is missing for, each reason once. notes: what the task that
    is running left out."""

    def __init__(self, build: Path, device: str, trace: str | None, out: Path) -> None:
        self.build, self.device, self.out = build, device, out
        self.trace_file = trace
        self.left_out: list[str] = []
        self.notes: list[str] = []

    # --- Where they are

    def binary(self, name: str) -> Path:
        path = self.build / "bin" / name
        if not path.is_file():
            raise EvaluationError(f"there is no {path}; run: make build")
        return path

    def vllm_python(self) -> Path:
        name, option = ("vllm-0.32.0", "")
        if self.device == "cuda":
            name, option = ("vllm-cuda-0.33.0", " --cuda")
        venv = Path(os.environ.get("RELAY_VLLM_VENV", Path.home() / ".cache/relay" / name))
        path = venv / "bin/python"
        if not path.is_file():
            raise EvaluationError(
                f"vLLM is not installed ({path} is missing): run plugins/vllm/setup_vllm.sh{option}"
                ", or name its virtual environment by RELAY_VLLM_VENV"
            )
        return path

    def cuda_python(self) -> Path:
        """A Python with torch for CUDA."""
        path = Path(os.environ.get("RELAY_CUDA_PYTHON", sys.executable))
        probe = "import torch, sys; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([path, "-c", probe], capture_output=True, check=False).returncode != 0:
            raise EvaluationError(
                f"{path} has no torch that finds an NVIDIA GPU; name one that has by "
                "RELAY_CUDA_PYTHON (plugins/vllm/setup_vllm.sh --cuda installs one)"
            )
        return path

    def trace(self) -> Path:
        if not self.trace_file:
            raise EvaluationError(f"this needs a trace: {TRACE_SOURCE}")
        path = Path(self.trace_file)
        if not path.is_file():
            raise EvaluationError(f"--trace {path}: there is no such file; {TRACE_SOURCE}")
        return path

    def if_there(self, what: str, find):
        """What `find` gives; None, noted down, where it is missing."""
        try:
            return find()
        except EvaluationError as error:
            reason = f"{what}: {error}"
            if reason not in self.left_out:
                self.left_out.append(reason)
            return None

    # --- How they are run

    def run(self, command: list, environment: dict | None = None) -> str:
        """Standard output of a program that has to end well."""
        from servers import die_with_parent

        command = [str(part) for part in command]
        done = subprocess.run(
            command,
            env=clean_environment(**(environment or {})),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        if done.returncode != 0:
            raise EvaluationError(
                f"{' '.join(command)}\n{done.stdout[-1500:]}{done.stderr[-3000:]}\n"
                f"ended with status {done.returncode}"
            )
        return done.stdout

    def run_json(self, command: list, environment: dict | None = None) -> dict:
        text = self.run(command, environment)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{command[0]} printed no JSON: {error}\n{text[:500]}") from error

    def run_into_json(self, command: list, environment: dict | None = None) -> dict:
        """Of a program that writes its results into --json FILE."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.json"
            self.run([*command, "--json", file], environment)
            if not file.is_file():
                raise EvaluationError(f"{' '.join(map(str, command))} wrote no results")
            return json.loads(file.read_text())

    def model(self, problem: dict) -> Path:
        """A GGUF file with random weights, as the problem's MODEL_FIELDS have it, made once."""
        shape, ffn, layers, vocabulary, weights = (problem[name] for name in MODEL_FIELDS)
        parts = [shape, f"ffn{ffn}", f"layers{layers}", vocabulary, weights]
        path = self.out.parent / "models" / f"{'-'.join(filter(None, parts))}.gguf"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            more = ["--ffn", ffn] * (ffn > 0) + ["--layers", layers] * (layers > 0)
            more += ["--vocab", vocabulary] * (vocabulary != "")
            self.run([self.binary("relay"), "synth", shape, path, "--type", weights, *more])
        return path


def clean_environment(**more: str) -> dict[str, str]:
    """Without what changes Relay's ways or loads it elsewhere; peers' own settings stay."""
    places = ("RELAY_VLLM_VENV", "RELAY_CUDA_LIBRARY", "RELAY_FA3", "RELAY_COMMIT")
    kept = {
        k: v
        for k, v in os.environ.items()
        if k in places or not k.startswith(("RELAY_", "GGML_", "LLAMA_"))
    }
    return {**kept, **more}
