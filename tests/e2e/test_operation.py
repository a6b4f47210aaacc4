"""What those who run the server lean on: its logs, its dashboard, its description, TLS."""

import json
import re
import ssl
import subprocess

import httpx
import openai
import pytest
from conftest import RELAY, ROOT


def test_json_logs_have_request_ids(start_server):
    server = start_server("--log-format", "json", "--log-level", "debug", "-c", "2048")
    headers = {"x-request-id": 'mine-"1"'}
    assert httpx.get(server.url + "/health", headers=headers, timeout=30).status_code == 200
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    asked = next(line for line in lines if line.get("path") == "/health")
    assert asked["request_id"] == headers["x-request-id"] and asked["status"] == 200
    assert any(line["message"] == "ended" for line in lines)


def test_json_logs_tell_of_streams_that_fail(start_server):
    server = start_server("--log-format", "json", "--drain-timeout", "0.1", "-c", "8192")
    hello = [{"role": "user", "content": "Hello"}]
    with server.client() as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=hello,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers={"x-request-id": "mine"},
        )
        next(iter(stream))
        assert server.stop() == 0
        with pytest.raises(openai.APIError, match="ended this request"):
            list(stream)
    lines = [json.loads(line) for line in server.log]
    failed = next(line for line in lines if line.get("request_id") == "mine")
    assert failed["status"] == 503 and failed["level"] == "warning"


def test_json_logs_say_why_it_did_not_start(tmp_path):
    command = [RELAY, "serve", "-m", tmp_path / "none.gguf", "--log-format", "json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert line["level"] == "critical" and "cannot be read" in line["message"]


def test_the_dashboard_asks_for_metrics_there_are(server, client):
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=3
    )
    there = httpx.get(server.url + "/metrics", timeout=30).text
    dashboard = (ROOT / "deploy/grafana.json").read_text()
    json.loads(dashboard)
    names = set(re.findall(r"((?:vllm|relay):\w+)\{", dashboard))
    assert len(names) > 20
    for name in names:
        assert re.search(rf"^{name}(\{{| )", there, re.MULTILINE), name


def test_openapi_describes_what_is_served(server):
    document = httpx.get(server.url + "/openapi.json", timeout=30).json()
    assert document["openapi"].startswith("3.1")
    for path, methods in document["paths"].items():
        for method in methods:
            target = re.sub(r"\{\w+\}", "x", path)
            content = b"{" if method in ("post", "patch") else None
            answer = httpx.request(method, server.url + target, content=content, timeout=30)
            if answer.status_code == 404:  # of a thing, not of the endpoint
                assert "There is nothing at" not in answer.text
            assert answer.status_code not in (405, 500), (method, path)


@pytest.fixture(scope="module")
def key_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "server.crt", folder / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        + ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        + ["-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.mark.parametrize(
    ("for_certificate", "for_key"),
    [("--ssl-certfile", "--ssl-keyfile"), ("--ssl-cert-file", "--ssl-key-file")],
    ids=["as-vllm", "as-llama-server"],
)
def test_tls(start_server, key_pair, for_certificate, for_key):
    server = start_server(for_certificate, key_pair[0], for_key, key_pair[1], "-c", "2048")
    assert server.url.startswith("https://") and server.url in server.ready_line
    trusting = ssl.create_default_context(cafile=key_pair[0])
    with httpx.Client(verify=trusting, timeout=60) as http:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", http_client=http)
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hello " * 300}],
            max_tokens=50,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert client.completions.create(model="tiny", prompt="Once", max_tokens=2).choices
        assert "vllm:num_requests_running" in http.get(server.url + "/metrics").text
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(server.url + "/health")
    with pytest.raises(httpx.HTTPError):
        httpx.get(server.url.replace("https", "http") + "/health")
    assert server.stop() == 0


def test_tls_that_cannot_be_had_is_said_at_once(model, key_pair):
    certificate, key = key_pair
    for arguments, message in (
        (["--ssl-certfile", certificate], "both, --ssl-certfile and --ssl-keyfile"),
        (["--ssl-keyfile", key], "both, --ssl-certfile and --ssl-keyfile"),
        (["--ssl-certfile", "/no/such", "--ssl-keyfile", key], "'/no/such' cannot be read"),
        (["--ssl-certfile", key, "--ssl-keyfile", key], "is no certificate in PEM"),
        (["--ssl-certfile", certificate, "--ssl-keyfile", certificate], "is no key in PEM"),
    ):
        command = [RELAY, "serve", "-m", model, "--port", "0", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode != 0 and message in ended.stderr, ended.stderr
        assert "listening" not in ended.stderr
