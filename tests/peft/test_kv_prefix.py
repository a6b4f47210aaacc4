"""Prefixes that PEFT tunes, in PEFT itself and in `relay serve --kv-prefix`.

Runs in vLLM's environment (scripts/test.sh vllm), where there are torch and transformers. The model
is the little one (scripts/little_model), with its weights in f32, as is the KV cache.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
RELAY = Path(os.environ.get("RELAY_BIN", ROOT / "build/release/bin/relay"))
LITTLE_MODEL = ROOT / "scripts/little_model"
MADE = ROOT / "build/little_model"
sys.path[:0] = [str(ROOT / "scripts/demo"), str(LITTLE_MODEL)]

import task  # noqa: E402
from servers import Server, clean_environment, free_port  # noqa: E402
from vocabulary import ASSISTANT, END, ID, SPECIAL, TOKENS, UNUSED, USER, encode  # noqa: E402

FACTS = task.draw_facts(24, 5)
TOP = 20  # log-probabilities that are compared


def ask(fact: task.Fact) -> list[dict]:
    return [{"role": "user", "content": fact.question()}]


@pytest.fixture(scope="module")
def gguf_f32(tmp_path_factory):
    subprocess.run([LITTLE_MODEL / "make.sh"], check=True)
    path = tmp_path_factory.mktemp("model") / "little-f32.gguf"
    command = [RELAY.parent / "llama-quantize", MADE / "little.gguf", path, "F32"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture
def base(gguf_f32):
    return AutoModelForCausalLM.from_pretrained(MADE / "hf", dtype=torch.float32)


def convert(adapter: Path, output: Path, status: int = 0) -> str:
    done = subprocess.run(
        [ROOT / ".venv-jax/bin/python", ROOT / "scripts/kv_prefix_from_peft.py", adapter, output],
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def serve(model: Path, folder: Path, *options: str | Path) -> Server:
    command = [RELAY, "serve", "-m", model, "--port", free_port(), "-c", 4096, *options]
    command += ["--cache-type-k", "f32", "--cache-type-v", "f32", "-np", 16]
    return Server("relay", [str(part) for part in command], clean_environment(), folder / "log")


def token_of(text: bytes) -> int:
    """The token with this text."""
    if text.decode(errors="replace") in SPECIAL + UNUSED:
        return ID[text.decode()]
    letters = TOKENS[len(SPECIAL) :]  # the visible characters for the bytes, in their order
    return ID["".join(letters[byte] for byte in text)]


def served_logprobs(server: Server, chats: list[list[dict]]) -> list[dict[int, float]]:
    """Of the first token of each answer: the likeliest tokens and their log-probabilities."""
    result = []
    for chat in chats:
        body = {"messages": chat, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        choice = server.json("POST", "/v1/chat/completions", body)["choices"][0]
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        named = [each for each in top if each["bytes"]]  # control tokens are named by no text
        result.append({token_of(bytes(each["bytes"])): each["logprob"] for each in named})
    return result


def own_logprobs(model, chats: list[list[dict]]) -> list[torch.Tensor]:
    prompts = ["".join(f"<|{m['role']}|>{m['content']}" for m in chat) for chat in chats]
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([encode(text + ASSISTANT)])).logits[0, -1].log_softmax(-1)
            for text in prompts
        ]


def largest_difference(served: list[dict[int, float]], own: list[torch.Tensor]) -> float:
    assert all(len(each) >= TOP // 2 for each in served)
    return max(
        abs(value - float(expected[token]))
        for each, expected in zip(served, own, strict=True)
        for token, value in each.items()
    )


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_logits_are_those_of_peft(base, gguf_f32, tmp_path, projection):
    system = {"role": "system", "content": task.system_prompt(FACTS)}
    chats = [ask(fact) for fact in FACTS[:6]] + [[system, *ask(FACTS[7])]]
    without = own_logprobs(base, chats)
    torch.manual_seed(3)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=12, prefix_projection=projection
    )
    model = get_peft_model(base, config).eval()
    spread = 1.0 if projection else 4.0  # keys that draw attention
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=spread if parameter.dim() > 1 else 0.1)
    model.save_pretrained(tmp_path)
    expected = own_logprobs(model, chats)
    convert(tmp_path, tmp_path / "prefix.gguf")
    with serve(gguf_f32, tmp_path) as server:
        server.wait_ready(60)
        control = largest_difference(served_logprobs(server, chats), without)
    with serve(gguf_f32, tmp_path, "--kv-prefix", tmp_path / "prefix.gguf") as server:
        server.wait_ready(60)
        served = served_logprobs(server, chats)
        again = served_logprobs(server, chats)
    # The bound comes from what the two engines differ by without any prefix: rounding, which this
    # model's sharp attention enlarges. A wrong order or place would change it a thousandfold.
    assert control < 0.01
    tolerance = 10 * control
    assert largest_difference(served, expected) < tolerance
    assert largest_difference(again, expected) < tolerance  # from the cache of prefixes
    assert largest_difference(served, without) > 50 * tolerance


def tune(base, folder: Path) -> None:
    """A prefix instead of a system prompt: PEFT learns the facts by heart."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=32)
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    asked = [f"{USER}{fact.question()}{ASSISTANT}" for fact in FACTS]
    answers = [fact.answer() + END for fact in FACTS]
    tokens = torch.tensor([encode(a + b) for a, b in zip(asked, answers, strict=True)])
    labels = tokens.clone()
    labels[:, : len(encode(asked[0]))] = -100
    embeddings = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(embeddings, lr=0.05)
    for _ in range(400):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    model.save_pretrained(folder)


