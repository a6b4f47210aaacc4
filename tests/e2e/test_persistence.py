"""What outlives a restart through --prompt-cache-dir: pinned and often shared prefixes."""

import re
import resource

import pytest
from conftest import LONG_PROMPT, eventually

MANY = ("-np", "8", "-c", "8192", "--pin-budget", "0.5")


def ask(server, question):
    messages = [
        {"role": "system", "content": LONG_PROMPT},
        {"role": "user", "content": question},
    ]
    with server.client() as client:
        return client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=12, logprobs=True
        )


def tokens_of(answer):
    return [token.token for token in answer.choices[0].logprobs.content]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prompts"


def restored(server):
    # It is ready before all of its log has been read here.
    line = re.compile(r"restored (\d+) tokens of prompts")
    eventually(lambda: line.search(server.errors()), 10)
    return int(line.search(server.errors())[1])


def end(server):
    assert server.stop() == 0, server.errors()


def test_a_pinned_prompt_is_not_computed_again(start_server, prompt_file, folder):
    first = start_server("--pin-prompt", prompt_file, "--prompt-cache-dir", folder, *MANY)
    assert restored(first) == 0
    pinned = first.metric("relay:pinned_tokens")
    assert first.metric("relay:computed_prompt_tokens_total") >= pinned
    answer = ask(first, "Which door is first?")
    eventually(lambda: len(list(folder.glob("*.kv"))) == 1, 30)
    end(first)

    second = start_server("--pin-prompt", prompt_file, "--prompt-cache-dir", folder, *MANY)
    assert restored(second) >= pinned
    assert second.metric("relay:pinned_tokens") == pinned
    assert second.metric("relay:computed_prompt_tokens_total") == 0
    again = ask(second, "Which door is first?")
    assert tokens_of(again) == tokens_of(answer)
    assert again.usage.prompt_tokens_details.cached_tokens >= pinned - 1
    end(second)

    # Other keys and values mean another key: nothing of it is used.
    other = start_server("--prompt-cache-dir", folder, "--cache-type-k", "bf16", *MANY)
    assert restored(other) == 0
    end(other)


def test_what_clients_share_is_kept_for_them_alone(start_server, folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    arguments = ("--api-key-file", keys, "--prompt-cache-dir", folder, *MANY)

    def cached(server, key):
        messages = [{"role": "system", "content": LONG_PROMPT}]
        with server.client(key) as client:
            answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
        return answer.usage.prompt_tokens_details.cached_tokens

    first = start_server(*arguments)
    for _ in range(6):
        cached(first, "one")
    end(first)
    keys.write_text("two\none\n")
    second = start_server(*arguments)
    assert restored(second) > 1500
    assert cached(second, "two") == 0
    assert cached(second, "one") > 1500
    end(second)


def test_a_damaged_file_is_refused_and_the_prompt_computed(start_server, prompt_file, folder):
    arguments = ("--pin-prompt", prompt_file, "--prompt-cache-dir", folder, *MANY)
    end(start_server(*arguments))
    (file,) = folder.glob("*.kv")
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 1
    for content, reason in [(bytes(broken), "checksum"), (whole[:-1], "cut short")]:
        file.write_bytes(content)
        server = start_server(*arguments)
        assert restored(server) == 0
        assert reason in server.errors()
        assert server.metric("relay:pinned_tokens") > 1500
        end(server)
        (file,) = folder.glob("*.kv")
        assert len(file.read_bytes()) == len(whole), "it was written anew"


def test_a_full_disk_disturbs_nothing(start_server, prompt_file, folder):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Inherited by the server: no file may grow beyond 4 KiB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        server = start_server("--pin-prompt", prompt_file, "--prompt-cache-dir", folder, *MANY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ask(server, "Which door is last?").choices[0].message.content
    eventually(lambda: "was not written" in server.errors(), 30)
    end(server)
    assert not list(folder.iterdir())


def test_a_cache_that_cannot_be_used_is_an_error(model, prompt_file):
    from conftest import Server

    with pytest.raises(RuntimeError, match="prompt cache .* cannot be used"):
        Server("-m", model, "--prompt-cache-dir", prompt_file)
