# pyright: reportMissingImports=false
"""Starts vLLM with the plugin in it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sidelight.backbones import load_backbone
from sidelight.engines.base import require_same_model
from sidelight.engines.line import Limits
from sidelight.engines.vllm.engine import VllmEngine
from sidelight.engines.vllm.shelf import Shelf
from sidelight.errors import SidelightError, did_you_mean
from sidelight.probe import Probe, common_format
from sidelight.vllm_plugin.settings import KEY

# Options of vLLM's that are no user's, with what to do instead; any command may meet them.
_SET_HERE = {
    "model": "Give --model instead.",
    "dtype": "Give --dtype instead.",
    "additional_config": "Leave it out; it carries what the plugin is told.",
    "disable_log_stats": "Leave it out; a server has its figures at /metrics.",
}


def load_vllm_engine(
    model: str,
    probes: Sequence[Probe],
    *,
    dtype: str = "auto",
    limits: Limits | None = None,
    options: Mapping[str, Any] | None = None,
) -> VllmEngine:
    """A running engine.

    Args:
        model: ``smollm2``, a folder, or a hub id.
        probes: Probes trained on it.
        dtype: As vLLM takes it.
        limits: As for ``VllmEngine``.
        options: Fields of vLLM's ``AsyncEngineArgs``.

    Raises:
        SidelightError: vLLM is not installed, an option is unknown, a probe belongs to another
            model or reads another format than the others, or a feature is in use that the plugin
            does not support.
    """
    args_type, engine_type = _vllm()
    # Loaded for who it is and how it reads text; the weights that serve are vLLM's own.
    backbone = load_backbone(model, device="cpu", prompt_format=common_format(probes))
    path = backbone.model.config._name_or_path  # pyright: ignore[reportPrivateUsage]
    encoder, tokenizer, fingerprint = backbone.encoder, backbone.tokenizer, backbone.fingerprint
    del backbone
    require_same_model(probes, fingerprint)
    shelf = Shelf()
    named = {"probes": shelf.put(probes), "fingerprint": asdict(fingerprint)}
    given = {"max_model_len": encoder.max_tokens, **(options or {})}
    require_options(given, args_type)
    arguments = args_type(
        model=path,
        dtype=dtype,
        disable_log_stats=True,
        additional_config={KEY: named},
        **given,
    )
    try:
        llm = engine_type.from_engine_args(arguments)
    except TypeError as error:
        # vLLM compares numbers with whatever it was given.
        raise SidelightError(
            f"vLLM cannot work with these options ({error}): {given}. See to their types."
        ) from error
    return VllmEngine(
        llm,
        probes,
        name=model,
        encoder=encoder,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        shelf=shelf,
        limits=limits,
    )


def require_options(given: Mapping[str, Any], args_type: Any) -> None:
    """Checks that these are fields of vLLM's arguments, and none that Sidelight sets.

    Raises:
        SidelightError: One is not; names or Sidelight's own option are proposed.
    """
    known = args_type.__dataclass_fields__
    for name in given:
        if name in _SET_HERE:
            raise SidelightError(f"vLLM's option '{name}' is set by Sidelight. {_SET_HERE[name]}")
        if name not in known:
            raise SidelightError(f"vLLM has no option '{name}'.{did_you_mean(name, known)}")


def require_vllm() -> None:
    """Checks that vLLM can be imported.

    Raises:
        SidelightError: It is not installed.
    """
    # What a command prints is for its user.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm.engine.arg_utils  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise SidelightError(
            "vLLM is not installed in this environment. docs/vllm.md says how; or use "
            "--engine transformers."
        ) from error


def _vllm() -> tuple[Any, Any]:
    require_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncEngineArgs, AsyncLLM
