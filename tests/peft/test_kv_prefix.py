"""Prefixes that PEFT tunes, in PEFT itself and in `relay serve --kv-prefix`.

Runs in vLLM's environment (scripts/test.sh vllm), where there are torch and transformers. The model
is the little one (scripts/little_model), with its weights in f32. Two roundings of llama.cpp's are
coarser than that, and its sharp attention shows them: flash attention reads KV in f16 (KV in f32 is
copied to f16 before each use), and a rotation's angle comes from the one before. So transformers is
made to do the same, in f64, and what is left between the two engines is rounding of f32.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ROOT = Path(__file__).resolve().parents[2]
RELAY = Path(os.environ.get("RELAY_BIN", ROOT / "build/release/bin/relay"))
LITTLE_MODEL = ROOT / "scripts/little_model"
MADE = ROOT / "build/little_model"
sys.path[:0] = [str(ROOT / "scripts/demo"), str(LITTLE_MODEL)]

import task  # noqa: E402
from servers import Server, clean_environment, free_port  # noqa: E402
from vocabulary import ASSISTANT, END, ID, SPECIAL, TOKENS, UNUSED, USER, encode  # noqa: E402

torch.set_num_threads(1)  # more only wait for each other in so small a model

FACTS = task.draw_facts(24, 5)
TOP = 20  # log-probabilities that are compared


def over_f16(module, query, key, value, mask, **options):
    key, value = (tensor.half().to(tensor.dtype) for tensor in (key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def over_f16_of_f32(module, query, key, value, mask, **options):
    """Keys and values have the error of a computation in f32, drawn anew each time."""

    def with_error(rows: torch.Tensor) -> torch.Tensor:
        return rows + 2**-23 * rows.abs().amax(-1, keepdim=True) * torch.randn_like(rows)

    return over_f16(module, query, with_error(key), with_error(value), mask, **options)


for attention in (over_f16, over_f16_of_f32):
    AttentionInterface.register(attention.__name__, attention)
    AttentionMaskInterface.register(attention.__name__, sdpa_mask)


class Rotations(torch.nn.Module):
    """The cosines and sines of ggml's ROPE: each angle is the one before times a factor, in f32."""

    def __init__(self, config):
        super().__init__()
        self.count = config.head_dim // 2
        base = torch.tensor(config.rope_parameters["rope_theta"], dtype=torch.float32)
        self.factor = base.pow(-1 / self.count)

    def forward(self, like: torch.Tensor, position_ids: torch.Tensor):
        angles = [position_ids.float()]
        while len(angles) < self.count:
            angles.append(angles[-1] * self.factor)
        both_halves = torch.stack(angles * 2, -1)
        return both_halves.cos().to(like.dtype), both_halves.sin().to(like.dtype)


def load(dtype: torch.dtype = torch.float32, attention=over_f16):
    options = {"dtype": dtype, "attn_implementation": attention.__name__}
    model = AutoModelForCausalLM.from_pretrained(MADE / "hf", **options)
    rotations, position = Rotations(model.config), torch.tensor([[300]])
    for ours, theirs in zip(
        rotations(model.lm_head.weight, position),
        model.model.rotary_emb(model.lm_head.weight, position),
        strict=True,
    ):
        # An angle of 300 in f32 is right to 2^-16.
        assert torch.allclose(ours, theirs, rtol=0, atol=2**-14)
    model.model.rotary_emb = rotations
    return model


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
    return load()


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
    # The plain kernels compute in f32 on every processor.
    environment = clean_environment(RELAY_ISA="plain")
    return Server("relay", [str(part) for part in command], environment, folder / "log")


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
        body["ignore_eos"] = True  # an answer that ends at once would have no token to look at
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


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(one, other, strict=True))


def keys(saved: torch.Tensor, config) -> torch.Tensor:
    """A view: [positions, layers, KV heads, head size]."""
    shape = (len(saved), config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
    return saved.view(shape)[:, :, 0]


def swap_halves(key: torch.Tensor, _base) -> torch.Tensor:
    return key.roll(key.shape[-1] // 2, -1)


def turn_by_a_position(key: torch.Tensor, base) -> torch.Tensor:
    """As if requests began one position further on."""
    cos, sin = (each[0, 0] for each in base.model.rotary_emb(key, torch.tensor([[1]])))
    a, b = key.chunk(2, -1)
    return key * cos + torch.cat([-b, a], -1) * sin


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_logits_are_those_of_peft(base, gguf_f32, tmp_path, projection):
    system = {"role": "system", "content": task.system_prompt(FACTS)}
    chats = [ask(fact) for fact in FACTS[:6]] + [[system, *ask(fact)] for fact in FACTS[6:12]]
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
    expected = own_logprobs(PeftModel.from_pretrained(load(torch.float64), tmp_path), chats)
    without = own_logprobs(load(torch.float64), chats)

    # f32 decides now and then which way f16 rounds, and that shows. How far it may take an answer,
    # the largest of some draws says; there is no factor on top.
    drawn = load(torch.float64, over_f16_of_f32)
    apart = max(distance(own_logprobs(drawn, chats), without) for _ in range(32))
    drawn = PeftModel.from_pretrained(drawn, tmp_path)
    tolerance = max(distance(own_logprobs(drawn, chats), expected) for _ in range(32))

    def served(*options: str | Path) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
        with serve(gguf_f32, tmp_path, *options) as server:
            server.wait_ready(60)
            return served_logprobs(server, chats), served_logprobs(server, chats)

    prefix = tmp_path / "prefix.gguf"
    convert(tmp_path, prefix)
    for answers in served("--kv-prefix", prefix):  # the second time from the cache of prefixes
        assert largest_difference(answers, expected) < tolerance
    assert largest_difference(served()[0], without) < apart
    # The bound is sharp: likely mistakes are far beyond it.
    assert distance(without, expected) > 100 * tolerance
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)["prompt_embeddings"]
    for mistake in (swap_halves, turn_by_a_position):
        wrong = saved.clone()
        view = keys(wrong, base.config)
        view.copy_(mistake(view, base))
        save_file({"prompt_embeddings": wrong}, file)
        convert(tmp_path, prefix)
        answers, _ = served("--kv-prefix", prefix)
        assert largest_difference(answers, expected) > 100 * tolerance, mistake.__name__


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
    optimizer = torch.optim.Adam(embeddings, lr=0.2)
    for _ in range(400):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
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
    read = own_logprobs(PeftModel.from_pretrained(load(), tmp_path), [ask(FACTS[0])])
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
        ({"num_layers": None}, "does not tell the prefix's sizes"),
        ({"num_transformer_submodules": 2}, "an encoder"),
    ):
        file.write_text(json.dumps(config | change))
        assert why in convert(tmp_path, output, status=1)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "cannot be read" in convert(tmp_path, output, status=1)
    assert not output.exists()


def test_what_cannot_be_written_is_told(base, tmp_path):
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path)
    assert "cannot write" in convert(tmp_path, tmp_path / "nowhere/prefix.gguf", status=1)


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
