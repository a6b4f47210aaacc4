"""Runs real vLLM engines within the test's process, with and without Relay."""

import os

# Before vLLM is imported: the engine in this process, no network, little talk.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and a vLLM for it")


def pytest_collection_modifyitems(items):
    """Tests that need what is not here are listed as skipped by name."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Where tiny models are written, once for all tests."""
    return tmp_path_factory.mktemp("models")
