"""What those who run the server lean on: its logs, its dashboard, its description."""

import json
import re

import httpx
from conftest import ROOT


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
