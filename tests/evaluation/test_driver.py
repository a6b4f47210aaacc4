"""The driver from outside: it resumes, it says what is wrong, its files say where they are from."""

import csv
import time

import pytest

OPERATOR = """
[[operator]]
models = ["llama-2-7b"]
prefix = [64, 128, 256]
batch = [1, 8]
systems = ["relay"]
rounds = 3
"""


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_results_name_their_origin(evaluation):
    done = evaluation.run(evaluation.problems(OPERATOR))
    assert done.returncode == 0, done.err
    results = evaluation.results()
    assert results["commit"] == "abc"
    assert results["versions"]["relay"] == "0.0-fake"
    assert results["machine"] and results["tasks_done"] == 3
    latency = [r for r in results["rows"] if r["metric"] == "latency" and r["system"] == "relay"]
    assert len(latency) == 6
    assert all(r["low"] < r["median"] < r["high"] and r["n"] == 3 for r in latency)
    with (evaluation.out / "operator.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["rows"])
    assert {"machine", "commit", "model", "prefix", "batch", "median", "low", "n"} <= rows[0].keys()


def test_a_killed_run_goes_on_where_it_stopped(evaluation):
    problems = evaluation.problems(OPERATOR)
    pause = evaluation.bin / "pause"
    pause.write_text("128")
    process = evaluation.start(problems)
    wait_for(lambda: evaluation.calls() == [64, 128])
    process.kill()  # no chance to tidy up
    process.communicate()
    assert not (evaluation.out / "results.json").exists()
    pause.unlink()
    done = evaluation.run(problems)
    assert done.returncode == 0, done.err
    assert "1 of 3 tasks were done before" in done.err
    assert evaluation.calls() == [64, 128, 128, 256], "64 is not measured again"
    assert evaluation.results()["tasks_done"] == 3
    assert {row["case"]["prefix"] for row in evaluation.results()["rows"]} == {64, 128, 256}


def test_every_problem_has_a_point_before_any_has_two(evaluation):
    other = OPERATOR.replace("[64, 128, 256]", "[1024, 2048]")
    assert evaluation.run(evaluation.problems(OPERATOR + other)).returncode == 0
    assert evaluation.calls() == [64, 1024, 128, 2048, 256]


def test_what_does_not_fit_into_the_budget_is_named_and_measured_next_time(evaluation):
    problems = evaluation.problems(OPERATOR.replace("[64, 128, 256]", "[64, 1048576, 128]"))
    done = evaluation.run(problems, "--budget", 1)
    assert done.returncode == 0, done.err
    assert evaluation.calls() == [64, 128], "what is short still fits"
    assert "1 of 3 tasks do not fit into 1 minutes" in done.err
    results = evaluation.results()
    assert results["tasks_done"] == 2
    assert results["missing"] == ["operator: relay, llama-2-7b, f16, rows, prefix 1048576"]
    assert evaluation.run(problems).returncode == 0
    assert evaluation.calls() == [64, 128, 1048576]
    assert evaluation.results()["missing"] == []


def test_fresh_measures_anew(evaluation):
    problems = evaluation.problems(OPERATOR)
    assert evaluation.run(problems).returncode == 0
    assert evaluation.run(problems, "--fresh").returncode == 0
    assert evaluation.calls() == 2 * [64, 128, 256]


def test_another_commit_is_not_mixed_in(evaluation):
    problems = evaluation.problems(OPERATOR)
    assert evaluation.run(problems).returncode == 0
    done = evaluation.run(problems, RELAY_COMMIT="def")
    assert done.returncode == 1
    assert "results of another commit (abc, now def)" in done.err
    assert "--fresh" in done.err


def test_a_changed_problem_is_another_task(evaluation):
    assert evaluation.run(evaluation.problems(OPERATOR)).returncode == 0
    changed = OPERATOR.replace("rounds = 3", "rounds = 5").replace("64, 128", "128")
    assert evaluation.run(evaluation.problems(changed)).returncode == 0
    assert evaluation.calls() == [64, 128, 256, 128, 256]
    assert {r["n"] for r in evaluation.results()["rows"] if r["metric"] == "latency"} == {1, 5}


@pytest.mark.parametrize(
    "before, after, message",
    [
        ('models = ["llama-2-7b"]', "", "operator[0]: the field 'models' is missing"),
        ("llama-2-7b", "llama-9", "operator[0].models[0]: 'llama-9' is none of"),
        ("[1, 8]", "[1, 0]", "operator[0].batch[1]: 0 is not 1 or more"),
        ("[1, 8]", "[1, 1.5]", "operator[0].batch[1]: 1.5 is not a whole number"),
        ("[1, 8]", "[1, true]", "operator[0].batch[1]: True is not a whole number"),
        ("[1, 8]", "[]", "operator[0].batch: has to be a list that is not empty"),
        ("[1, 8]", "8", "operator[0].batch: has to be a list that is not empty"),
        ("rounds = 3", "roundz = 3", "operator[0]: there is no field 'roundz'"),
        ("[[operator]]", "[[operators]]", "there is no section 'operators'"),
        ("[[operator]]", "[operator]", "write [[operator]]"),
        ("rounds = 3", "rounds = ", "this is no TOML"),
    ],
)
def test_a_wrong_problem_file_is_named(evaluation, before, after, message):
    assert before in OPERATOR
    done = evaluation.run(evaluation.problems(OPERATOR.replace(before, after)))
    assert done.returncode == 1
    assert "set.toml" in done.err and message in done.err
    assert "Traceback" not in done.err
    assert not evaluation.out.exists() and not evaluation.calls()


def test_an_unknown_set_names_the_known(evaluation):
    done = evaluation.run("nothing")
    assert done.returncode == 1 and "known sets:" in done.err and "bench" in done.err


def test_the_same_problem_twice_is_an_error(evaluation):
    done = evaluation.run(evaluation.problems(OPERATOR + OPERATOR))
    assert done.returncode == 1 and "two problems of the file ask for the same" in done.err


@pytest.mark.parametrize(
    "change, message",
    [
        ('systems = ["relay", "vllm"]', "run plugins/vllm/setup_vllm.sh"),
        ('systems = ["relay", "ggml"]', "run: make build"),
    ],
)
def test_a_missing_peer_says_what_to_install(evaluation, change, message):
    text = OPERATOR.replace('systems = ["relay"]', change)
    done = evaluation.run(evaluation.problems(text))
    assert done.returncode == 1 and message in done.err and not evaluation.calls()


def test_a_missing_trace_says_where_to_get_it(evaluation):
    done = evaluation.run(evaluation.problems('[[trace]]\nshapes = ["llama-2-7b"]\n'))
    assert done.returncode == 1 and "conversation_trace.jsonl" in done.err
    done = evaluation.run(
        evaluation.problems('[[trace]]\nshapes = ["llama-2-7b"]\n'), "--trace", "/nowhere"
    )
    assert done.returncode == 1 and "--trace /nowhere: there is no such file" in done.err


def test_what_is_optional_is_left_out_aloud(evaluation):
    text = OPERATOR + 'if_installed = ["vllm"]\n[[trace]]\nshapes = ["tiny"]\nif_installed = true\n'
    done = evaluation.run(evaluation.problems(text))
    assert done.returncode == 0, done.err
    assert "left out: operator, vllm: vLLM is not installed" in done.err
    left_out = evaluation.results()["left_out"]
    assert len(left_out) == 2 and "needs a trace" in left_out[1]


def test_a_bench_that_fails_is_shown(evaluation):
    (evaluation.bin / "relay").write_text("#!/bin/sh\necho no memory >&2; exit 3\n")
    done = evaluation.run(evaluation.problems(OPERATOR))
    assert done.returncode == 1
    assert "no memory" in done.err and "ended with status 3" in done.err
    assert "Traceback" not in done.err


# Fails for this prefix, in a way of its own, as long as the file `broken` is there.
BROKEN = """#!/bin/sh
case "$*" in *"--prefix 128 "*) echo 128 >> {calls}; [ -e {broken} ] && {{ {fail}; }} ;; esac
exec {relay} "$@"
"""


@pytest.mark.parametrize(
    "fail, reason, traceback",
    [
        ("echo no memory >&2; exit 3", "relay ended with status 3", False),
        ("kill -9 $$", "relay ended with status -9", False),
        ("echo {}; exit 0", "KeyError: 'results'", True),
        ("echo '{\"results\": []}'; exit 0", "it measured nothing", False),
    ],
)
def test_a_task_that_fails_does_not_end_the_others(evaluation, fail, reason, traceback):
    problems = evaluation.problems(OPERATOR)
    relay, real = evaluation.bin / "relay", evaluation.bin / "real"
    relay.rename(real)
    broken = evaluation.folder / "broken"
    broken.touch()
    calls = evaluation.bin / "calls"
    relay.write_text(BROKEN.format(calls=calls, broken=broken, fail=fail, relay=real))
    relay.chmod(0o755)
    done = evaluation.run(problems)
    name = "operator: relay, llama-2-7b, f16, rows, prefix 128"
    assert done.returncode == 1
    assert "1 of 3 tasks failed" in done.err and f"  {name}: {reason}" in done.err
    assert ("Traceback" in done.err) == traceback
    found = evaluation.results()
    assert found["tasks_done"] == 2 and found["missing"] == [name]
    assert found["failed"][name].startswith(reason)
    assert {row["case"]["prefix"] for row in found["rows"]} == {64, 256}

    # It is tried again after those that were not tried yet, and then is as any other.
    calls.unlink()
    broken.unlink()
    more = evaluation.problems(OPERATOR.replace("[64, 128, 256]", "[64, 128, 256, 512]"))
    done = evaluation.run(more)
    assert done.returncode == 0, done.err
    assert evaluation.calls() == [512, 128, 128]
    found = evaluation.results()
    assert found["tasks_done"] == 4 and not found["missing"] and not found["failed"]


def test_only_one_section(evaluation):
    problems = evaluation.problems(OPERATOR + '[[trace]]\nshapes = ["tiny"]\n')
    assert evaluation.run(problems, "--only", "operator").returncode == 0
    done = evaluation.run(problems, "--only", "serving")
    assert done.returncode == 1 and "has no such section" in done.err


def test_every_set_of_the_repository_is_valid(evaluation):
    import problems

    for file in problems.FOLDER.glob("*.toml"):
        assert problems.load(file), file


def gpu(evaluation, text: str) -> dict[str, str]:
    """A Python that is `text`, and a library, as the driver finds them by its environment."""
    python, library = evaluation.bin / "python", evaluation.bin / "librelay-cuda.so"
    python.write_text(text)
    python.chmod(0o755)
    library.touch()
    return dict(RELAY_CUDA_PYTHON=str(python), RELAY_CUDA_LIBRARY=str(library))


def test_without_a_gpu_it_says_so(evaluation):
    problems = evaluation.problems('[[cuda_operator]]\nsets = ["paper"]\n')
    there = gpu(evaluation, "#!/bin/sh\nexit 1\n")
    for named in (there, there | {"RELAY_CUDA_PYTHON": "/nowhere/python"}):
        done = evaluation.run(problems, "--device", "cuda", **named)
        assert done.returncode == 1 and "has no torch that finds an NVIDIA GPU" in done.err
        assert "Traceback" not in done.err


def test_without_the_operator_it_says_what_to_build(evaluation):
    problems = evaluation.problems('[[cuda_operator]]\nsets = ["paper"]\n')
    there = gpu(evaluation, "#!/bin/sh\nexit 0\n") | {"RELAY_CUDA_LIBRARY": "/nowhere/a.so"}
    done = evaluation.run(problems, "--device", "cuda", **there)
    assert done.returncode == 1 and "there is no /nowhere/a.so; run: cmake --preset" in done.err


# Answers as bench/cuda/op_bench.py does.
OP_BENCH = """#!/bin/sh
[ "$1" = -c ] && exit 0
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
echo "left out: fa3: no module"; echo "B64: needs 9 GB, left out"; {say}
echo '{{"about": {{"torch": "2", "sources": {{"flashinfer": "flashinfer-0.9", "fa3": null}}}}}}' \\
    > $out/paper.json
columns=model,q_heads,kv_heads,dim,levels,prefix,own,batch,competitor,mode,median_us,p25_us,p75_us
echo "$columns,n,bytes_us,flops_us,rms_error
Llama,32,8,128,[],64,128,8,${{who:-relay}},plain,20,19,21,9,5,6,2e-3
Llama,32,8,128,[],64,128,8,fi,plain,20,19,21,9,5,6,2" > $out/paper.csv
"""


@pytest.mark.parametrize(
    "say, reason",
    [
        ("true", ""),
        ("echo out of time: 3 cases left out", ""),
        ("echo left out: relay: no kernel; who=fa3", "op_bench.py measured no Relay"),
        ("echo op_bench: paper, after 3 cases: an error >&2; exit 1", "paper, after 3 cases"),
    ],
)
def test_op_bench_on_a_gpu(evaluation, say, reason):
    problems = evaluation.problems('[[cuda_operator]]\nsets = ["paper"]\n')
    there = gpu(evaluation, OP_BENCH.format(say=say))
    done = evaluation.run(problems, "--device", "cuda", **there)
    assert done.returncode == bool(reason) and reason in done.err, done.err
    found = evaluation.results()
    assert found["tasks_done"] == (not reason)
    if not reason:
        notes = ["fa3: no module", "B64: needs 9 GB, left out", "fi: wrong results"]
        if say != "true":
            notes.insert(2, "out of time: 3 cases left out")
        assert found["left_out"] == [f"cuda_operator, paper, {note}" for note in notes]
        assert found["versions"]["flashinfer"] == "0.9" and found["versions"]["torch"] == "2"
        assert "flashinfer 0.9" in (evaluation.out / "cuda_operator.csv").read_text()
