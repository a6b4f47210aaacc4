"""The programs that the driver calls, as built: they give the fields that it reads."""

import json
import subprocess

import pytest
from conftest import ROOT

BIN = ROOT / "build/release/bin"
TWO = [
    {"timestamp": 0, "input_length": 192, "output_length": 20, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 192, "output_length": 20, "hash_ids": [0, 1, 3]},
]


def run(name, *arguments):
    if not (BIN / name).is_file():
        pytest.skip(f"needs {BIN / name}: make build")
    command = [BIN / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_relay_bench_trace(tmp_path):
    from sections import trace

    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(request) + "\n" for request in TWO))
    options = ("bench", "trace", "--trace", file, "--shape", "tiny", "--block-size", 64)
    done = run("relay", *options, "--every", 0.5, "--json")
    assert done.returncode == 0, done.stderr
    rows = {r.metric: r.median for r in trace.rows_of({}, json.loads(done.stdout))}
    assert rows["read without sharing over with, all steps"] == pytest.approx(
        2 * 200 / 272, rel=0.05
    )
    assert "level 1" in run("relay", *options).stdout
    file.write_text(file.read_text() + '{"timestamp": 1}\n')
    done = run("relay", *options)
    assert done.returncode == 1
    assert done.stderr == (
        "relay: error: trace, line 3: 'input_length' has to be a whole number from 1\n"
    )


def test_operators_tell_the_same_case():
    from sections import operator

    case = ("--heads", 4, "--kv-heads", 2, "--head-dim", 64, "--prefix", 64, "--context", 64)
    case += ("--batch", 2, "--rounds", 1, "--threads", 1, "--kv-type", "f16")
    relay = run("relay", "bench", "op", "--json", *case)
    ggml = run("relay-ggml-op-bench", *case)
    assert relay.returncode == 0 and ggml.returncode == 0, relay.stderr + ggml.stderr
    (ours,), (theirs,) = (json.loads(done.stdout)["results"] for done in (relay, ggml))
    same = ("heads", "kv_heads", "head_dim", "kv_type", "prefix", "context", "batch", "rounds")
    assert [ours[name] for name in same] == [theirs[name] for name in same]
    assert ours["layers"] == theirs["layers"], "as much KV, so as far from the cache"
    assert ours["sharing_on"]["seconds_predicted"] > 0
    assert operator.timing({}, "ggml", theirs, 1).median > 0


def test_ggml_op_bench_refuses_what_makes_no_sense():
    done = run("relay-ggml-op-bench", "--kv-type", "q3")
    assert done.returncode == 1 and "q3" in done.stderr
    done = run("relay-ggml-op-bench", "--prefix", 0, "--context", 0)
    assert done.returncode == 1 and "error" in done.stderr
