"""bench/serving at its smallest: each figure is measured, whatever it is here."""

import subprocess
import sys

import pytest
from conftest import RELAY, ROOT

# overload and soak take minutes.
FIGURES = ["restart", "inter-token", "prompts", "together", "single", "overhead"]


@pytest.mark.parametrize("figure", FIGURES)
def test_figure(model, figure):
    small = ["--prompt-tokens", "300", "--users", "4", "--seconds", "2", "--rounds", "1"]
    command = [sys.executable, ROOT / "bench/serving", figure, "-m", model, "--relay", RELAY]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or done.stderr.startswith("serving: missed: "), done.stderr
