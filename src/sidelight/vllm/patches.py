"""What a worker process has one of, since it runs one model.

Everything of vLLM that its documentation does not promise, in one place.

Tested with the versions in ``TESTED``. Two methods are wrapped. In
``EngineArgs.create_engine_config`` our connector, scheduler and worker extension are named in the
configuration; in ``BaseModelLoader.load_model`` the layers are hooked before they are compiled.
Used besides:
``ForwardContext.slot_mapping``, ``SchedulerOutput.kv_connector_block_state`` (connector),
``Scheduler.update_from_output`` (scheduler), and ``OutputProcessor.process_outputs`` with the
``external_req_id`` and ``request_index`` of its ``request_states`` (hearing).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, Generic, TypeVar

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sidelight.errors import SidelightError
from sidelight.vllm.settings import (
    CAPTURE,
    KEY,
    Captured,
    Served,
    fingerprint_of,
    load_checked,
    named_folders,
)

T = TypeVar("T")


class Installed(Generic[T]):
    """Holds the one object of its kind in this process.

    Args:
        loss: What happens without it, for the error.
    """

    def __init__(self, *, loss: str):
        self._loss = loss
        self._held: T | None = None

    def put(self, held: T | None) -> None:
        """Makes it the one of this process."""
        self._held = held

    def get(self) -> T:
        """The one of this process.

        Raises:
            SidelightError: The model was loaded in a way that the plugin does not see.
        """
        if self._held is None:
            raise SidelightError(
                f"This model loader does not tap the model, so {self._loss}. Use vLLM's default "
                "--load-format."
            )
        return self._held


# pyright: reportMissingImports=false


TESTED = SpecifierSet(">=0.32,<0.33")
UNTESTED = "SIDELIGHT_VLLM_UNTESTED"
"""Set to 1, it lets a version, a device or an architecture pass that has not been tried."""
ARCHITECTURES = frozenset({"LlamaForCausalLM"})

CONNECTOR = "ProbeConnector"
CAPTURE_CONNECTOR = "CaptureConnector"
_MODULE = "sidelight.vllm"
# Part of the key of vLLM's compile cache: a graph without our operation must not be taken for one
# with it. The probes are no part of it, since they change no graph.
_GRAPH = {KEY: "taps-1"}


def install() -> None:
    """Wraps the two methods, once per process; without named probes both pass everything on."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    _wrap(EngineArgs, "create_engine_config", _configure)
    _wrap(BaseModelLoader, "load_model", _load)


def served_by(vllm_config: Any) -> Served | None:
    """The probes that a configuration names; None where the plugin is not part of it."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        return None
    return Served.from_json(transfer.kv_connector_extra_config)


def captured_by(vllm_config: Any) -> Captured | None:
    """The hidden states that a configuration keeps; None where it keeps none."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CAPTURE_CONNECTOR:
        return None
    return Captured(**transfer.kv_connector_extra_config)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if getattr(original, "wrapped_by", None) == __name__:
        return

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    method.wrapped_by = __name__  # pyright: ignore[reportAttributeAccessIssue]
    setattr(owner, name, method)


