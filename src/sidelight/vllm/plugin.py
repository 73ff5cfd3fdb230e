"""How our parts get into vLLM: its plugin imports this file, and no other file here does."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor

from sidelight.fingerprint import Fingerprint
from sidelight.vllm.capture import StateWorker
from sidelight.vllm.columns import tap_layers
from sidelight.vllm.guard import EngineGuard
from sidelight.vllm.internals import local_layers, quantisation, share_of_cache, wrap
from sidelight.vllm.settings import (
    CONNECTOR,
    DESCRIBED,
    KEY,
    SHARED_CONNECTOR,
    STATES,
    Served,
    fingerprint_of,
    named_acceptance,
    named_columns,
    named_folders,
    server_config,
)
from sidelight.vllm.support import (
    require_arguments,
    require_no_policy,
    require_policy,
    require_states,
    require_supported,
)
from sidelight.vllm.worker import Worker

_PACKAGE = "sidelight.vllm"
# Part of the key of vLLM's compile cache, so that a graph without our operation is not taken for
# one with it. The probes do not belong in it, since they change no graph.
_GRAPH = {KEY: "taps-1"}


def wrap_vllm() -> None:
    """Wraps vLLM's methods, once per process. If no probes are named, they do nothing more."""
    wrap(AsyncLLM, "__init__", _guard)
    wrap(EngineArgs, "create_engine_config", _configure)
    wrap(BaseModelLoader, "load_model", _load)
    wrap(Executor, "determine_available_memory", _leave_room)


def _configure(original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """The engine's configuration, with our parts named in it."""
    settings = arguments.additional_config.get(KEY, {})
    settings = settings if isinstance(settings, dict) else {}
    folders = named_folders(settings)
    if folders is None:
        require_no_policy(arguments)
        return original(arguments, *args, **kwargs)
    require_arguments(arguments)
    known = settings.get("fingerprint")
    files = Fingerprint(**known) if known else fingerprint_of(arguments.model, folders)
    how = quantisation(arguments)
    served = Served(
        folders,
        files.quantised(how) if how else files,
        is_described=bool(settings.get(DESCRIBED)),
        columns=named_columns(settings),
        accepted=named_acceptance(settings),
        keeps_states=bool(settings.get(STATES)),
    )
    # Loaded here too, since an error in a worker is harder to read.
    probes = served.load()
    if served.keeps_states:
        require_states(arguments)
    elif not served.is_described:
        require_policy(arguments, probes)
    arguments.worker_extension_cls = f"{_PACKAGE}.worker.WorkerExtension"
    _connect(arguments, served)
    config = original(arguments, *args, **kwargs)
    require_supported(config, probes)
    is_async = config.scheduler_config.async_scheduling
    kind = "AsyncProbeScheduler" if is_async else "ProbeScheduler"
    config.scheduler_config.scheduler_cls = f"{_PACKAGE}.connector.{kind}"
    return config


def _connect(arguments: Any, served: Served) -> None:
    """Names our connector in the configuration, beside one that the user has chosen."""
    arguments.additional_config = {**arguments.additional_config, **_GRAPH}
    ours = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": f"{_PACKAGE}.connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": served.to_json(),
    }
    theirs = arguments.kv_transfer_config
    if theirs is not None:
        values = theirs if isinstance(theirs, dict) else vars(theirs)
        known = {field.name for field in fields(KVTransferConfig)} - {"engine_id"}
        beside = {key: value for key, value in values.items() if key in known}
        # vLLM would ask this of ours alone, which can always do it.
        if not KVConnectorFactory.supports_hma_config(KVTransferConfig(**beside)):
            arguments.disable_hybrid_kv_cache_manager = True
        ours = {
            **ours,
            "kv_connector": SHARED_CONNECTOR,
            "kv_role": beside.get("kv_role"),
            "kv_connector_extra_config": {"connectors": [ours, beside]},
        }
    arguments.kv_transfer_config = KVTransferConfig(**ours)


def _load(
    original: Callable[..., Any],
    loader: Any,
    vllm_config: Any,
    model_config: Any,
    prefix: str = "",
) -> Any:
    """The loaded model, with its layers hooked."""
    model = original(loader, vllm_config, model_config, prefix)
    served = Served.of(vllm_config)
    # A draft model guesses tokens; the model that is judged by reads them.
    if served is None or model_config.runner_type == "draft":
        return model
    first, layers = local_layers(model)
    count = tap_layers(layers, reads_embedding=first == 0, width=served.fingerprint.width)
    kind = StateWorker if served.keeps_states else Worker
    kind(
        served,
        layers=range(first, first + count),
        tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        device=next(model.parameters()).device,
    )
    return model


def _leave_room(original: Callable[..., list[int]], executor: Any) -> list[int]:
    """The memory of each worker for keys and values, in bytes, less what their columns will take.

    vLLM gives all the memory of a GPU to its KV cache before a connector can allocate anything.
    """
    available = original(executor)
    if Served.of(executor.vllm_config) is None:
        return available
    columns = executor.collective_rpc("sidelight_bytes_per_token")
    specs = executor.get_kv_cache_specs()
    return [
        int(memory * share_of_cache(*each))
        for memory, *each in zip(available, specs, columns, strict=True)
    ]


def _guard(original: Callable[..., Any], llm: Any, *args: Any, **kwargs: Any) -> None:
    """Puts the policy between the engine client and whatever calls it."""
    original(llm, *args, **kwargs)
    served = Served.of(llm.vllm_config)
    # Our own engine describes its requests, and our own server enforces its policy on them.
    if served is not None and not served.is_described:
        EngineGuard(llm, served, server_config())
