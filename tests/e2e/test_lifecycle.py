"""Start, keys, a full queue, and the end."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import threading
import time

import httpx
import openai
import pytest
from conftest import LONG_PROMPT, RELAY, eventually

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def endless(**fields):
    return {"messages": HELLO, "max_tokens": 20_000, "ignore_eos": True, **fields}


def run_serve(*arguments, env=None, timeout=60):
    return subprocess.run(
        [RELAY, "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )


def test_missing_model(tmp_path):
    result = run_serve("-m", tmp_path / "none.gguf", "--port", "0")
    assert result.returncode != 0 and "none.gguf" in result.stderr


def test_no_model_at_all(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"this is no model" * 100)
    result = run_serve("-m", broken, "--port", "0")
    assert result.returncode != 0 and "error" in result.stderr


def test_unreadable_prompt_file(model, tmp_path):
    result = run_serve("-m", model, "--port", "0", "--pin-prompt", tmp_path / "none.txt")
    assert result.returncode != 0 and "none.txt" in result.stderr
    bad = tmp_path / "bad.json"
    bad.write_text('[{"role": "king", "content": "x"}]')
    result = run_serve("-m", model, "--port", "0", "--pin-prompt", bad)
    assert result.returncode != 0 and "role" in result.stderr


def test_prompt_beyond_the_pin_budget(model, prompt_file):
    result = run_serve("-m", model, "--port", "0", "--pin-prompt", prompt_file, "-c", "4096")
    assert result.returncode != 0 and "--pin-budget" in result.stderr


def test_port_in_use(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_serve("-m", model, "--port", taken.getsockname()[1])
    assert result.returncode != 0 and "in use" in result.stderr


def test_a_disabled_module_is_not_called_active(model):
    result = run_serve("-m", model, "--port", "0", env={"RELAY_DISABLE": "1"})
    assert (
        result.returncode != 0
        and "RELAY_DISABLE" in result.stderr
        and "--relay off" in result.stderr
    )


def test_unknown_option(model):
    assert run_serve("-m", model, "--prot", "1").returncode != 0


def test_public_without_a_key_warns(start_server):
    server = start_server("--host", "0.0.0.0", "-c", "2048")
    assert "ANYONE" in server.errors()
    assert server.stop() == 0


def test_keys(start_server, tmp_path):
    admin = tmp_path / "admin.txt"
    admin.write_text("# administrators\nroot-key\n")
    server = start_server(
        "--admin-key-file", admin, "-c", "4096", env={"RELAY_API_KEY": "first,second"}
    )
    assert httpx.get(server.url + "/health").status_code == 200
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(server.url + path).status_code == 401
    with pytest.raises(openai.AuthenticationError) as error:
        server.client("wrong").models.list()
    assert error.value.code == "invalid_api_key"
    for key in ("first", "second", "root-key"):
        assert server.client(key).models.list().data

    # Callers with different keys do not see each other's cache; one and the same does.
    question = [{"role": "user", "content": "a secret question " * 20}]
    cached = [
        server.client(key)
        .chat.completions.create(model="tiny", messages=question, max_tokens=1)
        .usage.prompt_tokens_details.cached_tokens
        for key in ("first", "second", "first")
    ]
    assert cached[1] <= cached[0] < cached[2]
    salts_divide_what_a_key_has(server)
    cached_prompts(server)
    assert server.stop() == 0


def cached_tokens(server, key, messages, salt):
    answer = server.client(key).chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, extra_body={"cache_salt": salt}
    )
    return answer.usage.prompt_tokens_details.cached_tokens


def salts_divide_what_a_key_has(server):
    question = [{"role": "user", "content": "another secret question " * 20}]
    asked = [("first", "a"), ("second", "a"), ("root-key", "a"), ("first", "b"), ("first", "a")]
    cached = [cached_tokens(server, key, question, salt) for key, salt in asked]
    assert max(cached[:4]) < 20 < cached[4], cached

    # A prompt pinned with a salt is for those who send it, whatever their key.
    url, root = server.url + "/v1/cached_prompts", {"Authorization": "Bearer root-key"}
    system = [{"role": "system", "content": "You keep the doors of a house. " * 30}]
    body = {"messages": system, "cache_salt": "tenants"}
    made = httpx.post(url, json=body, headers=root, timeout=60).json()
    for key in ("first", "second"):
        assert cached_tokens(server, key, system + HELLO, "tenants") >= made["tokens"] - 1
        assert cached_tokens(server, key, system + HELLO, "others") < 20
        assert cached_tokens(server, key, system + HELLO, "") < 20
    assert httpx.delete(f"{url}/{made['id']}", headers=root).status_code == 200


def cached_prompts(server):
    url = server.url + "/v1/cached_prompts"
    root = {"Authorization": "Bearer root-key"}
    system = [{"role": "system", "content": LONG_PROMPT[:1500]}]
    body = {"name": "rules", "messages": system, "ttl": 600}
    user = {"Authorization": "Bearer first"}
    assert httpx.post(url, json=body, headers=user).status_code == 403
    answer = httpx.post(url, json=body, headers=root, timeout=60)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert made["object"] == "cached_prompt" and made["status"] == "ready" and made["tokens"] > 100
    assert made["expires_at"] == pytest.approx(time.time() + 600, abs=30)
    usage = (
        server.client("second")
        .chat.completions.create(model="tiny", messages=system + HELLO, max_tokens=1)
        .usage
    )
    assert usage.prompt_tokens_details.cached_tokens >= made["tokens"] - 1  # pinned: for all
    one = url + "/" + made["id"]
    assert httpx.get(one, headers=root).json()["prefix_sha256"] == made["prefix_sha256"]
    assert httpx.patch(one, json={"ttl": 0}, headers=root).json()["expires_at"] is None
    too_long = {"messages": [{"role": "system", "content": LONG_PROMPT}]}
    refused = httpx.post(url, json=too_long, headers=root, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "pin_budget_exceeded")
    assert httpx.delete(one, headers=root).json()["deleted"] is True
    assert httpx.get(one, headers=root).status_code == 404
    assert httpx.get(url, headers=root).json()["data"] == []


def test_full_queue(start_server):
    server = start_server("-np", "1", "--max-queue", "1", "-c", "8192")
    body = endless(max_tokens=6000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [
            pool.submit(httpx.post, server.url + CHAT, json=body, timeout=120) for _ in range(2)
        ]
        eventually(lambda: server.metric("vllm:num_requests_waiting") == 1, 20)
        refused = httpx.post(server.url + CHAT, json=body)
        assert refused.status_code == 429, refused.text
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert all(job.result().status_code == 200 for job in running)
    assert httpx.post(server.url + CHAT, json=endless(max_tokens=2)).status_code == 200
    assert server.stop() == 0


def test_drain(start_server):
    server = start_server("-c", "8192")
    lines = []

    def read():
        body = endless(max_tokens=1500, stream=True)
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)

    reader = threading.Thread(target=read)
    reader.start()
    eventually(lambda: len(lines) > 4, 20)
    server.process.send_signal(signal.SIGINT)
    seen = set()
    while server.process.poll() is None:
        try:
            seen.add(httpx.post(server.url + CHAT, json=endless(max_tokens=1)).status_code)
            seen.add(httpx.get(server.url + "/health").status_code)
        except httpx.TransportError:
            break  # it has ended
    reader.join(60)
    assert server.process.wait(60) == 0, server.errors()
    assert [line for line in lines if line][-1] == "data: [DONE]"  # what ran was finished
    assert 503 in seen


def test_drain_timeout_ends_what_does_not(start_server):
    server = start_server("-c", "30000", "--drain-timeout", "0.3")
    with httpx.stream("POST", server.url + CHAT, json=endless(stream=True), timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1].startswith('data: {"error":')
    assert server.process.wait(30) == 0, server.errors()


def test_second_signal_ends_at_once(start_server):
    server = start_server("-c", "30000")
    body = endless(max_tokens=29_000)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(httpx.post, server.url + CHAT, json=body, timeout=60)
        eventually(lambda: server.metric("vllm:num_requests_running") == 1, 10)
        server.process.send_signal(signal.SIGINT)
        eventually(lambda: "draining" in server.errors(), 10)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == 128 + signal.SIGINT
        with pytest.raises(httpx.TransportError):
            job.result()


def test_loading_is_answered(start_server, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text(LONG_PROMPT * 6)
    server = start_server("--pin-prompt", long, "--pin-budget", "0.9", "-c", "30000", wait=False)
    health = httpx.get(server.url + "/health")
    answer = httpx.post(server.url + CHAT, json=endless(max_tokens=1))
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
    assert int(answer.headers["retry-after"]) >= 1
    server.wait_ready()
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert server.stop() == 0
    assert CHAT in server.errors() and "/health" not in server.errors(), "only requests failed"


def test_json_prompt_file(start_server, tmp_path):
    path = tmp_path / "prompt.json"
    path.write_text('[{"role": "system", "content": "Short and clear."}]')
    server = start_server("--pin-prompt", path, "-c", "2048")
    usage = (
        server.client()
        .chat.completions.create(
            model="tiny",
            messages=[{"role": "system", "content": "Short and clear."}, *HELLO],
            max_tokens=1,
        )
        .usage
    )
    pinned = server.metric("relay:pinned_tokens")
    assert pinned > 3 and usage.prompt_tokens_details.cached_tokens >= pinned - 1
    assert server.stop() == 0


def test_several_prompts_are_named_by_the_environment(start_server, tmp_path):
    files = [tmp_path / "one.txt", tmp_path / "two, three.txt"]
    for file in files:
        file.write_text(f"{file.name}: short and clear.")
    server = start_server("-c", "2048", env={"RELAY_PIN_PROMPT": ",".join(map(str, files[:1] * 2))})
    eventually(lambda: server.errors().count("pinned one.txt") == 2, 10)
    assert server.stop() == 0
    server = start_server("-c", "2048", env={"RELAY_PIN_PROMPT": str(files[1])})
    eventually(lambda: "pinned two, three.txt" in server.errors(), 10)
    assert server.stop() == 0


# As Llama 3's template prints the date before the system prompt; the seconds, to see them change.
CLOCK_TEMPLATE = """Now: {{ strftime_now('%H:%M:%S') }}
{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def test_a_pinned_prompt_follows_the_clock_in_its_template(start_server, prompt_file, tmp_path):
    template = tmp_path / "clock.jinja"
    template.write_text(CLOCK_TEMPLATE)
    admin = tmp_path / "admin.txt"
    admin.write_text("root-key")
    arguments = ["--chat-template-file", template, "--pin-prompt", prompt_file, "-c", "8192"]
    arguments += ["--pin-budget", "0.5", "--admin-key-file", admin]
    server = start_server(*arguments, "--pin-refresh", "0.1")
    chat = [{"role": "system", "content": LONG_PROMPT}, *HELLO]
    url, root = server.url + "/v1/cached_prompts", {"Authorization": "Bearer root-key"}

    def pinned():
        return httpx.get(url, headers=root, timeout=60).json()["data"]

    (first,) = pinned()

    def follows():
        (now,) = pinned()
        body = {"messages": chat, "max_tokens": 1}
        usage = httpx.post(server.url + CHAT, json=body, timeout=60).json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        changed = now["prefix_sha256"] != first["prefix_sha256"]
        return now["id"] == first["id"] and changed and cached >= now["tokens"] - 1

    eventually(follows, 20)
    assert "reads differently" in server.errors()
    assert httpx.delete(f"{url}/{first['id']}", headers=root, timeout=60).status_code == 200
    assert pinned() == []
    assert server.metric("relay:pinned_tokens") == 0
    assert server.stop() == 0


def test_template_kwargs_are_given_to_every_chat(start_server, tmp_path):
    template = tmp_path / "kwargs.jinja"
    template.write_text("{{ word * 50 }}{{ messages[0].content }}")
    server = start_server(
        *("--chat-template-file", template, "-c", "2048"),
        *("--chat-template-kwargs", '{"word": "door "}'),
    )

    def prompt_tokens(**kwargs):
        body = {"messages": HELLO, "max_tokens": 1, **kwargs}
        return httpx.post(server.url + CHAT, json=body).json()["usage"]["prompt_tokens"]

    assert prompt_tokens() >= 50
    assert prompt_tokens(chat_template_kwargs={"word": ""}) < 10
    assert server.stop() == 0


WRONG = [["--chat-template-kwargs", "[1]"], ["--prot", "1"], ["serv"]]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_usage_errors_say_where_help_is(model, arguments):
    result = run_serve("-m", model, "--port", "0", *arguments)
    assert result.returncode != 0 and arguments[0] in result.stderr


def test_several_names(start_server):
    server = start_server("--served-model-name", "one,two", "-c", "2048")
    client = server.client()
    assert [model.id for model in client.models.list().data] == ["one", "two"]
    assert client.completions.create(model="two", prompt="x", max_tokens=1).model == "two"
    assert server.stop() == 0
