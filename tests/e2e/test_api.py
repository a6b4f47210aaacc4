"""The official client's view of chat and text completions."""

import asyncio
import json
import subprocess

import httpx
import openai
import pytest
from conftest import LONG_PROMPT, RELAY, Server

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def joined(stream):
    text, finish, chunks, usage = "", None, 0, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = getattr(choice, "delta", None)
            text += (delta.content if delta else choice.text) or ""
            finish = choice.finish_reason or finish
            chunks += 1
    return text, finish, chunks, usage


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"
    assert model.root.endswith(".gguf") and model.max_model_len > 0


def test_chat(client):
    answer = client.chat.completions.create(messages=HELLO, **GREEDY)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny" and answer.system_fingerprint
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    # However often it was asked before: the last token is always computed.
    assert 0 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_chat_stream_says_the_same(client):
    whole = client.chat.completions.create(messages=HELLO, **GREEDY)
    text, finish, chunks, usage = joined(
        client.chat.completions.create(messages=HELLO, stream=True, **GREEDY)
    )
    assert text == whole.choices[0].message.content
    assert finish == "length" and usage is None
    assert 2 <= chunks <= 13


def test_completions_stream_says_the_same(client):
    whole = client.completions.create(prompt="Once upon a time", **GREEDY)
    assert whole.object == "text_completion" and whole.choices[0].text
    text, finish, _, usage = joined(
        client.completions.create(
            prompt="Once upon a time", stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert text == whole.choices[0].text and finish == "length"
    assert usage.completion_tokens == 12
    assert usage.prompt_tokens_details.cached_tokens > 0  # asked for the second time


def test_stream_frames(server):
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, **GREEDY}
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    frames = text.split("\n\n")
    assert frames.pop() == "" and frames.pop() == "data: [DONE]"
    assert all(frame.startswith("data: {") for frame in frames)
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in c["choices"][0]["delta"] for c in chunks[1:-1])
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 12


def test_continuous_usage(client):
    stream = client.chat.completions.create(
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        **GREEDY,
    )
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 12


def test_cached_tokens_on_the_second_request(client):
    messages = [{"role": "user", "content": "A question nobody asked before: " + "why? " * 60}]
    first = client.chat.completions.create(messages=messages, **GREEDY).usage
    second = client.chat.completions.create(messages=messages, **GREEDY).usage
    assert first.prompt_tokens == second.prompt_tokens
    assert first.prompt_tokens_details.cached_tokens < 10
    assert second.prompt_tokens_details.cached_tokens >= second.prompt_tokens - 2


def test_token_prompts(client):
    one = client.completions.create(prompt=[1, 15043, 3186], **GREEDY)
    assert one.usage.prompt_tokens == 3
    many = client.completions.create(prompt=[[1, 15043, 3186], [1, 306]], **GREEDY)
    assert [c.index for c in many.choices] == [0, 1]
    assert many.choices[0].text == one.choices[0].text
    texts = client.completions.create(prompt=["One", "Two", "Three"], **GREEDY)
    assert len(texts.choices) == 3 and texts.usage.completion_tokens == 36


def test_echo(client):
    answer = client.completions.create(prompt="Say after me", echo=True, **GREEDY)
    assert answer.choices[0].text.startswith("Say after me")
    assert len(answer.choices[0].text) > len("Say after me")