def _configure(original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """The engine's configuration with our parts named in it."""
    given = arguments.additional_config.get(KEY, {})
    given = given if isinstance(given, dict) else {}
    if CAPTURE in given:
        return _configure_capture(original, arguments, Captured(**given[CAPTURE]), args, kwargs)
    folders = named_folders(given)
    if folders is None:
        return original(arguments, *args, **kwargs)
    _require_version()
    _require_free(arguments)
    served = _served(arguments.model, folders, given)
    arguments.worker_extension_cls = f"{_MODULE}.worker.Control"
    _connect(arguments, CONNECTOR, "connector", served.to_json())
    config = original(arguments, *args, **kwargs)
    _require_supported(config)
    kind = "AsyncProbeScheduler" if config.scheduler_config.async_scheduling else "ProbeScheduler"
    config.scheduler_config.scheduler_cls = f"{_MODULE}.connector.{kind}"
    return config


def _configure_capture(
    original: Callable[..., Any],
    arguments: Any,
    captured: Captured,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The configuration of an engine that keeps hidden states."""
    _require_version()
    _require_free(arguments)
    _require_offline(arguments)
    _connect(arguments, CAPTURE_CONNECTOR, "connector", captured.to_json())
    config = original(arguments, *args, **kwargs)
    _require_supported(config)
    if config.cache_config.enable_prefix_caching:
        raise SidelightError(
            "Tokens from vLLM's prefix cache have no hidden states that could be kept. Leave "
            "enable_prefix_caching out."
        )
    return config


def _connect(arguments: Any, name: str, module: str, extra: dict[str, Any]) -> None:
    from vllm.config import KVTransferConfig

    arguments.additional_config = {**arguments.additional_config, **_GRAPH}
    arguments.kv_transfer_config = KVTransferConfig(
        kv_connector=name,
        kv_connector_module_path=f"{_MODULE}.{module}",
        kv_role="kv_producer",
        kv_connector_extra_config=extra,
    )


def _served(model: str, folders: tuple[str, ...], given: dict[str, Any]) -> Served:
    if "fingerprint" in given:
        served = Served.from_json({**given, "folders": folders})
    else:
        served = Served(folders, fingerprint_of(model, folders))
    load_checked(served.folders, served.fingerprint)
    return served


def _load(
    original: Callable[..., Any],
    loader: Any,
    vllm_config: Any,
    model_config: Any,
    prefix: str = "",
) -> Any:
    """The loaded model, its layers hooked."""
    model = original(loader, vllm_config, model_config, prefix)
    served, captured = served_by(vllm_config), captured_by(vllm_config)
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    device = next(model.parameters()).device
    if served is not None:
        from sidelight.vllm import worker

        layers = _tap(model, served.fingerprint.width)
        worker.INSTALLED.put(worker.Worker(served, layers=layers, tokens=tokens, device=device))
    if captured is not None:
        from sidelight.vllm import capture as capturing
        from sidelight.vllm.taps import set_stage

        layers = _tap(model, captured.width)
        recorder = capturing.Recorder(
            layers,
            tokens=tokens,
            width=captured.width,
            dtype=model_config.dtype,
            device=device,
        )
        capturing.INSTALLED.put(recorder)
        set_stage(recorder)
    return model


def _tap(model: Any, width: int) -> range:
    """Hooks the layers of this worker; returns which hidden states they give."""
    from vllm.distributed.parallel_state import get_pp_group

    from sidelight.vllm.taps import tap_layers

    decoder = model.model
    local = list(decoder.layers)[decoder.start_layer : decoder.end_layer]
    is_first = get_pp_group().is_first_rank
    start = 0 if is_first else decoder.start_layer + 1
    return range(start, start + tap_layers(local, reads_embedding=is_first, width=width))


def _require_version() -> None:
    from vllm import __version__

    if Version(__version__) not in TESTED and not _allows_untested():
        raise SidelightError(
            f"This is vLLM {__version__}; probes inside vLLM were tested with {TESTED}. Install "
            f"such a version, serve with the transformers engine, or set {UNTESTED}=1 and compare "
            "with 'sidelight parity'."
        )


def _require_free(arguments: Any) -> None:
    """Checks that nobody else has taken the places that we need."""
    taken = {
        "--kv-transfer-config": arguments.kv_transfer_config,
        "--kv-offloading-size": arguments.kv_offloading_size,
        "--scheduler-cls": arguments.scheduler_cls,
        "--worker-extension-cls": arguments.worker_extension_cls,
    }
    names = [name for name, value in taken.items() if value]
    if names:
        raise SidelightError(
            f"Probes inside vLLM need the place of {', '.join(names)} for themselves. Leave it "
            "out, or unset SIDELIGHT_PROBES."
        )


def _require_offline(arguments: Any) -> None:
    """Requests name the files that states go to, so they must not come from a network."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    if isinstance(arguments, AsyncEngineArgs):
        raise SidelightError(
            "Hidden states are kept offline only. Use vLLM's LLM or LLMEngine, not a server."
        )


def _require_supported(config: Any) -> None:
    """Checks that every feature in use is one that a test covers.

    Raises:
        SidelightError: Some is not; nothing is ever served unjudged.
    """
    parallel = config.parallel_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "dual batch overlap": parallel.enable_dbo,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "--hf-overrides": bool(config.model_config.hf_overrides),
        "a pooling model": config.model_config.runner_type != "generate",
        "model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
    }
    untested = {
        f"the device {config.device_config.device_type}": config.device_config.device_type != "cpu",
        f"the architecture {config.model_config.architecture}": config.model_config.architecture
        not in ARCHITECTURES,
    }
    if not _allows_untested():
        refused = {**refused, **untested}
    found = [name for name, is_used in refused.items() if is_used]
    if found:
        raise SidelightError(
            f"Probes inside vLLM do not support: {', '.join(found)}. docs/vllm.md says what they "
            "support; turn it off, or serve with the transformers engine."
        )


def _allows_untested() -> bool:
    return os.environ.get(UNTESTED) == "1"
