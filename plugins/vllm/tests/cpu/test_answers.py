"""Answers stay right: the little model (scripts/little_model) is asked for facts of its prompt."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
LITTLE_MODEL = ROOT / "scripts/little_model"
sys.path.insert(0, str(LITTLE_MODEL))

import task  # noqa: E402
import vocabulary  # noqa: E402
from ask_vllm import ask  # noqa: E402

QUESTIONS = 64
TRUSTED = 0.9  # as in tests/e2e/test_answers.py


@pytest.fixture(scope="module")
def model():
    subprocess.run([LITTLE_MODEL / "make.sh"], check=True)
    return ROOT / "build/little_model/hf"


def test_answers_are_right_with_and_without_relay(model):
    facts = task.draw_facts(len(task.NAMES), 17)
    system = {"role": "system", "content": task.system_prompt(facts)}
    asked = facts[:QUESTIONS]
    chats = [[system, {"role": "user", "content": fact.question()}] for fact in asked]
    own, relay = ask(model, chats, relay=False), ask(model, chats, relay=True)
    for name, given in (("vLLM", own), ("Relay", relay)):
        right = sum(answer == fact.answer() for answer, fact in zip(given, asked, strict=True))
        assert right >= TRUSTED * QUESTIONS, f"{name}: {right} of {QUESTIONS}: {given}"
    # One answer may hang by a rounding.
    assert sum(a != b for a, b in zip(own, relay, strict=True)) <= 1


def test_tokenizer_is_that_of_the_training(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    facts = task.draw_facts(8, 1)
    chat = [
        {"role": "system", "content": task.system_prompt(facts)},
        {"role": "user", "content": facts[3].question()},
        {"role": "assistant", "content": facts[3].answer()},
        {"role": "user", "content": facts[4].question()},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens == vocabulary.encode(text)
    assert tokenizer.decode(tokens) == text
    odd = "Any other text, 1 or 2:\n\n\tgrüße!"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
