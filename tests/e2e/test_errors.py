"""What is wrong is refused with the right status, in OpenAI's form, and hurts nobody else."""

import json
import socket

import pytest

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return {"messages": HELLO, "max_tokens": 2, **fields}


@pytest.fixture
def http(server):
    with server.http() as http:
        yield http


def check(answer, status, code, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code and error["message"] and len(error["message"]) <= 1024
    if param is not None:
        assert error["param"] == param
    return error


BAD_FIELDS = [
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"temperature": 3}, "invalid_value", "temperature"),
    ({"n": 0}, "invalid_value", "n"),
    ({"max_tokens": -5}, "invalid_value", "max_tokens"),
    ({"top_p": -1}, "invalid_value", "top_p"),
    ({"stop": [1]}, "invalid_type", "stop[0]"),
    ({"logit_bias": {"999999999": 1}}, "invalid_value", "logit_bias"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": None}, "missing_required_parameter", "messages"),
    ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
    ({"chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
]


@pytest.mark.parametrize("fields, code, param", BAD_FIELDS, ids=str)
def test_bad_fields(http, fields, code, param):
    check(http.post(CHAT, json=chat(**fields)), 400, code, param)


def test_malformed_json_names_the_byte(http):
    error = check(http.post(CHAT, content=b'{"messages": oops}'), 400, "invalid_json")
    assert "byte 13" in error["message"]
    check(http.post(CHAT, content=b""), 400, "invalid_json")
    check(http.post(CHAT, content=b'{"messages": "\xff"}'), 400, "invalid_json")
    check(http.post(CHAT, content=b"[" * 1_000_000), 400, "invalid_json")


def test_schema_that_does_not_compile(http):
    format = {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/definitions/none"}}}
    where = "response_format.json_schema.schema"
    error = check(http.post(CHAT, json=chat(response_format=format)), 400, "invalid_grammar", where)
    assert "#/definitions/none" in error["message"]
    body = {"prompt": "x", "max_tokens": 2, "response_format": format}
    check(http.post("/v1/completions", json=body), 400, "invalid_grammar", where)
    check(http.post(CHAT, json=chat(grammar="root ::= (")), 400, "invalid_grammar", "grammar")


def test_context_length(http):
    error = check(http.post(CHAT, json=chat(max_tokens=1_000_000)), 400, "context_length_exceeded")
    assert "1000000" in error["message"]
    body = {"prompt": [5] * 20_000, "max_tokens": 1}
    error = check(http.post("/v1/completions", json=body), 400, "context_length_exceeded")
    assert "20000" in error["message"] and "16384" in error["message"]


def test_paths_and_methods(http):
    check(http.get("/v1/images/generations"), 404, "not_found")
    check(http.get("/nothing"), 404, "not_found")
    answer = http.get(CHAT)
    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_unknown_model(http):
    check(http.post(CHAT, json=chat(model="gpt-9")), 404, "model_not_found", "model")


def test_huge_body(http):
    check(http.post(CHAT, content=b" " * (17 << 20)), 413, "payload_too_large")
    assert http.post(CHAT, json=chat()).status_code == 200


def test_long_but_allowed_body(http):
    body = chat(user="u" * (8 << 20))
    assert http.post(CHAT, json=body).status_code == 200


def test_garbage_on_the_wire(server, http):
    host, port = server.url.removeprefix("http://").split(":")
    for bytes_sent in (
        b"\x16\x03\x01\x02\x00hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 100,
    ):
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(bytes_sent)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
    assert http.post(CHAT, json=chat()).status_code == 200


def test_cached_prompts_need_an_admin_key(http):
    check(http.get("/v1/cached_prompts"), 403, "admin_key_required")
    check(http.post("/v1/cached_prompts", json={"messages": HELLO}), 403, "admin_key_required")


def test_null_and_unknown_fields(http):
    answer = http.post(CHAT, json=chat(stop=None, tools=None, seed=None, made_up=json.dumps({})))
    assert answer.status_code == 200