def right_answers(server: Server) -> int:
    right = 0
    for fact in FACTS:
        body = {"messages": ask(fact), "temperature": 0, "max_tokens": 8}
        answer = server.json("POST", "/v1/chat/completions", body)
        right += answer["choices"][0]["message"]["content"] == fact.answer()
    return right


def test_a_tuned_prefix_stands_for_the_prompt(base, gguf_f32, tmp_path):
    tune(base, tmp_path)
    convert(tmp_path, tmp_path / "prefix.gguf")
    with serve(gguf_f32, tmp_path, "--kv-prefix", tmp_path / "prefix.gguf") as server:
        server.wait_ready(60)
        tuned = right_answers(server)
    with serve(gguf_f32, tmp_path) as server:
        server.wait_ready(60)
        untuned = right_answers(server)
    assert tuned >= 0.95 * len(FACTS) and untuned <= 2, f"{tuned} and {untuned} of {len(FACTS)}"


def test_peft_reads_its_own_prefix_alike(base, tmp_path):
    """What is saved is what is used: the converter reads the saved file."""
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path)
    expected = own_logprobs(model.eval(), [ask(FACTS[0])])
    fresh = AutoModelForCausalLM.from_pretrained(MADE / "hf", dtype=torch.float32)
    read = own_logprobs(PeftModel.from_pretrained(fresh, tmp_path), [ask(FACTS[0])])
    assert torch.equal(expected[0], read[0])


def test_what_is_no_prefix_is_refused(base, tmp_path):
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path)
    output = tmp_path / "prefix.gguf"
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, why in (
        ({"peft_type": "LORA"}, "type LORA"),
        ({"num_virtual_tokens": 5}, "not that of 5 positions"),
        ({"num_transformer_submodules": 2}, "an encoder"),
    ):
        file.write_text(json.dumps(config | change))
        assert why in convert(tmp_path, output, status=1)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "cannot be read" in convert(tmp_path, output, status=1)
    assert not output.exists()


def test_relay_refuses_what_it_cannot_use(base, gguf_f32, tmp_path):
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path)
    convert(tmp_path, tmp_path / "prefix.gguf")

    def refused(prefix: Path, *options: str) -> str:
        command = [RELAY, "serve", "-m", gguf_f32, "--port", "0", "--kv-prefix", prefix, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        return done.stderr

    assert "cannot be stored in q8_0" in refused(tmp_path / "prefix.gguf", "-ctk", "q8_0")
    assert "not a GGUF file" in refused(tmp_path / "adapter_config.json")
    assert "cannot be read" in refused(tmp_path / "missing")
    assert "not a KV prefix" in refused(gguf_f32)
