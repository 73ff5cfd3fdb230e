"""``sidelight serve --engine vllm``: vLLM's own server, started with our options in this process.

The configuration stays in the process, so no secret appears in arguments or environment variables.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import ceil
from typing import Any, NoReturn

from sidelight.engines.base import EngineUnavailableError
from sidelight.engines.transformers.backbone import read_model
from sidelight.errors import SidelightError
from sidelight.probes.probe import Probe, common_format
from sidelight.server.app import cannot_listen, require_keys
from sidelight.server.config import ServerConfig
from sidelight_vllm import KEY
from sidelight_vllm.internals import wrap
from sidelight_vllm.settings import SET_HERE, require_vllm, serve_with

_PROXY = "Limit it in a proxy in front of the server."
# Options of our own HTTP layer, and their remedies.
NO_PLACE = {
    "playground": "Serve with --engine transformers to try probes in a browser.",
    "json_logs": "Name a logging configuration in VLLM_LOGGING_CONFIG_PATH.",
    "max_body_bytes": _PROXY,
    "max_batch_items": _PROXY,
    "max_request_tokens": "Limit each text with --engine-option max_model_len=N.",
    "deadline": _PROXY,
}
# vLLM's options that ours replace.
_SET_HERE = SET_HERE | {
    "host": "Give --host instead.",
    "port": "Give --port instead.",
    "api_key": "Give --api-key instead, which protects every route.",
    "uvicorn_log_level": "Give --log-level instead.",
    "shutdown_timeout": "Give drain_s in the file of --config instead.",
    "api_server_count": "Leave it out, or run 'vllm serve' with SIDELIGHT_PROBES.",
    "headless": "For engines without a server, run 'vllm serve' with SIDELIGHT_PROBES.",
}
# Lists that vLLM accepts as JSON; it accepts others word by word.
_JSON_LISTS = frozenset({"allowed_origins", "allowed_methods", "allowed_headers"})
_NOT_LISTENING = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES})


def serve(config: ServerConfig, model: str, probes: Sequence[Probe]) -> None:
    """Serve until SIGTERM or SIGINT; running requests have ``drain_s`` to finish.

    Args:
        config: The configuration, with the folders of the probes.
        model: ``smollm2``, a folder, or a hub id; requests call it so, unless
            ``served_model_name`` says otherwise.
        probes: The probes of the folders.

    Raises:
        KeyboardInterrupt: SIGINT has stopped the server.
        SidelightError: vLLM's server does not support an option, other machines could connect
            without a key, the address is not available, or vLLM cannot serve the probes or exits.
    """
    _require_places(config)
    require_keys(config)
    require_vllm()
    _end_at_signals()
    backbone = read_model(model, prompt_format=common_format(probes))
    plugins = filter(None, os.environ.get("VLLM_PLUGINS", "").split(","))
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, KEY]))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", config.log_level.upper())
    serve_with(config)
    sys.argv = ["vllm", *arguments(config, model, backbone.path)]
    from vllm.entrypoints.launchers.api_server import entry

    has_failed, signals = _noted_failure(), _noted_signals()
    # vLLM calls this right after replacing our SIGTERM handler with its own.
    wrap(entry, "setup_server", _end_at_signals)
    try:
        entry.main()
    except OSError as error:
        if error.errno in _NOT_LISTENING:
            raise cannot_listen(config, error) from error
        raise
    if has_failed():
        raise EngineUnavailableError(
            "vLLM has stopped. Check its log for the reason, and restart the server."
        )
    if signals[:1] == [signal.SIGINT]:
        raise KeyboardInterrupt


def _end_at_signals(proceed: Callable[..., Any] = lambda: None, *args: Any, **kwargs: Any) -> Any:
    """Let SIGTERM and SIGINT end all processes immediately, until vLLM's server can drain.

    An exception, as raised by vLLM, would occur anywhere in its code: some code swallows it, some
    treats it as a failure, and stopping an engine that is just starting waits forever.
    """
    import psutil

    def end(number: int, _: object) -> NoReturn:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                # That process then removes the remaining shared memory.
                if not any("resource_tracker" in word for word in process.cmdline()):
                    process.kill()
        if number == signal.SIGINT:
            os.write(sys.stderr.fileno(), b"Stopped.\n")
        os._exit(130 if number == signal.SIGINT else 0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return proceed(*args, **kwargs)


def _noted_failure() -> Callable[[], bool]:
    """Whether vLLM's engine had failed at shutdown, which its server does not report."""
    from vllm.v1.engine.async_llm import AsyncLLM

    states: list[bool] = []

    def note(shutdown: Callable[..., None], llm: Any, *args: Any, **kwargs: Any) -> None:
        states.append(llm.errored)
        shutdown(llm, *args, **kwargs)

    wrap(AsyncLLM, "shutdown", note)
    return lambda: states[:1] == [True]


def _noted_signals() -> list[int]:
    """The signals that stopped vLLM's server, which it does not report."""
    from uvloop import Loop

    signals: list[int] = []

    def note(
        add: Callable[..., None], loop: Any, number: int, callback: Callable[..., None], *args: Any
    ) -> None:
        def noted() -> None:
            signals.append(number)
            callback(*args)

        add(loop, number, noted)

    wrap(Loop, "add_signal_handler", note)
    return signals


def arguments(config: ServerConfig, model: str, path: str) -> list[str]:
    """The arguments of vLLM's command line, for a model in a folder or at a hub id."""
    options = {
        "model": path,
        "served_model_name": config.served_model_name or model,
        "dtype": config.dtype,
        "host": config.host,
        "port": config.port,
        "uvicorn_log_level": config.log_level,
        "shutdown_timeout": ceil(config.drain_s),
        "additional_config": {KEY: {"probes": list(map(str, config.probe))}},
        **config.engine_option,
    }
    return [word for name, value in options.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    values = value if isinstance(value, list) and name not in _JSON_LISTS else [value]
    words = (json.dumps(each) if isinstance(each, dict | list) else str(each) for each in values)
    return [f"--{option}", *words]


def _require_places(config: ServerConfig) -> None:
    for name, remedy in NO_PLACE.items():
        if name in config.model_fields_set:
            raise SidelightError(f"vLLM's server does not support '{name}'. Leave it out. {remedy}")
    if config.served_model_name and "served_model_name" in config.engine_option:
        raise SidelightError(
            "The model is named twice, by --served-model-name and by --engine-option "
            "served_model_name=. Leave one of the two out."
        )
    for name, remedy in _SET_HERE.items():
        if name in config.engine_option:
            raise SidelightError(f"vLLM's option '{name}' is set by Sidelight. {remedy}")
    if os.environ.get("VLLM_API_KEY"):
        raise SidelightError(
            "VLLM_API_KEY protects only some of vLLM's routes. Unset it, and set "
            "SIDELIGHT_API_KEY, which protects every route."
        )
