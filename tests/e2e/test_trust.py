"""No request ends the process, holds up the others, or is misread in silence."""

import contextlib
import gzip
import json
import subprocess
import threading
import time

import httpx
import pytest
from conftest import RELAY, ROOT, Server, eventually

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
WAYS = "root ::= " + "[a-z]? " * 40
# Forty letters a, after which there are 2^40 ways to have read them.
EXPLODES = "root ::= r40\nr0 ::= [a]\n" + "".join(
    f'r{i} ::= [a] r{i - 1} "b" | [a] r{i - 1} [bc]\n' for i in range(1, 41)
)
MODELS = ROOT / ".deps"


def chat(**fields):
    return {"messages": HELLO, "max_tokens": 4, **fields}


def schema(value):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


@pytest.fixture
def http(server):
    with server.http() as http:
        yield http


class Bystander:
    """A stream that notes the longest time between two of its tokens."""

    def __init__(self, server):
        self.longest = 0.0
        self.tokens = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(server,))

    def _run(self, server):
        body = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        last = None
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as answer:
            for _ in answer.iter_lines():
                now = time.monotonic()
                if last is not None:
                    self.longest = max(self.longest, now - last)
                last = now
                self.tokens += 1
                if self._over.is_set():
                    return

    def __enter__(self):
        self._thread.start()
        eventually(lambda: self.tokens > 5, 30)
        self.longest = 0.0
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def test_a_small_grammar_stalls_nobody(server, http):
    with Bystander(server) as bystander:
        answer = http.post(CHAT, json=chat(grammar=WAYS, max_tokens=50))
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["message"]["content"]
        assert text == "" or (text.isalpha() and text.islower())
    assert bystander.longest < 1.5


def test_a_grammar_that_explodes_fails_alone(server, http):
    with Bystander(server) as bystander:
        for choices in (1, 1, 16):
            body = {"prompt": "x", "grammar": EXPLODES, "max_tokens": 2000, "n": choices}
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["code"] == "invalid_grammar" and "too many ways" in error["message"]
    assert bystander.longest < 1.5


def test_large_enums_and_objects_stall_nobody(server, http):
    values = [f"value number {i} of a long list" for i in range(2000)]
    names = [f"property_{i}" for i in range(200)]
    cases = [
        {"enum": values[:1000]},
        {"enum": values},
        {"type": "object", "properties": {name: {"type": "null"} for name in names}},
    ]
    with Bystander(server) as bystander:
        for case in cases:
            answer = http.post(CHAT, json=chat(response_format=schema(case), max_tokens=40))
            assert answer.status_code == 200, answer.text
        answer = http.post(CHAT, json=chat(response_format=schema(cases[0]), max_tokens=200))
        assert json.loads(answer.json()["choices"][0]["message"]["content"]) in values
        many = {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}
        answer = http.post(CHAT, json=chat(response_format=schema(many)))
        assert answer.status_code == 400 and "optional properties" in answer.text
    assert bystander.longest < 1.5


def test_a_grammar_ends_with_its_client_and_with_the_server(start_server):
    server = start_server("-np", "4", "-c", "4096")
    body = {"prompt": "x", "grammar": WAYS.replace("?", "*"), "max_tokens": 3000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=body, timeout=1)
    eventually(lambda: server.metric("vllm:num_requests_running") == 0, 5)

    def ask():
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(server.url + "/v1/completions", json=body, timeout=60)

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: server.metric("vllm:num_requests_running") == 1, 10)
    begin = time.monotonic()
    server.process.terminate()
    time.sleep(0.2)
    server.process.terminate()
    server.process.wait(10)
    assert time.monotonic() - begin < 10
    thread.join()


CYCLES = [
    {"$defs": {"A": {"$ref": "#/$defs/A"}}, "allOf": [{"$ref": "#/$defs/A"}]},
    {"$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}}, "$ref": "#/$defs/A"},
]
LIST = {
    "definitions": {
        "Node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"description": "x", "allOf": [{"$ref": "#/definitions/Node"}]},
            },
            "required": ["value"],
        }
    },
    "allOf": [{"$ref": "#/definitions/Node"}],
}