def test_logprobs_of_the_prompt(client, server):
    """What evaluation harnesses ask for: how likely a given continuation is, token by token."""
    whole = "Say after me, and then on your own: " + LONG_PROMPT[:200]
    answer = client.completions.create(
        model="tiny", prompt=whole, echo=True, logprobs=2, max_tokens=0, temperature=0
    )
    scored = answer.choices[0].logprobs
    assert answer.choices[0].text == whole and answer.usage.completion_tokens == 0
    assert scored.token_logprobs[0] is None and scored.top_logprobs[0] is None
    assert all(score <= 0 for score in scored.token_logprobs[1:])
    assert len(scored.tokens) == len(scored.top_logprobs) == answer.usage.prompt_tokens
    # The same as asking for the next token after each beginning of the prompt.
    with server.http() as http:
        ids = http.post("/tokenize", json={"prompt": whole}).json()["tokens"]
    assert len(ids) == len(scored.tokens)
    for at in (1, len(ids) // 2, len(ids) - 1):
        step = client.completions.create(
            model="tiny", prompt=ids[:at], logprobs=1, max_tokens=1, temperature=0
        )
        best = step.choices[0].logprobs.token_logprobs[0]
        assert abs(best - max(scored.top_logprobs[at].values())) < 0.05
    # Scored prompts are computed whole; what they leave in the cache serves others.
    again = client.completions.create(
        model="tiny", prompt=[whole, "Another"], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    assert [c.logprobs.token_logprobs[0] for c in again.choices] == [None, None]
    last = again.choices[0].logprobs.token_logprobs[1:-1]
    assert all(abs(a - b) < 0.05 for a, b in zip(last, scored.token_logprobs[1:], strict=True))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", max_tokens=0)


def test_n_choices_differ_and_repeat_with_a_seed(client):
    options = {"model": "tiny", "max_tokens": 8, "n": 3, "seed": 5, "temperature": 1}
    first = client.chat.completions.create(messages=HELLO, **options)
    texts = [choice.message.content for choice in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert first.usage.completion_tokens <= 24
    again = client.chat.completions.create(messages=HELLO, **options)
    assert [choice.message.content for choice in again.choices] == texts


def test_stop_string(client):
    options = {**GREEDY, "max_tokens": 30}
    text = client.completions.create(prompt="Once", **options).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = client.completions.create(prompt="Once", stop=stop, **options).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == text[: text.index(stop)]
    streamed, finish, _, _ = joined(
        client.completions.create(prompt="Once", stop=[stop], stream=True, **options)
    )
    assert (streamed, finish) == (cut.text, "stop")


def test_chat_logprobs(client):
    answer = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        best = max(top.logprob for top in token.top_logprobs)
        assert token.logprob == pytest.approx(best, abs=1e-4)  # greedy takes the best
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text.strip() == answer.choices[0].message.content.strip()


def test_legacy_logprobs(client):
    logprobs = client.completions.create(prompt="Once", logprobs=2, **GREEDY).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    assert all(len(top) in (2, 3) for top in logprobs.top_logprobs)


def test_logit_bias(client):
    answer = client.completions.create(prompt=[1], logit_bias={"15043": 100}, **GREEDY)
    assert answer.choices[0].text.split() == ["Hello"] * 12


def test_characters_split_over_tokens(client):
    wanted = "\U0001f9a9\U00010348\U0001f9a9"
    options = {
        "messages": HELLO,
        "model": "tiny",
        "extra_body": {"grammar": f'root ::= "{wanted}"'},
    }
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content.strip() == wanted
    assert answer.usage.completion_tokens > len(wanted)  # so there was something to split
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(stream=True, **options)
    ]
    assert "".join(pieces).strip() == wanted
    assert not any("\ufffd" in piece for piece in pieces)


SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}, "door": {"enum": ["left", "right"]}},
    "required": ["open", "door"],
    "additionalProperties": False,
}


def test_json_schema(client):
    answer = client.chat.completions.create(
        messages=HELLO,
        model="tiny",
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "d", "schema": SCHEMA}},
    )
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"open", "door"} and value["door"] in ("left", "right")
    assert answer.choices[0].finish_reason == "stop"


