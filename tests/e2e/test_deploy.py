"""deploy/: the unit lets the server do what it does, and the image is built from enough."""

import ctypes.util
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import RELAY, ROOT, Server

UNIT = (ROOT / "deploy/relay.service").read_text()
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
def systemd_analyze():
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze")
    return program


def test_systemd_understands_the_unit(systemd_analyze, tmp_path):
    unit = tmp_path / "relay.service"
    unit.write_text(UNIT.replace("/usr/local/bin/relay", str(RELAY)))
    checked = subprocess.run([systemd_analyze, "verify", unit], capture_output=True, text=True)
    assert checked.returncode == 0 and "relay.service" not in checked.stderr, checked.stderr


def test_the_service_may_read_the_files_that_its_unit_names():
    options = dict(re.findall(r"^#   (RELAY_\w+)=(\S+)$", UNIT, re.MULTILINE))
    credentials = re.findall(r"^LoadCredential=([\w-]+):/etc/relay/", UNIT, re.MULTILINE)
    its_own = {f"/run/credentials/relay.service/{name}" for name in credentials}
    help_text = subprocess.run([RELAY, "serve", "--help"], capture_output=True, text=True).stdout
    assert len(options) >= 4
    for name, path in options.items():
        assert f"{name}]" in help_text
        assert path in its_own or pathlib.PurePath(path).parent.as_posix() == "/var/lib/relay"


def allowed_calls(systemd_analyze):
    """The system calls of the unit's SystemCallFilter, whose sets may hold others."""
    text = subprocess.run(
        [systemd_analyze, "syscall-filter"], capture_output=True, text=True
    ).stdout
    sets = {}
    for line in text.splitlines():
        if line.startswith("@"):
            members = sets.setdefault(line.strip(), [])
        elif re.fullmatch(r" +@?\w[\w-]*", line):
            members.append(line.strip())

    def members_of(name):
        if not name.startswith("@"):
            return {name}
        return set().union(*map(members_of, sets[name]))

    given = re.search(r"^SystemCallFilter=(.*)$", UNIT, re.MULTILINE)[1].split()
    return set().union(*map(members_of, given))


def test_the_unit_allows_the_system_calls_of_the_server(
    systemd_analyze, model, prompt_file, tmp_path
):
    if ctypes.util.find_library("seccomp") is None:
        pytest.skip("no libseccomp")
    calls = sorted(allowed_calls(systemd_analyze))
    assert "execve" in calls and "mount" not in calls
    filtered = [sys.executable, ROOT / "tests/e2e/filtered.py", *calls, "--"]
    server = Server(
        *("-m", model, "-c", "8192", "--pin-prompt", prompt_file, "--pin-budget", "0.5"),
        *("--prompt-cache-dir", tmp_path / "prompts"),
        under=filtered,
    )
    with server.client() as client:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        hello = [{"role": "user", "content": "Hello " * 500}]
        for options in ({}, {"response_format": form}):
            client.chat.completions.create(model="tiny", messages=hello, max_tokens=20, **options)
    assert server.stop(signal.SIGTERM) == 0, server.errors()
    assert list((tmp_path / "prompts").glob("*.kv"))


def test_what_the_image_is_built_from_is_enough(tmp_path):
    first, *kept = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"
    ]
    assert first == "*", "build folders, environments and models stay outside"
    for name in (line.removeprefix("!") for line in kept):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    container = (ROOT / "deploy/Containerfile").read_text()
    options = re.search(r"cmake --preset release (.*) \\", container)[1].split()
    options = [option for option in options if "MARCH" not in option]
    (llama,) = (ROOT / ".deps").glob("llama.cpp-*/CMakeLists.txt")
    configured = subprocess.run(
        ["cmake", "--preset", "release", *options, f"-DRELAY_LLAMA_CPP_DIR={llama.parent}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert configured.returncode == 0, configured.stderr