@pytest.mark.parametrize("value", CYCLES, ids=["allOf", "anyOf"])
def test_schemas_in_circles(http, value):
    for path, body in ((CHAT, chat()), ("/v1/completions", {"prompt": "x", "max_tokens": 4})):
        answer = http.post(path, json={**body, "response_format": schema(value)})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["code"] == "invalid_grammar" and "itself" in error["message"]


def test_a_linked_list(http):
    answer = http.post(CHAT, json=chat(response_format=schema(LIST), max_tokens=300))
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] == "stop":
        node = json.loads(choice["message"]["content"])
        while node:
            assert 0 <= node["value"] <= 9
            node = node.get("next")


@pytest.fixture(scope="module")
def tool_http(start_server):
    template = next(MODELS.glob("llama.cpp-*/models/templates/Qwen-Qwen2.5-7B-Instruct.jinja"))
    server = start_server("--chat-template-file", template, "-np", "4", "-c", "8192")
    with server.http() as http:
        yield http


def tool(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


def test_tools_with_recursive_parameters(tool_http):
    for choice in ("auto", "required"):
        body = chat(tools=[tool(parameters=LIST)], tool_choice=choice)
        answer = tool_http.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        for value in CYCLES:
            body = chat(tools=[tool(parameters=value)], tool_choice=choice)
            answer = tool_http.post(CHAT, json=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == "tools[0].function.parameters"


BIG = {"enum": [1] * 20_000}
MULTIPLIED = [
    {**BIG, "anyOf": [{}] * 1000},
    {"$defs": {"B": BIG}, "allOf": [{"$ref": "#/$defs/B"}] * 1000},
    {"oneOf": [{"enum": list(range(0, 30_000, 2))}, {"enum": list(range(1, 30_000, 2))}]},
    {"properties": {chr(0x4E00 + i): {"const": i} for i in range(4000)}},
]
MULTIPLIED[3]["required"] = list(MULTIPLIED[3]["properties"])


@pytest.mark.parametrize("value", MULTIPLIED, ids=["choice", "allOf", "oneOf", "names"])
def test_what_a_schema_multiplies_is_bounded(tool_http, value):
    for body in (
        chat(response_format=schema(value)),
        chat(tools=[tool(parameters=value, strict=True)], tool_choice="required"),
    ):
        begin = time.monotonic()
        answer = tool_http.post(CHAT, json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "invalid_grammar"
        assert time.monotonic() - begin < 10


def test_depth_in_what_is_said_already(tool_http):
    begun = '<tool_call>\n{"name": "f", "arguments": {"a": ' + "[" * 10_000
    messages = [*HELLO, {"role": "assistant", "content": begun}]
    tools = [tool(parameters=TOOL_PARAMETERS)]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 4, "tools": tools}
    for stream in (False, True):
        assert tool_http.post(CHAT, json={**body, "stream": stream}).status_code in (200, 400)
    for depth in (100, 7_900_000):
        call = {"name": "f", "arguments": '{"a":' + "[" * depth + "]" * depth + "}"}
        messages = [*HELLO, {"role": "assistant", "tool_calls": [{"function": call}]}]
        answer = tool_http.post(CHAT, json=chat(messages=messages, tools=tools))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"
    assert tool_http.get("/health").status_code == 200


def test_a_strict_tool_is_kept_or_refused(tool_http):
    parameters = {"type": "object", "properties": {"a": {"type": "number", "minimum": 0}}}
    body = chat(tools=[tool(parameters=parameters)])
    assert tool_http.post(CHAT, json=body).status_code == 200
    answer = tool_http.post(CHAT, json=chat(tools=[tool(parameters=parameters, strict=True)]))
    assert answer.status_code == 400 and "'minimum'" in answer.text


@pytest.fixture(scope="module")
def tekken(tmp_path_factory):
    """A model whose pre-tokeniser recurses for each character of a run."""
    folder = tmp_path_factory.mktemp("tekken")
    vocabulary = next(MODELS.glob("llama.cpp-*/models/ggml-vocab-falcon.gguf"))
    data = vocabulary.read_bytes()
    key = b"tokenizer.ggml.pre" + (8).to_bytes(4, "little") + (6).to_bytes(8, "little")
    assert data.count(key + b"falcon") == 1
    (folder / "vocabulary.gguf").write_bytes(data.replace(key + b"falcon", key + b"tekken"))
    arguments = ["--type", "f16", "--vocab", folder / "vocabulary.gguf"]
    subprocess.run([RELAY, "synth", "tiny", folder / "model.gguf", *arguments], check=True)
    server = Server("-m", folder / "model.gguf", "-np", "2", "-c", "16384")
    yield server
    assert server.stop() == 0, server.errors()


@pytest.mark.parametrize("letter", ["A", ".", "字", "😀", " ", "1"])
@pytest.mark.parametrize("count", [30_000, 400_000, 3_000_000])
def test_long_runs(tekken, server, letter, count):
    for each in (tekken, server):
        begin = time.monotonic()
        with each.http() as http:
            body = {"messages": [{"role": "user", "content": letter * count}], "max_tokens": 1}
            answer = http.post(CHAT, json=body)
            if answer.status_code != 200:
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert http.get("/health").status_code == 200
        if answer.status_code == 400:
            assert time.monotonic() - begin < 5


TOOL_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
HISTORY = [
    {"role": "user", "content": "Weather?", "name": None},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": None,
        "tool_calls": [{"id": None, "function": {"name": "f", "arguments": ""}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "user", "content": "Thanks"},
]
ALLOWED = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}
CLIENTS = [
    {"tools": [tool(description=None, parameters=None)]},
    {"tools": [tool(description="d", parameters=TOOL_PARAMETERS)], "messages": HISTORY},
    {"tools": [tool()], "tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED}},
    {"top_p": 0, "temperature": 1},
    {"seed": -1},
    {"max_tokens": -1, "stop": ["a", "e", "i", "o", "u", "n", " "]},
    {"response_format": schema({"type": "integer", "multipleOf": 1})},
    {"response_format": schema(True)},
]


@pytest.mark.parametrize("fields", CLIENTS, ids=lambda fields: next(iter(fields)))
def test_what_real_clients_send(tool_http, fields):
    answer = tool_http.post(CHAT, json=chat(**fields))
    assert answer.status_code == 200, answer.text


def test_a_top_p_of_zero_is_greedy(http):
    texts = {
        http.post(CHAT, json=chat(**fields, max_tokens=12)).json()["choices"][0]["message"][
            "content"
        ]
        for fields in ({"temperature": 0}, {"top_p": 0}, {"top_p": 0, "seed": 5})
    }
    assert len(texts) == 1


def test_completions_have_sixteen_tokens_by_default(http):
    answer = http.post("/v1/completions", json={"prompt": "x", "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [False, True])
def test_a_continued_message_is_answered_with_what_is_new(http, tool_http, stream):
    begun = "The answer to your question is clearly"
    messages = [*HELLO, {"role": "assistant", "content": begun}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 8, "stream": stream}
    for each in (http, tool_http):
        answer = each.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        if stream:
            frames = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            deltas = [json.loads(frame)["choices"][0]["delta"] for frame in frames]
            text = "".join(delta.get("content") or "" for delta in deltas)
        else:
            text = answer.json()["choices"][0]["message"]["content"]
        assert text and begun not in text and not begun.startswith(text)


def test_gzip_bodies(http):
    body = gzip.compress(json.dumps(chat()).encode())
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    assert http.post(CHAT, content=body, headers=headers).status_code == 200
    assert http.post(CHAT, content=body[:-3], headers=headers).status_code == 400
    bomb = gzip.compress(b" " * (17 << 20))
    assert http.post(CHAT, content=bomb, headers=headers).status_code == 413
    headers["Content-Encoding"] = "br"
    assert http.post(CHAT, content=body, headers=headers).status_code == 415


@pytest.mark.parametrize(
    "value, keyword",
    [
        ({"type": "number", "minimum": 0}, "minimum"),
        ({"type": "integer", "multipleOf": 3}, "multipleOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"properties": {"a": {}}, "required": ["b"], "additionalProperties": False}, "required"),
        ({"properties": {"a": {}}, "oneOf": [{"required": ["a"]}]}, "oneOf"),
    ],
)
def test_what_cannot_be_kept_is_named(http, value, keyword):
    answer = http.post(CHAT, json=chat(response_format=schema(value)))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "invalid_grammar" and f"'{keyword}'" in error["message"]
