"""LoRA adapters: each is a model of its own beside the base, and answers as it does in
llama-server."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import openai
import pytest
from conftest import LONG_PROMPT, RELAY, ROOT, eventually

sys.path.insert(0, str(ROOT / "scripts/demo"))

import servers  # noqa: E402

ADAPTERS = ("polite", "rude")
MODELS = ("tiny", *ADAPTERS)
CLOSE = 0.05  # weights and KV are in f16
QUESTIONS = [f"Who closes door {i}?" for i in range(4)]
KEY = {"Authorization": "Bearer root"}


def write_adapter(path, seed, weights, rank=4):
    """An adapter with random matrices; weights: what each takes in and gives out."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2 * rank)
    for name, (rows_in, rows_out) in weights.items():
        for part, shape in (("a", (rank, rows_in)), ("b", (rows_out, rank))):
            values = random.normal(0, 0.1, shape).astype(np.float32)
            writer.add_tensor(f"{name}.lora_{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The adapters' files, for every matrix of every layer."""
    folder = tmp_path_factory.mktemp("adapters")
    weights = {
        tensor.name: tuple(map(int, tensor.shape))
        for tensor in gguf.GGUFReader(model).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }
    assert weights
    paths = {name: folder / f"{name}.gguf" for name in ADAPTERS}
    for seed, path in enumerate(paths.values()):
        write_adapter(path, seed, weights)
    return paths


def lora(files):
    # The first is named by its file, the second by the command line.
    return ["--lora", files["polite"], "--lora-modules", f"rude={files['rude']}"]


@pytest.fixture(scope="module")
def server(start_server, files):
    server = start_server(
        *lora(files),
        "-np",
        "16",
        "-c",
        "16384",
        "--pin-budget",
        "0.5",
        env={"RELAY_ADMIN_KEY": "root"},
    )
    yield server
    assert server.stop() == 0, server.errors()


def ask(client, model, question, system="You keep the doors."):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=5,
    )


def assert_same(a, b):
    """The same tokens with the same probabilities, up to two that are as good as equal."""
    ours, theirs = (x.choices[0].logprobs.content for x in (a, b))
    assert len(ours) == len(theirs) == 12
    for x, y in zip(ours, theirs, strict=True):
        if x.token != y.token:
            other = {t.token: t.logprob for t in x.top_logprobs}[y.token]
            assert other == pytest.approx(x.logprob, abs=CLOSE)
            return
        assert x.logprob == pytest.approx(y.logprob, abs=CLOSE)


def tokens_of(answer):
    return [token.token for token in answer.choices[0].logprobs.content]


@pytest.fixture(scope="module")
def expected(model, files, tmp_path_factory):
    """llama-server's answers, one server for each model."""
    out = tmp_path_factory.mktemp("llama-server")
    answers = {}
    for name in MODELS:
        command = [RELAY.parent / "llama-server", "-m", model, "-c", "2048", "-np", "1"]
        command += ["--host", "127.0.0.1", "--port", servers.free_port(), "--no-webui"]
        if name in files:
            command += ["--lora", files[name]]
        environment = servers.clean_environment()
        log = out / f"{name}.log"
        with servers.Server(name, list(map(str, command)), environment, log) as process:
            process.wait_ready(60)
            url = f"http://127.0.0.1:{process.port}/v1"
            with openai.OpenAI(base_url=url, api_key="none") as client:
                for question in QUESTIONS:
                    answers[name, question] = ask(client, name, question)
    return answers


def test_adapters_are_listed_with_their_base(server, files):
    with server.client() as client:
        listed = {model.id: model for model in client.models.list().data}
        assert tuple(listed) == MODELS
        assert listed["rude"].parent == "tiny" and listed["rude"].root == str(files["rude"])
        assert client.models.retrieve("polite").parent == "tiny"


def test_unknown_names_are_refused(server):
    with server.client() as client, pytest.raises(openai.NotFoundError) as error:
        ask(client, "kind", "Hello?")
    assert error.value.code == "model_not_found"


def test_answers_are_llama_servers_whoever_runs_beside(server, expected):
    with server.client() as client, ThreadPoolExecutor(12) as pool:
        asked = list(expected)
        for _ in range(2):  # the second time, what they begin with is cached
            answers = list(pool.map(lambda key: ask(client, *key), asked))
            for key, answer in zip(asked, answers, strict=True):
                assert answer.model == key[0]
                assert_same(answer, expected[key])
    for question in QUESTIONS:
        assert len({tuple(tokens_of(expected[name, question])) for name in MODELS}) == 3


