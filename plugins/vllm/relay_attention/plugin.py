"""What vLLM calls in each of its processes, through the entry point `vllm.general_plugins`."""

BACKEND = "relay_attention.backend.RelayAttentionBackend"


def register() -> None:
    """Makes Relay vLLM's CPU attention, or says why not. May be called again."""
    from relay_attention import native, openmp, settings
    from relay_attention.errors import RelayError
    from relay_attention.log import logger

    try:
        if settings.disabled():
            logger.info("Relay is installed but disabled (RELAY_DISABLE=1)")
            return
        reason = obstacle()
        if reason is not None:
            logger.warning("Relay is not active: %s", reason)
            return
        runtime = openmp.use()
        settings.sharing()
        description = f"Relay {native.version()} with {native.isa()} kernels on {runtime.path}"
    except RelayError as e:
        logger.warning("Relay is not active: %s", e)
        return

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    logger.info("CPU attention is computed by %s", description)


def obstacle() -> str | None:
    """Why this vLLM has no use for Relay; None if it has."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"vLLM runs on {current_platform.device_name}, and Relay serves CPUs only"
    return None
