"""relay batch: OpenAI's batch format, ended and started again."""

import json
import signal
import subprocess
import time

import pytest
from conftest import RELAY


def line(number, **body):
    body = {"max_tokens": 8, "temperature": 0, **body}
    if "prompt" not in body:
        body["messages"] = [{"role": "user", "content": f"Question {number}"}]
    url = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    return {"custom_id": f"q{number}", "method": "POST", "url": url, "body": body}


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def read(path):
    return [json.loads(one) for one in path.read_text().splitlines()]


def command(model, *files):
    return [RELAY, "batch", "-m", model, "-c", "8192", "-np", "4", *files]


def run(model, *files):
    return subprocess.run(
        command(model, *files), capture_output=True, text=True, timeout=300, check=False
    )


def test_batch(model, tmp_path, client):
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wrong = [line(90, max_tokens="many"), line(91, stream=True), line(92, prompt="Once")]
    elsewhere = {**line(93), "url": "/v1/nothing"}
    claude = {**line(94, max_tokens="many"), "url": "/v1/messages"}
    write(requests, [*map(line, range(12)), *wrong, elsewhere, claude])
    done = run(model, requests, results)
    assert done.returncode == 0, done.stderr
    assert "17/17" in done.stderr and "4 lines failed" in done.stderr
    answers = {one["custom_id"]: one["response"] for one in read(results)}
    assert len(answers) == len(read(results)) == 17
    status = {name: answer["status_code"] for name, answer in answers.items()}
    assert (status["q90"], status["q91"], status["q92"], status["q93"]) == (400, 400, 200, 404)
    assert answers["q90"]["body"]["error"]["param"] == "max_tokens"
    assert answers["q94"]["body"]["type"] == "error", "in the words of its API"
    served = client.chat.completions.create(model="tiny", **line(3)["body"])
    assert answers["q3"]["body"]["choices"][0]["message"]["content"] == (
        served.choices[0].message.content
    )
    before = results.read_text()
    assert run(model, requests, results).returncode == 0
    assert results.read_text() == before, "what is done is not done again"


def test_batch_killed_and_started_again(model, tmp_path):
    count = 200  # far more than are done before the kill, also on a busy machine
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(requests, [line(i, max_tokens=60, ignore_eos=True) for i in range(count)])
    process = subprocess.Popen(
        command(model, requests, results), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not results.exists() or results.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [one for one in results.read_text().splitlines(keepends=True) if one.endswith("\n")]
    assert 3 <= len(kept) < count
    with results.open("a") as file:
        file.write('{"id":"batch_req_0","custom_')  # what a full disk leaves behind
    again = run(model, requests, results)
    assert again.returncode == 0, again.stderr
    assert results.read_text().startswith("".join(kept)), "what was done stays"
    assert sorted(one["custom_id"] for one in read(results)) == sorted(
        f"q{i}" for i in range(count)
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("{\n", "line 1"),
        (json.dumps(line(1)) + "\n" + json.dumps(line(1)) + "\n", "that of line 1, too"),
        (json.dumps({"custom_id": "a"}) + "\n", "'method' is required"),
    ],
)
def test_what_is_no_batch_is_refused_at_once(model, tmp_path, text, why):
    requests = tmp_path / "in.jsonl"
    requests.write_text(text)
    refused = run(model, requests, tmp_path / "out.jsonl")
    assert refused.returncode == 1 and why in refused.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "text", ["mine\n", "mine", '{"custom_id": "a"}', json.dumps(line(1)) + "\n"]
)
def test_other_files_are_not_overwritten(model, tmp_path, text):
    requests, other = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    write(requests, [line(1)])
    other.write_text(text)
    assert "something other than results" in run(model, requests, other).stderr
    assert other.read_text() == text


def test_the_batch_file_is_not_its_own_result(model, tmp_path):
    requests, same = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(json.dumps(line(1)) + "\n" + json.dumps(line(2)))
    same.symlink_to(requests)
    before = requests.read_text()
    for results in (requests, same):
        refused = run(model, requests, results)
        assert refused.returncode == 1 and "is the batch file" in refused.stderr
    assert requests.read_text() == before


def test_results_of_several_batches_in_one_file(model, tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    results = tmp_path / "out.jsonl"
    write(first, map(line, range(5)))
    write(second, [line(4), line(5)])
    assert run(model, first, results).returncode == 0
    done = run(model, second, results)
    assert done.returncode == 0 and "1 of 2 lines are done already" in done.stderr, done.stderr
    assert "2/2" in done.stderr
    assert [one["custom_id"] for one in read(results)][5:] == ["q5"]
