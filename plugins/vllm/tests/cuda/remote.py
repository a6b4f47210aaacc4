"""Engines in processes of their own, and what is true: the model in float32, by transformers."""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from engines import Answer, Prompt

Call = tuple[list[Prompt], int, dict]  # prompts, tokens, sampling parameters


@dataclass
class Result:
    answers: list[list[Answer]]  # of each call
    served: list[list[bool]]  # whether Relay serves each layer of each worker
    plans: int  # that Relay made
    read: int  # KV slots that the last ones read
    attended: int  # and would without sharing
    preempted: int  # how often a request was, of arrivals
    memory: list[int]  # bytes in use on the GPU, on the way
    log: str = field(repr=False, default="")


def run(
    model: Path,
    calls: list[Call],
    arrivals: list[tuple] | None = None,
    *,
    relay: bool | None,
    forbid_waiting: bool = False,
    environment: dict[str, str] | None = None,
    timeout: float = 240,
    **options: object,
) -> Result:
    """Answers of an engine over `model`, to `calls` or to what arrivals.schedule() made.
    relay: None where Relay may leave layers to vLLM."""
    here = Path(__file__).parent
    options = dict(gpu_memory_utilization=0.2) | options  # several may run at once
    request = dict(
        model=model,
        relay=relay,
        options=options,
        calls=calls,
        arrivals=arrivals,
        forbid_waiting=forbid_waiting,
    )
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "RELAY_VERBOSE": "1",
        "RELAY_CUDA_MIN_SHARED_SLOTS": "64",  # the models are so small that sharing does not pay
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, got = (Path(folder) / name for name in ("asked", "got"))
        asked.write_bytes(pickle.dumps(request))
        logs = Path(os.environ.get("RELAY_TEST_LOGS", folder))  # RELAY_TEST_LOGS keeps them
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{model.name}-{time.time_ns()}.log"
        with log.open("w") as output:
            print(f"{model.name}, Relay: {relay}, {options}", file=output, flush=True)
            engine = subprocess.Popen(
                [sys.executable, str(here / "engine_process.py"), str(asked), str(got)],
                env=env | (environment or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                status: int | str = engine.wait(timeout)
            except subprocess.TimeoutExpired:
                status = f"no answer after {timeout:g} s"
            finally:
                _end(engine)
        text = log.read_text()
        assert status == 0 and got.exists(), f"the engine failed ({status}):\n{text[-12000:]}"
        return Result(**pickle.loads(got.read_bytes()), log=text)


def _end(process: subprocess.Popen) -> None:
    """Ends it, and the workers that it may have: they would keep the GPU."""
    if process.poll() is not None:
        return
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


@dataclass
class Error:
    """How far log-probabilities are from those of the model in float32."""

    largest: float = 0.0
    total: float = 0.0
    compared: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.compared

    def __str__(self) -> str:
        return f"largest {self.largest:.4f}, mean {self.mean:.5f} over {self.compared}"


class Truth:
    """The model in float32, given the tokens that an engine answered."""

    def __init__(self, model: Path) -> None:
        import transformers

        torch.backends.cuda.matmul.allow_tf32 = False
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).to(self.device)

    @torch.inference_mode()
    def error(self, prompts: list[Prompt], answers: list[Answer]) -> Error:
        """Of the log-probabilities of each place's likeliest tokens, after the same tokens."""
        error = Error()
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([prompt + answer.tokens[:-1]], device=self.device)
            logits = self.model(tokens).logits[0, len(prompt) - 1 :].float()
            for at, found in zip(logits.log_softmax(-1).cpu(), answer.logprobs, strict=True):
                for token, logprob in found.items():
                    difference = abs(float(at[token]) - logprob)
                    error.largest = max(error.largest, difference)
                    error.total += difference
                    error.compared += 1
        return error
