"""The entry point of ``vllm.general_plugins``; vLLM calls it in each of its processes."""


def register() -> None:
    """Prepares this process; nothing happens until probes are named."""
    from sidelight.vllm.patches import install

    install()
