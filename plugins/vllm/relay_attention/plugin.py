"""What vLLM calls in each of its processes, through the entry point `vllm.general_plugins`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What vLLM runs on. `replaces` is vLLM's name of the backend that `backend` replaces."""

    name: str
    replaces: str
    backend: str


CPU = Device("CPU", "CPU_ATTN", "relay_attention.cpu.backend.RelayAttentionBackend")
CUDA = Device("CUDA", "FLASH_ATTN", "relay_attention.cuda.backend.RelayFlashAttentionBackend")


def register() -> None:
    """Makes Relay vLLM's attention, or says why not. May be called again."""
    from relay_attention import settings
    from relay_attention.errors import RelayError
    from relay_attention.log import logger

    try:
        if settings.disabled():
            logger.info("Relay is installed but disabled (RELAY_DISABLE=1)")
            return
        device = find_device()
        settings.sharing()
        library = _use_library(device)
    except RelayError as e:
        logger.warning("Relay is not active, and vLLM is as it was: %s", e)
        return

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum[device.replaces], device.backend)
    logger.info("%s attention (%s) is computed by %s", device.name, device.replaces, library)


def find_device() -> Device:
    """What this vLLM runs on. Raises RelayError if Relay does not serve that, or this vLLM."""
    import vllm
    from vllm.platforms import current_platform

    from relay_attention import versions
    from relay_attention.errors import RelayError

    reason = versions.obstacle(vllm.__version__)
    if reason is not None:
        raise RelayError(reason)
    if current_platform.is_cpu():
        return CPU
    if not current_platform.is_cuda():
        raise RelayError(
            f"vLLM runs on {current_platform.device_name}; CPUs and NVIDIA GPUs are served"
        )
    if not current_platform.has_device_capability(80):
        raise RelayError("a GPU of compute capability 8.0 or newer is needed")
    return CUDA


def _use_library(device: Device) -> str:
    """Loads the native library and describes it. Starts no CUDA: vLLM may have yet to fork."""
    if device is CUDA:
        from relay_attention import __version__
        from relay_attention.cuda import native

        native.library()
        return f"Relay {__version__}"
    from relay_attention.cpu import native, openmp

    return f"Relay {native.version()} with {native.isa()} kernels on {openmp.use().path}"
