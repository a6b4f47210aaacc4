"""Many requests over one long pinned prompt."""

import concurrent.futures
import time

import httpx
from conftest import LONG_PROMPT, eventually

GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 16}
PROMPTS = 32


def messages(i):
    return [
        {"role": "system", "content": LONG_PROMPT},
        {"role": "user", "content": f"Which door comes before door {i}?"},
    ]


def ask(client, i):
    """Ends in words of its own: a small random model hears the last of them best."""
    begun = {"role": "assistant", "content": f"The door before door {i} is number {i * 37 % 101}"}
    return client.chat.completions.create(
        messages=[*messages(i), begun], extra_body={"continue_final_message": True}, **GREEDY
    )


def test_the_pinned_prompt_is_found(server, client):
    pinned = server.metric("relay:pinned_tokens")
    assert pinned > 1500 and f"pinned {pinned:.0f} tokens" in server.ready_line
    usage = ask(client, 0).usage
    assert usage.prompt_tokens_details.cached_tokens >= pinned - 1
    assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens < 100


def test_concurrent_answers_are_those_of_single_runs(server, client):
    single = [ask(client, i).choices[0].message.content for i in range(PROMPTS)]
    # Different questions, different answers, as far as a small random model can tell them apart.
    assert len(set(single)) > PROMPTS // 8
    with concurrent.futures.ThreadPoolExecutor(PROMPTS) as pool:
        together = list(pool.map(lambda i: ask(client, i), range(PROMPTS)))
    assert [answer.choices[0].message.content for answer in together] == single
    pinned = server.metric("relay:pinned_tokens")
    for answer in together:
        assert answer.usage.prompt_tokens_details.cached_tokens >= pinned - 1


def test_the_prompt_is_stored_once(server):
    pinned = server.metric("relay:pinned_tokens")
    most = {"cells": 0, "running": 0}
    body = {"messages": messages(1), "max_tokens": 400, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        jobs = [
            pool.submit(httpx.post, server.url + "/v1/chat/completions", json=body, timeout=120)
            for _ in range(16)
        ]
        while not all(job.done() for job in jobs):
            running = server.metric("vllm:num_requests_running")
            if running >= most["running"]:
                most = {"cells": server.private_cells(), "running": running}
            time.sleep(0.02)
    assert most["running"] >= 8
    # Stored for each, the prompt alone would take 16 times its length.
    assert most["cells"] < 16 * (400 + 100) < 16 * pinned
    assert server.metric("relay:kv_bytes_saved_total") > 0


def test_a_client_that_leaves_frees_its_cells(server):
    body = {"messages": messages(2), "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as http:
        with http.stream("POST", server.url + "/v1/chat/completions", json=body) as answer:
            chunks = answer.iter_lines()
            for _ in range(10):
                next(chunks)
            assert server.metric("vllm:num_requests_running") == 1
            assert server.private_cells() > 0
        # leaving the block closes the connection
    eventually(
        lambda: server.metric("vllm:num_requests_running") == 0 and server.private_cells() == 0, 1
    )


def test_a_waiting_client_that_leaves_is_noticed(server):
    body = {"messages": messages(3), "max_tokens": 10_000, "ignore_eos": True}
    with httpx.Client(timeout=1.0) as http:
        try:
            http.post(server.url + "/v1/chat/completions", json=body)
            raise AssertionError("answered before the time was over")
        except httpx.ReadTimeout:
            pass
    eventually(
        lambda: server.metric("vllm:num_requests_running") == 0 and server.private_cells() == 0, 1
    )


def test_thirty_streams_left_at_once(server):
    body = {"messages": messages(4), "max_tokens": 5_000, "ignore_eos": True, "stream": True}
    clients = [httpx.Client(timeout=60) for _ in range(30)]
    for http in clients:
        request = http.build_request("POST", server.url + "/v1/chat/completions", json=body)
        next(http.send(request, stream=True).iter_lines())
    for http in clients:
        http.close()
    eventually(
        lambda: server.metric("vllm:num_requests_running") == 0 and server.private_cells() == 0, 2
    )
    assert server.metric("vllm:num_requests_waiting") == 0
