"""Parts of the driver: workloads, comparisons, what the clients measure."""

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import compare
import fields
import load
import problems
import progress
import pytest
import store
import workload
from conftest import ROOT
from programs import Programs, servers_errors
from sections import cuda, little_model, quality, serving, trace, vllm
from tasks import EvaluationError, Row

LENGTHS = dict(input_mean=161.0, output_mean=338.0, sigma=1.0)


def make(levels, count=64, number=0, **more):
    return workload.generate(levels, count, number, **(LENGTHS | more))


def test_workloads_are_seeded():
    a, b = make([[64, 1]]), make([[64, 1]])
    assert a == b
    other = make([[64, 1]], number=1)
    assert [r.output for r in other.requests] == [r.output for r in a.requests]
    assert other.prefixes == a.prefixes
    assert other.requests[0].prompt[64:] != a.requests[0].prompt[64:], "another round, other text"


def test_no_prompt_is_computed_that_no_request_begins_with():
    assert len(make([[64, 1]], without=0.5).prefixes) == 1
    assert make([[64, 1]], without=1.0).prefixes == []


def test_what_is_a_requests_own_is_told_from_its_system_prompt():
    work = make([[64, 1]], without=0.25, input_mean=20.0, output_mean=10.0)
    assert [r.shared for r in work.requests].count(64) == 48
    assert work.longest_own < work.longest and work.longest_own <= 4 * 20 + 4 * 10
    own = sum(len(r.prompt) for r in work.requests) - 48 * 64
    assert workload.own_means(work)["own prompt, mean"] == pytest.approx(own / 64)


def test_levels_nest():
    work = make([[32, 1], [16, 2], [8, 4]])
    assert len(work.prefixes) == 4 and all(len(p) == 56 for p in work.prefixes)
    assert len({tuple(p[:32]) for p in work.prefixes}) == 1
    assert len({tuple(p[:48]) for p in work.prefixes}) == 2
    assert len({tuple(p) for p in work.prefixes}) == 4
    for i, request in enumerate(work.requests):
        assert request.prompt[:56] == work.prefixes[i % 4]


def test_a_share_has_no_system_prompt():
    work = make([[64, 1]], without=0.25)
    with_prompt = [r for r in work.requests if r.prompt[:64] == work.prefixes[0]]
    assert len(with_prompt) == 48


def test_lengths_have_the_stated_mean():
    work = make([], count=4000, input_mean=100.0)
    outputs = [r.output for r in work.requests]
    inputs = [len(r.prompt) for r in work.requests]
    assert max(outputs) <= 4 * 338 and min(outputs) >= 4
    # Cutting at four times the mean takes some 5 % of it.
    assert 0.88 * 338 < sum(outputs) / 4000 < 1.05 * 338
    assert 0.88 * 100 < sum(inputs) / 4000 < 1.05 * 100


@pytest.mark.parametrize("wrong", [math.nan, -1.0])
def test_what_is_no_number_of_its_kind_is_refused(wrong):
    with pytest.raises(EvaluationError, match=r"p\.rates\[0\]: .* is not 0\.001 or more"):
        fields.Field(float, many=True, least=0.001).check([wrong], "p.rates")


def test_a_problem_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "set.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationError, match="set.toml: this is no TOML"):
        problems.load(file)


def test_arrivals_are_poisson():
    times = workload.arrivals(4000, 5.0, 0)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps))
    assert mean == pytest.approx(0.2, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.1), "of an exponential both are the same"
    assert workload.arrivals(3, None, 0) == [0, 0, 0]


