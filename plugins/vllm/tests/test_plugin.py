"""Which vLLMs and devices Relay makes itself at home in, and that the others are left alone."""

import pytest
from relay_attention import plugin, settings, versions
from relay_attention.errors import RelayError
from vllm.v1.attention.backends.registry import AttentionBackendEnum


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1rc2", "0.33.0+cpu"])
def test_known_versions(version):
    assert versions.obstacle(version) is None


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "1.33.0", "0.3.3", "dev"])
def test_another_version_is_told_which_are_known(version):
    assert (
        versions.obstacle(version) == f"vLLM {version} is not known to it; known are 0.32 and 0.33"
    )


@pytest.fixture
def no_overrides():
    for device in (plugin.CPU, plugin.CUDA):
        AttentionBackendEnum[device.replaces].clear_override()
    yield
    plugin.register()


def overridden() -> list[str]:
    names = [d.replaces for d in (plugin.CPU, plugin.CUDA)]
    return [name for name in names if AttentionBackendEnum[name].is_overridden()]


def test_replaces_the_backend_of_the_device(no_overrides):
    plugin.register()
    assert overridden() == [plugin.find_device().replaces]
    plugin.register()  # as vLLM may


def test_an_unknown_version_is_left_as_it_was(no_overrides, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    plugin.register()
    assert overridden() == []
    with pytest.raises(RelayError, match="0.99.0 is not known"):
        plugin.find_device()


def test_another_device_is_left_as_it_was(no_overrides, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: False)
    plugin.register()
    assert overridden() == []


def test_a_package_without_cuda_says_how_to_get_one_with(no_overrides, monkeypatch):
    from relay_attention.cuda import native

    monkeypatch.setattr(plugin, "find_device", lambda: plugin.CUDA)
    monkeypatch.setattr(native, "LIBRARY", "librelay-missing.so")
    native.library.cache_clear()
    plugin.register()
    assert overridden() == []
    with pytest.raises(RelayError, match="built without CUDA.*CUDACXX"):
        native.library()


def test_disabled(no_overrides, monkeypatch):
    monkeypatch.setenv("RELAY_DISABLE", "1")
    plugin.register()
    assert overridden() == []


def test_a_wrong_setting_leaves_vllm_as_it_was(no_overrides, monkeypatch):
    monkeypatch.setenv("RELAY_SHARING", "maybe")
    plugin.register()
    assert overridden() == []
    with pytest.raises(RelayError, match="neither on nor off"):
        settings.sharing()
