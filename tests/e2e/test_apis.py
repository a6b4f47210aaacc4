"""The other APIs: OpenAI's responses and Anthropic's messages through their unchanged clients, and
what vLLM's and llama-server's users ask for."""

import json
import subprocess

import anthropic
import openai
import pytest
from conftest import RELAY, Server

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
GREEDY = {"temperature": 0}  # no longer an argument of the client's own
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Ulm", "Rom"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ANSWER_SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def ask(claude, body=None, **options):
    options = {"max_tokens": 12, "messages": HELLO, **options}
    return claude.messages.create(model="tiny", extra_body={**GREEDY, **(body or {})}, **options)


def test_messages_say_what_chat_says(claude, client):
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, temperature=0
    )
    answer = ask(claude)
    assert answer.type == "message" and answer.role == "assistant" and answer.model == "tiny"
    assert "".join(b.text for b in answer.content) == chat.choices[0].message.content
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 12
    usage = answer.usage
    prompt = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    assert prompt == chat.usage.prompt_tokens and usage.cache_read_input_tokens > 0


def test_messages_stream(claude):
    whole = ask(claude)
    with claude.messages.stream(
        model="tiny", max_tokens=12, messages=HELLO, extra_body=GREEDY
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert events[0] == "message_start" and events[-1] == "message_stop"
    assert [b.text for b in final.content] == [b.text for b in whole.content]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


# As in test_api.py: random weights never begin a call by themselves, and seldom end its arguments.
CALLING = {**GREEDY, "logit_bias": {"48": 100}}


@pytest.fixture(scope="module")
def tool_server(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "tools.gguf"
    subprocess.run([RELAY, "synth", "tiny", path, "--vocab", "gemma-4"], check=True)
    server = Server("-m", path, "-c", "4096", "--alias", "tiny")
    yield server
    assert server.stop() == 0, server.errors()


def test_messages_tools(tool_server):
    claude = anthropic.Anthropic(base_url=tool_server.url, api_key="none", max_retries=0)
    options = {"tools": [WEATHER], "tool_choice": {"type": "any"}, "max_tokens": 40}
    answer = ask(claude, body=CALLING, **options)
    call = answer.content[-1]
    assert call.type == "tool_use" and call.name == "get_weather" and call.id
    assert answer.stop_reason in ("tool_use", "max_tokens")
    with claude.messages.stream(
        model="tiny", messages=HELLO, extra_body=CALLING, **options
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in events
    assert [b.type for b in final.content] == [b.type for b in answer.content]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    use = {"type": "tool_use", "id": call.id, "name": call.name, "input": {"city": "Ulm"}}
    turns = [
        *HELLO,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    assert ask(claude, messages=turns, tools=[WEATHER]).usage.output_tokens > 0


def test_messages_schema_stop_and_system(claude):
    schema = {"format": {"type": "json_schema", "schema": ANSWER_SCHEMA}}
    answer = ask(claude, max_tokens=30, body={"output_config": schema})
    assert isinstance(json.loads(answer.content[0].text)["yes"], bool)
    text = ask(claude, max_tokens=30).content[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = ask(claude, max_tokens=30, stop_sequences=[stop])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == stop
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    cached = ask(claude, system=system)
    assert cached.usage.cache_creation_input_tokens + cached.usage.cache_read_input_tokens > 0


def test_messages_count_tokens(claude, client):
    counted = claude.messages.count_tokens(model="tiny", messages=HELLO).input_tokens
    chat = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert counted == chat.usage.prompt_tokens


def test_messages_errors(claude, server):
    with pytest.raises(anthropic.BadRequestError) as bad:
        ask(claude, messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}])
    assert bad.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="other", max_tokens=1, messages=HELLO)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with server.http() as http:
        answer = http.post("/v1/messages", content=b"{")
        assert answer.status_code == 400 and answer.json()["type"] == "error"


def test_responses_say_what_chat_says(client):
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, temperature=0
    )
    options = {"model": "tiny", "max_output_tokens": 12, "temperature": 0}
    answer = client.responses.create(input=HELLO[0]["content"], **options)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    with client.responses.stream(input=HELLO[0]["content"], **options) as stream:
        events = list(stream)
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == answer.output_text
    (item,) = (e.item for e in events if e.type == "response.output_item.done")
    assert item.status == answer.output[0].status == "incomplete"


def test_responses_tools(tool_server):
    client = tool_server.client()
    tool = {
        "type": "function",
        "name": WEATHER["name"],
        "parameters": WEATHER["input_schema"],
        "strict": True,
    }
    options = {"model": "tiny", "tools": [tool], "max_output_tokens": 40, "input": "Weather?"}
    first = client.responses.create(tool_choice="required", extra_body=CALLING, **options)
    call = first.output[-1]
    assert call.type == "function_call" and call.name == "get_weather" and call.call_id
    with client.responses.stream(extra_body=CALLING, tool_choice="required", **options) as stream:
        deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    turns = [
        {"role": "user", "content": "Weather?"},
        {**call.model_dump(), "arguments": '{"city": "Ulm"}'},
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    again = client.responses.create(**{**options, "input": turns})
    assert again.usage.output_tokens > 0


def test_responses_schema(client):
    form = {"format": {"type": "json_schema", "name": "answer", "schema": ANSWER_SCHEMA}}
    answer = client.responses.create(
        model="tiny", input="Yes?", text=form, max_output_tokens=30, temperature=0
    )
    assert isinstance(json.loads(answer.output_text)["yes"], bool)


def test_responses_keep_nothing(client):
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="a", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="store"):
        client.responses.create(model="tiny", input="a", store=True)
    with pytest.raises(openai.NotFoundError, match="not stored"):
        client.responses.retrieve("resp_1")


@pytest.mark.parametrize(
    "kind",
    ["web_search", "file_search", "computer", "code_interpreter", "image_generation", "mcp"]
    + ["local_shell", "shell", "apply_patch", "custom"],
)
def test_hosted_tools_are_refused(client, kind):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="a", tools=[{"type": kind}])
    assert refused.value.param == "tools[0].type" and f"'{kind}'" in refused.value.message


def test_tokenizer(server, client):
    with server.http() as http:
        vllm = http.post("/tokenize", json={"model": "tiny", "prompt": "Hello there"}).json()
        assert vllm["count"] == len(vllm["tokens"]) and vllm["max_model_len"] > 0
        llama = http.post("/tokenize", json={"content": "Hello there", "with_pieces": True}).json()
        assert "".join(token["piece"] for token in llama["tokens"]).strip() == "Hello there"
        ids = [token["id"] for token in llama["tokens"]]
        assert http.post("/detokenize", json={"tokens": ids}).json()["content"] == "Hello there"
        prompt = http.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
        assert HELLO[0]["content"] in prompt
        chat = http.post("/tokenize", json={"messages": HELLO}).json()
        usage = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).usage
        assert chat["count"] == usage.prompt_tokens
        assert http.get("/version").json()["version"]
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="tiny", input="a")