def test_a_replayed_trace_keeps_its_sharing(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [
        (0, 1000, 100, [0, 1]),
        (2000, 1536, 50, [0, 2, 3]),
        (4000, 90000, 5, list(range(176))),
    ]
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    file.write_text("\n".join(json.dumps(dict(zip(names, x, strict=True))) for x in lines))
    options = dict(time_scale=0.5, block_tokens=32, max_prompt=500)
    a, b = workload.replay(file, 9, 0, **options).requests
    again, _ = workload.replay(file, 9, 1, **options).requests
    assert len(again.prompt) == len(a.prompt) and again.prompt[:32] != a.prompt[:32]
    assert a.prompt[:32] == b.prompt[:32] and a.prompt[32:62] != b.prompt[32:62]
    assert (len(a.prompt), len(b.prompt)) == (62, 96)
    assert (a.arrival, b.arrival, a.output) == (0, 1, 6)
    file.write_text('{"timestamp": 0}\n')
    with pytest.raises(EvaluationError, match="line 1"):
        workload.replay(file, 9, 0, **options)


def test_clients_measure_what_they_see():
    requests = [workload.Request(1.0, [1], 3), workload.Request(2.0, [1], 2)]
    answers = [
        SimpleNamespace(first=2.0, last=4.0, times=[2.0, 3.0, 4.0], completion_tokens=3,
                        cached_tokens=5, prompt_tokens=10),
        SimpleNamespace(first=4.0, last=5.0, times=[4.0, 5.0], completion_tokens=2,
                        cached_tokens=0, prompt_tokens=10),
    ]  # fmt: skip
    found = {name: value for name, (_, _, value) in load.measures(requests, answers).items()}
    assert found["output throughput"] == pytest.approx(5 / 4)
    assert found["time to first token p50"] == pytest.approx(1.5)
    assert found["inter-token latency p99"] == 1
    assert found["normalised latency p50"] == pytest.approx((3 / 3 + 3 / 2) / 2)
    assert found["cached share of prompts"] == pytest.approx(0.25)


def test_a_model_is_made_once_as_the_problem_has_it(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/relay").touch()
    programs = Programs(tmp_path, "cpu", None, tmp_path / "out")
    commands = []

    def run(command):
        commands.append([str(part) for part in command])
        command[3].touch()

    monkeypatch.setattr(programs, "run", run)
    problem = dict(shape="tiny", ffn=0, layers=2, vocabulary="", weights="q4_0")
    own = programs.model(problem)
    cut = programs.model(problem | {"vocabulary": "llama-spm"})
    assert own != cut and [programs.model(problem), len(commands)] == [own, 2]
    assert commands[0][4:] == ["--type", "q4_0", "--layers", "2"]
    assert commands[1][4:] == [*commands[0][4:], "--vocab", "llama-spm"]


def test_a_program_that_hangs_is_ended(tmp_path):
    programs = Programs(tmp_path, "cpu", None, tmp_path)
    programs.limit = 0.2
    with pytest.raises(EvaluationError, match="sleep was ended after 0 s"):
        programs.run(["sleep", 60])


def test_a_program_that_is_not_there_is_named(tmp_path):
    programs = Programs(tmp_path, "cpu", None, tmp_path)
    with pytest.raises(EvaluationError, match="cannot run /nowhere/python: No such file"):
        programs.run(["/nowhere/python", "-c", ""])


def test_a_server_that_does_not_answer_is_no_traceback():
    with pytest.raises(EvaluationError, match="did not answer"), servers_errors():
        raise TimeoutError("timed out")


@pytest.mark.parametrize(
    "wrong, why",
    [
        (dict(experiment="arrivals"), "arrivals need the field 'rates'"),
        (dict(experiment="trace", rates=[1.0]), "a trace has arrivals of its own"),
        (dict(levels=[[64, 1]], system_prompt=[64]), "'levels' are instead of"),
        (dict(levels=[[64, 1]], prompts=[4]), "'levels' are instead of"),
        (dict(without=[1.5]), "'without' is a share"),
    ],
)
def test_what_a_served_problem_would_ignore_is_refused(little, wrong, why):
    little.programs.trace_file = __file__
    given = dict(experiment="throughput", requests=[4], systems=["relay"]) | wrong
    with pytest.raises(EvaluationError, match=why):
        serving.points(fields.check(given, serving.FIELDS, "a problem"), little.programs)


@pytest.fixture
def bench(little, monkeypatch):
    """The tasks of `make bench`, in its order, with a trace and with vLLM."""
    programs = ("llama-server", "llama-batched-bench", "relay-ggml-op-bench")
    for name in (*programs, "relay-accuracy-bench"):
        (little.folder / "bin" / name).touch()
    (little.folder / "bin/python").touch()
    monkeypatch.setenv("RELAY_VLLM_VENV", str(little.folder))
    (little.folder / "trace").touch()
    little.programs.trace_file = str(little.folder / "trace")
    loaded = problems.load(problems.find("bench"))
    return problems.tasks_of(loaded, little.programs, [])


def test_make_bench_is_guessed_to_take_less_than_its_budget(bench):
    assert sum(task.seconds for task in bench) < 14 * 60
    names = [task.name for task in bench]
    assert len(set(names)) == len(names), "a report that names what is missing is unambiguous"


def test_make_bench_has_a_first_result_of_every_figure_in_nine_minutes(bench):
    first, seconds = {}, 0.0
    for task in bench:
        seconds += task.seconds
        about = map(task.parameters.get, ("experiment", "what", "system", "program"))
        first.setdefault((task.section, *about), seconds)
    assert len(first) == 17 and max(first.values()) < 9 * 60


def test_make_bench_measures_often_enough_to_be_compared(bench):
    for task in bench:
        once = task.section in ("trace", "quality", "little_model")
        assert once or task.parameters["rounds"] >= compare.LEAST_N, task.name


def row(median, spread=0.02, n=9, better="lower", metric="latency"):
    low, high = median * (1 - spread), median * (1 + spread)
    return Row("operator", {"batch": 8}, "relay", metric, "s", better, median, low, high, n)


@pytest.mark.parametrize(
    "before, after, said",
    [
        (row(1.0), row(1.2), "WORSE"),
        (row(1.0), row(0.8), "better"),
        (row(1.0, better="higher"), row(1.2, better="higher"), "better"),
        (row(1.0), row(1.08), ""),  # significant, but small
        (row(1.0, spread=0.4), row(1.2, spread=0.4), ""),  # large, but within the noise
        (row(1.0, n=2), row(3.0, n=2), ""),  # too few to say
        (row(1.0, better=""), row(3.0, better=""), ""),  # neither good nor bad
    ],
)
def test_a_comparison_speaks_up_only_for_what_counts(before, after, said):
    text, worse = compare.report(
        dict(machine="m", commit="a", rows=[before]), dict(machine="m", commit="b", rows=[after])
    )
    lines = [line for line in text.splitlines() if "operator, relay" in line]
    assert len(lines) == bool(said) and all(line.startswith(said) for line in lines)
    assert worse == (said == "WORSE")


def test_a_comparison_counts_what_it_cannot_compare():
    text, _ = compare.report(
        dict(rows=[row(1.0), row(1.0, metric="old")]), dict(rows=[row(1.0, n=1)])
    )
    assert "1 pairs compared, 0 changed" in text
    assert "1 have fewer than 3" in text and "1 only before, 0 only after" in text


def test_time_left_follows_the_pace():
    bar = progress.Progress([10.0, 30.0], [5.0], out=SimpleNamespace(isatty=lambda: False))
    assert bar.seconds_left() == pytest.approx(40, abs=0.1)
    bar._task = ("a", 10.0, progress.time.monotonic() - 20)  # took twice as long as guessed
    bar.end()
    pace = (20 + progress.TRUST) / (10 + progress.TRUST)
    assert bar.seconds_left() == pytest.approx(30 * pace, abs=0.5)
    assert " 2/3, 0:34 left" in bar.line()


def test_a_task_fits_at_the_pace_of_those_before():
    bar = progress.Progress([100.0, 100.0], [], out=SimpleNamespace(isatty=lambda: False))
    assert bar.fits(100.0, 101.0) and not bar.fits(100.0, 99.0)
    bar._task = ("a", 100.0, progress.time.monotonic() - 260)
    bar.end()
    assert bar.pace() == pytest.approx(2, rel=0.01), "twice as slow as guessed"
    assert bar.fits(100.0, 210.0) and not bar.fits(100.0, 190.0)
    bar._begin -= 50
    assert not bar.fits(100.0, 210.0), "what is over counts"
    bar.skip(100.0)
    assert bar.seconds_left() == 0


def test_divergence_of_distributions():
    p = {"a": math.log(0.5), "b": math.log(0.25)}
    assert quality.divergence(p, p) == 0
    q = {"a": math.log(0.25), "b": math.log(0.5)}
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert quality.divergence(p, q) == pytest.approx(expected)


def test_answers_are_compared_up_to_the_first_difference():
    def answer(tokens, shift=0.0):
        top = {"a": math.log(0.6) + shift, "b": math.log(0.3)}
        return dict(tokens=tokens, top_logprobs=[top] * len(tokens))

    rows = quality.compare({}, [answer("aab", 0.01), answer("ab")], [answer("abb"), answer("ab")])
    found = {r.metric: r.median for r in rows}
    assert found["greedy answers the same"] == 0.5
    # Theirs, b, was in their own eyes less likely than ours: by nothing more than a.
    assert found["largest margin where answers part"] == pytest.approx(0.0)
    assert found["greedy tokens the same"] == pytest.approx(3 / 5)
    assert found["largest log-probability difference"] == pytest.approx(0.01)


def test_levels_of_a_trace_are_shares_of_all():
    step = dict(time=0, batch=2, kv_slots_attended=100, kv_slots_read=60, seconds_on=1,
                seconds_off=2, levels=[dict(kv_slots_attended=80, kv_slots_read=40)])  # fmt: skip
    second = step | dict(time=60, levels=[dict(kv_slots_attended=40, kv_slots_read=40)])
    rows = trace.rows_of(dict(model="m"), dict(steps=[step, second], mean=step))
    share = {r.case["level"]: r.median for r in rows if r.metric == "share of KV attended"}
    assert share == {"level 1": 0.8, "own": 0.2}
    levels = [r for r in rows if r.metric == "share of KV attended, step"]
    assert [(r.case["time"], r.case["level"], r.median) for r in levels] == [
        (0, "level 1", 0.8), (60, "level 1", 0.4)
    ]  # fmt: skip


def test_op_benchs_csv_is_read(tmp_path):
    file = tmp_path / "paper.csv"
    names = "model,q_heads,kv_heads,dim,levels,prefix,own,batch,competitor,mode,"
    names += "median_us,p25_us,p75_us,n,bytes_us,flops_us,rms_error"
    file.write_text(
        names + "\n"
        'Llama,32,8,128,"[[64, 1]]",64,128,8,relay,plain,20,19,21,9,6,7,2e-3\n'
        'Llama,32,8,128,"[[64, 1]]",64,128,8,relay,graph,10,9,11,9,6,7,2e-3\n'
        'Llama,32,8,128,"[[64, 1]]",64,128,8,relay-plan,graph,5,5,5,9,,,\n'
        'Llama,32,8,128,"[[64, 1]]",64,128,8,fa3,plain,,,,9,6,7,\n'
        'Llama,32,8,128,"[[64, 1]]",64,128,8,fi,plain,1,1,1,9,6,7,1.3\n'
    )
    rows, wrong = cuda.rows_of(file)
    assert wrong == ["fi"], "what computes something else is no peer"
    relay, limit, paper = sorted(rows, key=lambda r: r.system, reverse=True)
    assert (limit.system, limit.median) == ("limit", pytest.approx(7e-6)), "the longer of the two"
    assert (relay.system, relay.n) == ("relay", 9)
    assert (relay.median, relay.low) == pytest.approx((1e-5, 9e-6))
    assert paper.system == "formula" and paper.median == pytest.approx(8 * 192 / (64 + 1024))


def test_each_model_of_the_papers_sweep_is_measured_on_a_gpu():
    paper = json.loads((ROOT / "bench/cuda/problems/paper.json").read_text())
    heads = ["{}/{}x{} ".format(*case["heads"]) for case in paper["cases"]]
    asked = problems.load(problems.find("cuda"))["cuda_operator"]
    for name in heads:
        assert sum(bool(re.search(problem["only"], name)) for problem in asked) == 1, name


def test_vllms_serving_results_are_read():
    keys = ["output_throughput", "request_throughput"]
    keys += [f"p{p}_{m}_ms" for p in (50, 95, 99) for m in ("ttft", "itl", "normalised")]
    report = {
        name: {"serve": [[{k: speed * (i + 1) for k in keys} for i in range(2)]] * 3}
        for name, speed in (("vLLM", 10.0), ("Relay", 20.0), ("no caching", 5.0))
    }
    rows = vllm.serving_rows(VLLM, 512, report)
    found = {(r.system, r.case["rate"]): r for r in rows if r.metric == "output throughput"}
    assert found["vllm with Relay", "all at once"].median == 40
    assert found["vllm, no prefix caching", 2.0].median == 5
    assert found["vllm", 2.0].n == 3
    (first,) = [r for r in rows if r.metric == "time to first token p95"
                and (r.system, r.case["rate"]) == ("vllm", 2.0)]  # fmt: skip
    assert first.median == pytest.approx(0.010)


VLLM = dict(shape="llama-1b", prefixes=[1], rates=[2.0, math.inf], input_mean=8.0, output_mean=4.0,
            requests=16, seconds=10.0, concurrency=8, bound=0.0, price_per_hour=0.0,
            rounds=2)  # fmt: skip


def test_what_a_bound_left_out_in_one_round_is_no_result():
    keys = ["output_throughput", "request_throughput"]
    keys += [f"p{p}_{m}_ms" for p in (50, 95, 99) for m in ("ttft", "itl", "normalised")]
    result = dict.fromkeys(keys, 10.0)
    report = {"Relay": {"serve": [[result, result], [result, None]]}}
    rows = vllm.serving_rows(VLLM | dict(rates=[2.0, 4.0], bound=0.02), 512, report)
    assert {r.case["rate"] for r in rows} == {2.0}
    assert {r.case["requests"] for r in rows} == {20}, "as many as arrive in 10 seconds"
    assert [r.median for r in rows if r.metric == "bound"] == [0.02]


def test_a_bound_is_one_of_rates_and_a_price_one_of_all_at_once():
    keys = ["output_throughput", "request_throughput"]
    keys += [f"p{p}_{m}_ms" for p in (50, 95, 99) for m in ("ttft", "itl", "normalised")]
    report = {"Relay": {"serve": [[dict.fromkeys(keys, 10.0)] * 2]}}
    rows = vllm.serving_rows(VLLM | dict(bound=0.02, price_per_hour=0.36), 512, report)
    found = {(r.metric, r.case["rate"]): r.median for r in rows}
    assert found["bound", 2.0] == 0.02 and ("bound", "all at once") not in found
    assert found["price", "all at once"] == pytest.approx(10.0), "0.1 mill a second, 10 tokens"
    assert ("price", 2.0) not in found


@pytest.fixture
def vllm_programs(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    monkeypatch.setenv("RELAY_VLLM_VENV", str(tmp_path))

    def programs(device: str) -> Programs:
        made = Programs(tmp_path, device, None, tmp_path)
        monkeypatch.setattr(made, "note_versions", lambda *_: None)
        return made

    return programs


def test_each_variant_of_vllm_is_a_task(vllm_programs, monkeypatch):
    programs = vllm_programs("cuda")
    commands = []
    monkeypatch.setattr(programs, "run_into_json", lambda command: commands.append(command) or {})
    problem = VLLM | dict(variants=["vllm", "relay"], prefix=[64, 2048], rates=[2.0], bound=0.02,
                          if_installed=False)  # fmt: skip
    points = vllm.serving(problem, programs)
    assert [len(point) for point in points] == [2, 2]
    assert len({task.key for point in points for task in point}) == 4
    points[1][0].run()
    (command,) = commands
    words = [str(part) for part in command]
    for option, value in (("--variants", "vllm"), ("--prefix", "2048"), ("--rates", "2.0"),
                          ("--seconds", "10.0"), ("--bound", "20.0")):  # fmt: skip
        assert words[words.index(option) + 1] == value


@pytest.mark.parametrize(
    "device, wrong", [("cpu", dict(shape="llama-2-7b")), ("cuda", dict(context=32))]
)
def test_what_vllms_steps_would_ignore_is_refused(vllm_programs, device, wrong):
    given = fields.check(dict(prefix=[64], batch=[1]) | wrong, vllm.STEP_FIELDS, "a problem")
    with pytest.raises(EvaluationError, match="on this device '.*' is always"):
        vllm.steps(given, vllm_programs(device))


def test_vllms_throughput_on_a_gpu_is_read(vllm_programs, tmp_path):
    file = tmp_path / "rounds.csv"
    file.write_text(
        "variant,turn,prompt,requests,seconds,tokens_per_s,requests_per_s\n"
        "relay,0,64,16,1,100,2\nrelay,1,64,16,1,120,2\nrelay,0,512,16,1,80,2\n"
    )
    problem = dict(shape="llama-2-7b", variants=["relay"], prefix=[64, 512], requests=16,
                   concurrency=16, rounds=2, price_per_hour=3.6, if_installed=False)  # fmt: skip
    rows = vllm.throughput_rows(problem, file)
    found = {r.case["prompt"]: r for r in rows if r.metric == "output throughput"}
    assert (found[64].median, found[64].n, found[512].median) == (110, 2, 80)
    assert found[64].system == "vllm with Relay" and found[64].case["rate"] == "all at once"
    prices = {r.case["prompt"]: r.median for r in rows if r.metric == "price"}
    assert prices[512] == pytest.approx(12.5), "a thousandth of a dollar a second, 80 tokens"
    every = problem | dict(variants=["relay", "vllm", "no-caching"])
    (point,) = vllm.throughput(every, vllm_programs("cuda"))
    told = [task.parameters["variants"] for task in point]
    assert told == ["relay", "vllm, no-caching"], "one task for each engine"
    with pytest.raises(EvaluationError, match="on GPUs only"):
        vllm.throughput(problem, vllm_programs("cpu"))


def test_what_vllm_answers_is_compared(vllm_programs, monkeypatch):
    programs = vllm_programs("cpu")
    answer = dict(tokens=[7, 8], top_logprobs=[{"7": -0.1, "9": -3.0}, {"8": -0.5, "6": -0.6}])
    other = dict(tokens=[7, 6], top_logprobs=[{"7": -0.2, "9": -3.0}, {"8": -0.6, "6": -0.5}])
    commands = []

    def measure(command):
        commands.append([str(part) for part in command])
        return {"relay": [answer, answer], "vllm": [dict(answer), other]}

    monkeypatch.setattr(programs, "run_into_json", measure)
    monkeypatch.setattr(programs, "note_versions", lambda *_: None)
    problem = dict(what="vllm", shape="llama-3.2-1b", ffn=0, layers=4, vocabulary="", weights="",
                   kv_types=["bf16"], prompt=[512], requests=2, own=8, tokens=2,
                   if_installed=False)  # fmt: skip
    ((task,),) = quality.points(problem, programs)
    rows = {r.metric: r.median for r in task.run()}
    assert rows["greedy answers the same"] == 0.5 and rows["greedy tokens the same"] == 0.75
    assert rows["largest margin where answers part"] == pytest.approx(0.1)
    assert rows["largest log-probability difference"] == pytest.approx(0.1)
    assert commands[0][commands[0].index("--dtype") + 1] == "bfloat16"
    assert commands[0][commands[0].index("--shape") + 1] == "llama-1b"
    with pytest.raises(EvaluationError, match="not q8_0"):
        quality.points(problem | dict(kv_types=["q8_0"]), programs)


def vllm_server(programs, monkeypatch, system: str, **more) -> serving.Run:
    """What starts a vLLM for a round of the trace's replay."""
    monkeypatch.setattr(programs, "vllm_model", lambda *_: programs.out)
    problem = fields.check(
        dict(experiment="trace", requests=[4], systems=[system], weights="bf16", kv_type="bf16",
             layers=2, block_size=32) | more,
        serving.FIELDS, "a problem",
    )  # fmt: skip
    assert serving.is_there(problem, programs, system)
    (case,) = serving.cases_of(problem)
    return serving.Run(problem, programs, case, system)


def test_a_vllm_is_served_as_it_is_or_with_relay(vllm_programs, monkeypatch, tmp_path):
    programs = vllm_programs("cpu")
    for system, disabled, caching in (("vllm", True, True), ("vllm with Relay", False, True),
                                      ("vllm, no prefix caching", True, False)):  # fmt: skip
        run = vllm_server(programs, monkeypatch, system)
        server = run.server(workload.Workload([], [workload.Request(0, [1] * 30, 4)]), "")
        assert (server.environment.get("RELAY_DISABLE") == "1") == disabled
        assert ("--no-enable-prefix-caching" in server.command) != caching
        for option, value in (("--dtype", "bfloat16"), ("--max-model-len", "50"),
                              ("--max-num-seqs", "4"), ("--block-size", "32")):  # fmt: skip
            assert server.command[server.command.index(option) + 1] == value
        # What vLLM's log tells has to fit.
        server.log.write_text("CPU attention (CPU_ATTN) is computed by libr" if disabled else "")
        with pytest.raises(EvaluationError, match="relay_attention.doctor"):
            run.check_attention(server)
    with pytest.raises(EvaluationError, match="'weights' and 'kv_type' are the same"):
        vllm_server(programs, monkeypatch, "vllm", kv_type="f16")


class StandIn:
    """In place of a server: notes what is done to it."""

    def __init__(self, system: str, done: list) -> None:
        self.system, self.done = system, done
        self.process = SimpleNamespace(pid=os.getpid())

    def __enter__(self):
        return self

    def __exit__(self, *_exc) -> None:
        self.done.append((self.system, "end"))

    def wait_ready(self, _limit: float) -> None:
        if self.system == "relay-off":
            raise EvaluationError("no memory\nits log ends here")

    def pause(self) -> None:
        self.done.append((self.system, "pause"))

    def resume(self) -> None:
        self.done.append((self.system, "round"))


def test_servers_take_turns_and_who_fails_is_left_out(little, monkeypatch, capsys, tmp_path):
    (little.folder / "bin/llama-server").touch()
    done: list = []
    answers = [SimpleNamespace(times=[1.0, 2.0], first=1.0, last=2.0, completion_tokens=2,
                               prompt_tokens=9, cached_tokens=0)]  # fmt: skip
    monkeypatch.setattr(serving.Run, "server", lambda run, *_: StandIn(run.system, done))
    monkeypatch.setattr(serving.Run, "prime", lambda *_: 0.5)
    monkeypatch.setattr(serving.Run, "restore", lambda *_: None)
    monkeypatch.setattr(serving.Run, "kv_bytes", lambda *_: 1.0)
    monkeypatch.setattr(serving.load, "send", lambda *_: answers)
    problem = fields.check(
        dict(experiment="arrivals", system_prompt=[64], requests=[1], rates=[4.0, 8.0], rounds=2,
             systems=["relay", "relay-off", "llama-server"]),
        serving.FIELDS, "a problem",
    )  # fmt: skip
    ((task,),) = serving.points(problem, little.programs)
    rows = task.run()
    assert done.index(("relay-off", "end")) < done.index(("relay", "round")), "not beside others"
    turns = [name for name, what in done if what == "round"]
    a, b = "relay", "llama-server"
    assert turns == [a, b, b, a, a, b, b, a], "each of two rates has two rounds"
    assert [done[i + 1][1] for i, (_, what) in enumerate(done) if what == "round"] == ["pause"] * 8
    assert {name for name, what in done[-2:] if what == "end"} == {a, b}
    (failure,) = little.programs.failures
    assert failure.startswith("relay-off: no memory") and failure in capsys.readouterr().err
    found = [r for r in rows if r.metric == "time to first token p50"]
    assert [(r.system, r.case["rate"], r.n) for r in found] == [
        (name, rate, 2) for name in (a, b) for rate in (4.0, 8.0)
    ]
    # Kept, but not as whole: the next run tries it again.
    results = store.Store(tmp_path / "kept", {"versions": {}}, fresh=False)
    results.put(task, rows, 1.0, little.programs)
    assert not results.has(task) and results.failure(task) == failure
    made = json.loads(results.write([task], []).read_text())
    assert made["failed"] == {task.name: failure} and made["missing"] == [] and made["rows"]
    little.programs.begin(1.0)
    results.put(task, rows, 1.0, little.programs)
    assert results.has(task) and not results.failure(task)

    monkeypatch.setattr(StandIn, "wait_ready", lambda *_: 1 / 0)
    with pytest.raises(EvaluationError, match="llama-server: ZeroDivisionError"):
        task.run()


def test_a_server_that_is_paused_ends_when_it_is_told_to(tmp_path):
    from servers import Server

    command = [sys.executable, "-c", "import time; time.sleep(60)", "--port", "1"]
    with Server("a server", command, dict(os.environ), tmp_path / "log") as server:
        server.pause()
        state = Path(f"/proc/{server.process.pid}/stat")
        for _ in range(100):
            if stopped := state.read_text().rpartition(")")[2].split()[0] == "T":
                break
            time.sleep(0.05)
        assert stopped
    assert server.process.returncode == -signal.SIGTERM, "and not by force after 15 seconds"


def test_relay_is_given_room_for_the_prompt_once(little):
    (little.folder / "bin/llama-server").touch()
    little.programs.model = lambda _: "model.gguf"
    problem = fields.check(
        dict(experiment="sharers", system_prompt=[2048], requests=[16], input_mean=8,
             output_mean=17, systems=["relay", "llama-server"]),
        serving.FIELDS, "a problem",
    )  # fmt: skip
    (case,) = serving.cases_of(problem)
    work = serving.workload_of(problem, case, None, 0)
    room = {}
    for system in problem["systems"]:
        command = serving.Run(problem, little.programs, case, system).server(work, "").command
        room[system] = int(command[command.index("-c") + 1])
    assert room["relay"] < 2048 + 16 * 128 + 256 and room["llama-server"] > 16 * 2048


@pytest.fixture
def little(tmp_path, monkeypatch):
    """The little model's section, with engines that answer every second question right."""
    programs = Programs(tmp_path, "cpu", None, tmp_path)  # its folder is put where `answers` lies
    import answers

    def ask(exam, _build, _out, *engines):
        given = [f.answer() if i % 2 else "The hat." for i, f in enumerate(exam.facts)]
        return dict.fromkeys(engines, given)

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/relay").touch()
    (tmp_path / "little.gguf").touch()
    monkeypatch.setattr(answers, "MADE", tmp_path)
    monkeypatch.setattr(answers, "ask_own", ask)

    def tasks(**problem):
        given = {"systems": ["relay"], "questions": 8} | problem
        (point,) = little_model.points(given, programs)
        return point

    return SimpleNamespace(tasks=tasks, programs=programs, folder=tmp_path)


def test_right_answers_are_counted(little):
    relay, off = little.tasks(systems=["relay", "relay-off", "relay"])
    assert relay.key != off.key
    ((row,), (other,)) = relay.run(), off.run()
    assert (row.system, row.metric, row.median) == ("relay", "answers right", 0.5)
    assert (other.system, other.median) == ("relay-off", 0.5)


def test_the_little_model_says_what_is_missing(little, monkeypatch):
    with pytest.raises(EvaluationError, match="run: make build"):
        little.tasks(systems=["llama-server"])
    monkeypatch.setenv("RELAY_VLLM_VENV", str(little.folder))
    with pytest.raises(EvaluationError, match="setup_vllm.sh"):
        little.tasks(systems=["vllm"])
    with pytest.raises(EvaluationError, match="no more questions"):
        little.tasks(questions=1000)
    (little.folder / "little.gguf").unlink()
    with pytest.raises(EvaluationError, match="run: make little-model"):
        little.tasks()
