"""Asks the little model in vLLM, with Relay and without. Runs in vLLM's environment.

usage: python ask_vllm.py <model folder> <chats.json> <answers.json>
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Before vLLM is imported: the engine in this process, no network, little talk.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins/vllm/tests"))

from engines import engine  # noqa: E402
from vllm import SamplingParams  # noqa: E402


def ask(folder: Path, chats: list[list[dict]], *, relay: bool, tokens: int = 8) -> list[str]:
    """Greedy answers; the engine makes sure that its attention is whose it should be."""
    greedy = SamplingParams(temperature=0, max_tokens=tokens)
    with engine(folder, relay=relay, skip_tokenizer_init=False, max_model_len=2048) as llm:
        outputs = llm.chat(chats, greedy, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    folder, asked, answered = map(Path, sys.argv[1:])
    chats = json.loads(asked.read_text())
    answers = {
        name: ask(folder, chats, relay=relay) for name, relay in (("own", False), ("relay", True))
    }
    answered.write_text(json.dumps(answers))
