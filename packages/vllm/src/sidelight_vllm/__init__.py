"""Probes inside vLLM: the verdict comes from the forward pass that serves the request.

vLLM calls ``install`` in each of its processes; once probes are named, ``plugin`` installs our
parts. ``internals`` contains the undocumented parts of vLLM that are used, and ``settings`` names
the served probes. In a worker, ``slots`` projects the residual stream of each layer and stores the
projections of every token by KV slot, and ``worker`` classifies. ``requests`` defines the data that
travels with a request, and the scheduler's tracking of it; ``connector`` attaches verdicts to
vLLM's outputs, and ``outputs`` receives them. ``guard`` enforces the policy in vLLM's own server:
``recogniser`` finds the turns of prompts, ``answers`` filters what may be sent, ``endpoint`` adds
to HTTP responses, and ``server`` starts it. ``engine`` classifies texts and replaces the probes,
and ``lock`` synchronises requests with replacements. ``offline`` stores hidden states for training.
Everything is stored by KV slot, never by request. See ``docs/vllm.md`` for what is supported.
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
# Set for the processes of an engine whose configuration names probes, because they do not see the
# configuration.
_INHERITED = "_SIDELIGHT_IN_VLLM"


def install() -> None:
    """The entry point of ``vllm.general_plugins``, called in each of vLLM's processes.

    Until a probe is named, only vLLM's public ``EngineArgs`` is imported, which shows whether its
    configuration names one. Plain vLLM of any version therefore starts.

    vLLM continues without a plugin that it cannot import, and stops if one fails later.

    Raises:
        SidelightError: The environment names probes, but this version of vLLM is unknown, or this
            package does not support the installed Sidelight.
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
    """Whether probes are named, or a policy that needs probes."""
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
