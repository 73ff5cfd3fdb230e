"""Probes inside vLLM: the verdict comes from the forward pass that serves the request.

vLLM calls ``install`` in each of its processes; once probes are named, ``plugin`` puts our parts
into it.
``internals`` has what we use of vLLM beyond its documentation, and ``settings`` says which probes
are served. In a worker, ``slots`` projects the residual stream of each layer and keeps the
columns of every token by KV slot, and ``worker`` judges.
``requests`` has what travels with a request, and the scheduler's side of it; ``connector`` puts
verdicts on vLLM's outputs, and ``outputs`` hears them. ``guard`` enforces the policy in vLLM's own
server: ``recogniser`` finds the turns of prompts, ``answers`` has what may be sent, ``endpoint``
adds to HTTP answers, and ``server`` starts it. ``engine`` judges texts and replaces the probes,
and ``lock`` lets requests and changes of them take turns. ``offline`` keeps hidden states for
training.
Everything is kept by KV slot, never by request. ``docs/vllm.md`` says what is supported.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import logging
import os
from collections.abc import Mapping
from functools import wraps
from typing import Any

from sidelight.errors import SidelightError
from sidelight.extensions import require_fit

ENVIRONMENT = "SIDELIGHT_PROBES"
POLICY = "SIDELIGHT_POLICY"
KEY = "sidelight"
TESTED = ">=0.32,<0.34"
# Options that quantise weights, or keys and values.
QUANTISING = ("quantization", "quantization_config", "kv_cache_dtype")
# Set for the processes of an engine whose configuration names probes: they do not see that.
_INHERITED = "_SIDELIGHT_IN_VLLM"


def install() -> None:
    """The entry point of ``vllm.general_plugins``, called in each of vLLM's processes.

    Before a probe is named, nothing is imported of vLLM but its public ``EngineArgs``, which shows
    whether its configuration names one. So plain vLLM starts, of whatever version.

    vLLM goes on without a plugin that it cannot import, and stops for one that fails later.

    Raises:
        SidelightError: The environment names probes, and this vLLM is unknown, or this package
            does not fit the installed Sidelight.
    """
    if _are_named({}):
        _wrap_vllm()
        return
    try:
        from vllm import EngineArgs

        original: Any = EngineArgs.create_engine_config
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.sidelight").warning(
            "Probes named in additional_config['%s'] are not served: %s. Name them in %s, or use "
            "vLLM %s.",
            KEY,
            error,
            ENVIRONMENT,
            TESTED,
        )
        return
    # vLLM may call this more than once.
    if hasattr(original, "looks_for_probes"):
        return

    @wraps(original)
    def create_engine_config(arguments: Any, *args: Any, **kwargs: Any) -> Any:
        is_wrapped = EngineArgs.create_engine_config is not create_engine_config
        if is_wrapped or not _are_named(getattr(arguments, "additional_config", None) or {}):
            return original(arguments, *args, **kwargs)
        os.environ[_INHERITED] = "1"
        EngineArgs.create_engine_config = original
        _wrap_vllm()
        return arguments.create_engine_config(*args, **kwargs)

    create_engine_config.looks_for_probes = True
    EngineArgs.create_engine_config = create_engine_config


def _are_named(config: Mapping[str, Any]) -> bool:
    """Whether probes are named, or a policy that needs some."""
    return KEY in config or any(map(os.environ.get, (ENVIRONMENT, POLICY, _INHERITED)))


def _wrap_vllm() -> None:
    require_fit("sidelight-vllm")
    try:
        from sidelight_vllm.plugin import wrap_vllm

        wrap_vllm()
    except (ImportError, AttributeError) as error:
        import vllm

        raise SidelightError(
            f"This is vLLM {getattr(vllm, '__version__', 'of an unknown version')}, which lacks "
            f"an API that probes inside vLLM need ({error}). They were tested with {TESTED}. "
            "Install such a version, or serve with the transformers engine. To run vLLM without "
            f"probes, unset {ENVIRONMENT} and {POLICY}, and leave '{KEY}' out of "
            "additional_config."
        ) from error