def test_json_schema_in_completions(server):
    body = {
        "prompt": "The door:",
        "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    }
    with server.http() as http:
        text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert set(json.loads(text)) == {"open", "door"}


def test_tools_a_template_cannot_show_are_refused(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(messages=HELLO, model="tiny", tools=[TOOL])
    assert error.value.code == "invalid_chat_template"


@pytest.fixture(scope="module")
def tool_client(tmp_path_factory):
    """A model whose vocabulary and template know tools."""
    path = tmp_path_factory.mktemp("tools") / "tools.gguf"
    subprocess.run([RELAY, "synth", "tiny", path, "--vocab", "gemma-4"], check=True)
    server = Server("-m", path, "-c", "4096", "--alias", "tiny")
    yield server.client()
    assert server.stop() == 0, server.errors()


TOOL = {"type": "function", "function": {"name": "move_door", "parameters": SCHEMA}}
# Random weights never begin a call by themselves (templates allow text before it, even where one
# is required): the token <|tool_call> is made the likeliest. The grammar does the rest, but such
# a model seldom finds the end of the arguments, so those are not judged as a whole.
CALL = {
    "messages": HELLO,
    "model": "tiny",
    "temperature": 0,
    "max_tokens": 40,
    "tools": [TOOL],
    "logit_bias": {"48": 100},
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "move_door"}}]
)
def test_tool_call(tool_client, choice):
    (only,) = tool_client.chat.completions.create(tool_choice=choice, **CALL).choices
    call = only.message.tool_calls[0]
    assert call.function.name == "move_door" and call.id.startswith("call_")
    assert call.function.arguments.startswith("{") and not only.message.content


def test_a_tool_whose_schema_does_not_compile(tool_client):
    broken = {"name": "move", "parameters": {"$ref": "#/definitions/none"}}
    tools = [TOOL, {"type": "function", "function": broken}]
    with pytest.raises(openai.BadRequestError) as error:
        tool_client.chat.completions.create(messages=HELLO, model="tiny", tools=tools)
    assert error.value.code == "invalid_grammar"
    assert error.value.param == "tools[1].function.parameters"
    assert "#/definitions/none" in error.value.message


def test_tool_call_stream(tool_client):
    whole = tool_client.chat.completions.create(tool_choice="required", **CALL).choices[0]
    name, arguments, ids = "", "", set()
    stream = tool_client.chat.completions.create(tool_choice="required", stream=True, **CALL)
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.index > 0:
                continue
            name += call.function.name or ""
            arguments += call.function.arguments or ""
            ids |= {call.id} if call.id else set()
    assert name == "move_door" and len(ids) == 1
    assert arguments == whole.message.tool_calls[0].function.arguments


def test_async_client(tool_client):
    """Whole answers, streams and tool calls, all at once on one event loop."""

    async def whole(client, i):
        answer = await client.chat.completions.create(
            messages=[{"role": "user", "content": f"Question {i}"}], **GREEDY
        )
        assert answer.usage.completion_tokens == 12
        return answer.choices[0].message.content

    async def stream(client, i):
        pieces = await client.chat.completions.create(
            messages=[{"role": "user", "content": f"Question {i}"}], stream=True, **GREEDY
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in pieces])

    async def call(client):
        answer = await client.chat.completions.create(tool_choice="required", **CALL)
        return answer.choices[0].message.tool_calls[0].function

    async def run():
        options = {"base_url": str(tool_client.base_url), "api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(**options) as client:
            return await asyncio.gather(
                *(whole(client, i) for i in range(8)),
                *(stream(client, i) for i in range(8)),
                *(call(client) for _ in range(4)),
            )

    answers = asyncio.run(run())
    assert answers[:8] == answers[8:16], "a stream says what a whole answer says"
    assert {function.name for function in answers[16:]} == {"move_door"}
    assert len({function.arguments for function in answers[16:]}) == 1


def test_request_id_comes_back(server):
    answer = httpx.get(server.url + "/health", headers={"x-request-id": "mine-1"})
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine-1"


def test_metrics(server, client):
    client.completions.create(prompt="Once", **GREEDY)
    before = server.metric("vllm:generation_tokens_total")
    client.completions.create(prompt="Once", **GREEDY)
    assert server.metric("vllm:generation_tokens_total") - before == 12
    assert server.metric("vllm:request_success_total") > 0
    assert server.metric("vllm:time_to_first_token_seconds_count") > 0
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:prefix_cache_hits_total") > 0


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(messages=HELLO, model="gpt-9")
    assert error.value.code == "model_not_found"