def test_nothing_cached_crosses_adapters(server):
    with server.client() as client:
        for expect_cached in (False, True):
            for name in MODELS:
                usage = ask(client, name, "Which door is first?", LONG_PROMPT).usage
                cached = usage.prompt_tokens_details.cached_tokens
                assert (cached > 1000) == expect_cached, name
                assert expect_cached or cached < 50, "a few may be in the cache since other tests"


def test_a_prompt_is_pinned_for_one_adapter_and_kept_on_disk(start_server, files, tmp_path):
    def start(arguments):
        return start_server(
            *arguments,
            *("-np", "4", "-c", "8192", "--pin-budget", "0.5"),
            *("--prompt-cache-dir", tmp_path / "prompts"),
            env={"RELAY_ADMIN_KEY": "root"},
        )

    def cached(server):
        with server.client() as client:
            usage = {m: ask(client, m, "Why?", LONG_PROMPT).usage for m in MODELS}
        return {m: u.prompt_tokens_details.cached_tokens > 1000 for m, u in usage.items()}

    first = start(lora(files))
    messages = [{"role": "system", "content": LONG_PROMPT}]
    with first.http(headers=KEY) as http:
        made = http.post("/v1/cached_prompts", json={"model": "rude", "messages": messages})
        assert made.status_code == 201, made.text
        assert made.json()["model"] == "rude"
    eventually(lambda: len(list((tmp_path / "prompts").glob("*.kv"))) == 1, 30)
    assert first.stop() == 0
    # The other way round: what is on disk belongs to the adapter's file, not to its place.
    second = start(["--lora", f"rude={files['rude']},polite={files['polite']}"])
    assert cached(second) == {"tiny": False, "polite": False, "rude": True}
    assert second.stop() == 0


def test_gateways_see_which_adapters_there_are(server):
    with server.http() as http:
        assert "vllm:lora_requests_info{" in http.get("/metrics").text
        assert 'max_lora="2"' in http.get("/metrics").text


def test_a_batch_may_ask_adapters(model, files, tmp_path, expected):
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "system", "content": "You keep the doors."}]
    messages.append({"role": "user", "content": QUESTIONS[0]})
    options = {"messages": messages, "temperature": 0, "max_tokens": 12}
    with requests.open("w") as file:
        for name in (*MODELS, "kind"):
            line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**line, "body": {"model": name, **options}}) + "\n")
    command = [RELAY, "batch", "-m", model, "-c", "2048", "-np", "4", *lora(files)]
    subprocess.run([*command, requests, results], check=True)
    answers = {x["custom_id"]: x["response"] for x in map(json.loads, results.open())}
    assert answers["kind"]["status_code"] == 404
    texts = {m: answers[m]["body"]["choices"][0]["message"]["content"] for m in MODELS}
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize(
    ("path", "name"),
    [("lr=1e-4/x.gguf", "x"), ("lr=1e-4,rank=8/x.gguf", "mine"), ("a,b.gguf", "a,b")],
)
def test_paths_may_have_equals_signs_and_commas(start_server, files, tmp_path, path, name):
    adapter = tmp_path / path
    adapter.parent.mkdir(exist_ok=True)
    shutil.copy(files["rude"], adapter)
    given = adapter if name == adapter.stem else f"{name}={adapter}"
    more = f"polite={files['polite']},p={files['rude']}"
    server = start_server("--lora", given, "--lora", more, "-c", "2048")
    with server.client() as client:
        assert {name, "polite", "p"} < {model.id for model in client.models.list()}
    assert server.stop() == 0


def refusal(model, *arguments):
    command = [RELAY, "serve", "-m", model, "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr


def test_what_cannot_be_served_is_refused_at_start(model, files, tmp_path):
    assert "cannot be read" in refusal(model, "--lora", tmp_path / "missing.gguf")
    assert "the name tiny is taken" in refusal(model, "--lora", f"tiny={files['rude']}")
    assert "the name rude is taken" in refusal(model, *lora(files), "--lora", files["rude"])
    twice = refusal(model, *lora(files), "--lora", f"again={files['rude']}")
    assert "this file is served as rude already" in twice
    assert "the name is missing" in refusal(model, "--lora", f"={files['rude']}")
    assert "general.type is 'model'" in refusal(model, "--lora", f"other={model}")
    wrong = tmp_path / "wrong.gguf"
    write_adapter(wrong, 1, {"blk.0.attn_q.weight": (64, 64)})
    assert f"{wrong} cannot be used" in refusal(model, "--lora", wrong)
    wrong.write_text("no GGUF")
    assert "no GGUF file" in refusal(model, "--lora", wrong)
