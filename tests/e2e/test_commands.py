"""relay isa, bench op and explain: what they say of a GPU, and what they refuse."""

import json
import subprocess

import pytest
from conftest import RELAY

NO_GPU = "GPU: none: "


def relay(*arguments, status=0):
    done = subprocess.run([RELAY, *arguments], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture
def no_gpu():
    """Why this program finds none."""
    last = relay("isa").splitlines()[-1]
    if not last.startswith(NO_GPU):
        pytest.skip("needs a program or a machine without a GPU")
    return last.removeprefix(NO_GPU)


def test_isa_of_the_cpu_is_a_plain_list():
    lines = relay("isa", "--device", "cpu").splitlines()
    names = [line.removeprefix("* ").strip() for line in lines]
    assert names[-1] == "plain"
    assert all(name.isalnum() for name in names)
    assert sum(line.startswith("* ") for line in lines) == 1
    everything = relay("isa").splitlines()
    assert everything[0].startswith("CPU: ")
    assert everything[1 : 1 + len(lines)] == lines


@pytest.mark.parametrize("command", [["isa"], ["bench", "op"], ["explain"]], ids=" ".join)
def test_without_a_gpu_all_give_the_same_reason(command, no_gpu):
    error = relay(*command, "--device", "cuda", status=1)
    assert error == f"relay: error: {no_gpu}\n"
    assert "-DRELAY_CUDA=ON" in error or "NVIDIA driver" in error


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("bench op", "--threads", "2"),
        ("bench op", "--isa", "plain"),
        ("bench op", "--layout", "tiles"),
        ("explain", "--threads", "2"),
    ],
)
def test_options_of_the_cpu_are_refused_on_a_gpu(command, option, value):
    error = relay(*command.split(), "--device", "cuda", option, value, status=2)
    assert f"{option}: means nothing on a GPU" in error


@pytest.mark.parametrize("command", ["bench op", "explain"])
@pytest.mark.parametrize(("device", "kv_type"), [("cuda", "q8_0"), ("cpu", "f8_e4m3")])
def test_types_of_kv_are_those_of_the_device(command, device, kv_type):
    error = relay(*command.split(), "--device", device, "--kv-type", kv_type, status=1)
    assert "--kv-type is one of f" in error and kv_type in error


def test_bench_op_reports_as_json():
    # Long enough to be shared on any machine.
    small = "--heads 2 --kv-heads 2 --head-dim 32 --prefix 2048 --context 8 --batch 1,8 --rounds 1"
    report = json.loads(relay("bench", "op", "--json", *small.split()))
    assert [result["batch"] for result in report["results"]] == [1, 8]
    assert report["results"][1]["sharing_on"]["kv_slots_read"] == 2048 + 8 * 8
    assert report["results"][1]["sharing_off"]["kv_slots_read"] == 8 * (2048 + 8)
