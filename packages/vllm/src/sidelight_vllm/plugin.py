"""Installation of our parts in vLLM, and the checks at startup.

Only ``install`` imports this file, once probes are named.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from vllm import envs
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor

from sidelight.errors import SidelightError
from sidelight.models.fingerprint import ACCEPTED, Fingerprint, accepted_copy
from sidelight.policy.rules import bound_rules, require_policy_applies
from sidelight.probes.probe import Probe
from sidelight_vllm import ENVIRONMENT, KEY, POLICY, TESTED
from sidelight_vllm.guard import EngineGuard
from sidelight_vllm.internals import (
    guesses_responses,
    local_layers,
    quantisation,
    share_of_cache,
    wrap,
)
from sidelight_vllm.settings import (
    ANNOTATED,
    CONNECTOR,
    PROJECTIONS,
    SHARED_CONNECTOR,
    STATES,
    Served,
    fingerprint_of,
    found_folders,
    log,
    named_folders,
    reserved_projections,
    server_config,
)
from sidelight_vllm.slots import tap_layers
from sidelight_vllm.worker import Worker

_PACKAGE = "sidelight_vllm"
# Part of the key of vLLM's compile cache, so that a graph without our operations is not reused. The
# probes are not part of the key, because they do not change the graph.
_GRAPH = {KEY: "taps-1"}

UNTESTED = "SIDELIGHT_VLLM_UNTESTED"
"""Set it to 1 to allow versions, devices and architectures that have not been tested."""
ARCHITECTURES = {
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Glm4ForCausalLM",
    "Glm4MoeForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "Llama4ForCausalLM",
    "LlamaForCausalLM", "Mistral3ForConditionalGeneration", "MistralForCausalLM",
    "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
}  # fmt: skip
"""Each has a parity test (``tests/matrix/vllm/test_families.py``)."""
_SEVERAL_STREAMS = {
    "DeepseekV4ForCausalLM", "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration",
}  # fmt: skip
# Those that read a checkpoint's safetensors files; "dummy", random weights, is for benchmarks.
_LOAD_FORMATS = {
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "runai_streamer",
    "dummy",
}  # fmt: skip


def wrap_vllm() -> None:
    """Wrap vLLM's methods, once per process. Without probes, they do nothing more."""
    wrap(AsyncLLM, "__init__", _guard)
    wrap(EngineArgs, "create_engine_config", _configure)
    wrap(BaseModelLoader, "load_model", _load)
    wrap(Executor, "determine_available_memory", _leave_room)


def _configure(original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """Create the engine's configuration, with our parts added."""
    settings = arguments.additional_config.get(KEY, {})
    settings = settings if isinstance(settings, dict) else {}
    if unknown := settings.keys() - {"probes", "fingerprint", ANNOTATED, STATES}:
        raise SidelightError(
            f"additional_config['{KEY}'] has {', '.join(sorted(unknown))}, but accepts only "
            f"'probes'. Set {PROJECTIONS} or {ACCEPTED} in the environment instead."
        )
    folders = named_folders(settings)
    if folders is None:
        if os.environ.get(POLICY) and isinstance(arguments, AsyncEngineArgs):
            raise SidelightError(
                f"{POLICY} is set, but no probe is named, so nothing would be checked. Name the "
                f"folders of the probes in {ENVIRONMENT}, or unset {POLICY}."
            )
        return original(arguments, *args, **kwargs)
    require_arguments(arguments)
    served = _served(arguments, settings, folders)
    # Loaded here too, because an error in a worker is harder to read.
    probes = served.load().probes
    if served.keeps_states:
        require_states(arguments)
    elif not served.is_annotated:
        require_policy(arguments, probes)
    arguments.worker_extension_cls = f"{_PACKAGE}.worker.WorkerExtension"
    _connect(arguments, served)
    config = original(arguments, *args, **kwargs)
    require_supported(config, probes)
    is_async = config.scheduler_config.async_scheduling
    kind = "AsyncProbeScheduler" if is_async else "ProbeScheduler"
    config.scheduler_config.scheduler_cls = f"{_PACKAGE}.connector.{kind}"
    return config


def _served(arguments: Any, settings: Mapping[str, Any], folders: tuple[str, ...]) -> Served:
    """The served probes and model of the engine."""
    folders = found_folders(arguments.model, folders)
    fingerprint = settings.get("fingerprint")
    files = Fingerprint(**fingerprint) if fingerprint else fingerprint_of(arguments.model, folders)
    how = quantisation(arguments)
    return Served(
        folders,
        files.quantised(how) if how else files,
        is_annotated=bool(settings.get(ANNOTATED)),
        projections=reserved_projections(),
        accepted=accepted_copy(),
        keeps_states=bool(settings.get(STATES)),
    )


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
        names = {field.name for field in fields(KVTransferConfig)} - {"engine_id"}
        beside = {name: value for name, value in values.items() if name in names}
        # vLLM would query only our connector, which always supports it.
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
    """Load the model, and hook its layers."""
    model = original(loader, vllm_config, model_config, prefix)
    served = Served.of(vllm_config)
    # A draft model proposes tokens; the target model reads them.
    if served is None or model_config.runner_type == "draft":
        return model
    first, layers = local_layers(model)
    count = tap_layers(layers, reads_embedding=first == 0, width=served.fingerprint.width)
    kind = Worker
    if served.keeps_states:
        # It brings what trains.
        from sidelight_vllm.offline import StateWorker

        kind = StateWorker
    kind(
        served,
        layers=range(first, first + count),
        tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        device=next(model.parameters()).device,
    )
    return model


def _leave_room(original: Callable[..., list[int]], executor: Any) -> list[int]:
    """Memory of each worker for keys and values in bytes, less the memory for projections.

    vLLM gives all the memory of a GPU to its KV cache before a connector can allocate anything.
    """
    available = original(executor)
    if Served.of(executor.vllm_config) is None:
        return available
    probe_bytes = executor.collective_rpc("sidelight_bytes_per_token")
    specs = executor.get_kv_cache_specs()
    return [
        int(memory * share_of_cache(*each))
        for memory, *each in zip(available, specs, probe_bytes, strict=True)
    ]


def _guard(original: Callable[..., Any], llm: Any, *args: Any, **kwargs: Any) -> None:
    """Put the policy between the engine client and its callers."""
    original(llm, *args, **kwargs)
    served = Served.of(llm.vllm_config)
    # Our own engine describes its requests, and our own server enforces its policy on them.
    if served is not None and not served.is_annotated:
        EngineGuard(llm, served, server_config())


def require_arguments(arguments: Any) -> None:
    """Check vLLM's version, and that no option replaces our parts."""
    if Version(vllm.__version__) not in SpecifierSet(TESTED) and not _allows_untested():
        raise SidelightError(
            f"This is vLLM {vllm.__version__}, but probes inside vLLM were tested with {TESTED}. "
            "Install such a version, or serve with the transformers engine. To use this version "
            f"anyway, set {UNTESTED}=1 and compare the verdicts with 'sidelight parity'."
        )
    _refuse(
        {
            # It is short for a --kv-transfer-config.
            "--kv-offloading-size": arguments.kv_offloading_size,
            "--scheduler-cls": arguments.scheduler_cls,
            "--worker-extension-cls": arguments.worker_extension_cls,
        },
        f"Probes inside vLLM set {{}} themselves. Leave it out, or unset {ENVIRONMENT}.",
    )
    _refuse(
        {
            "--revision": arguments.revision,
            "--tokenizer": arguments.tokenizer not in (None, arguments.model),
            "--tokenizer-revision": arguments.tokenizer_revision,
            "--hf-config-path": arguments.hf_config_path,
            f"--load-format {arguments.load_format}": arguments.load_format not in _LOAD_FORMATS,
        },
        "Probes inside vLLM belong to a model with its own tokenizer and configuration and with "
        "weights in safetensors files, so {} cannot be used. Name a folder that contains the files "
        "you want.",
    )


def require_policy(arguments: Any, probes: Sequence[Probe]) -> None:
    """Check that the policy fits the probes, and that it and the keys will be enforced."""
    config, is_server = server_config(), isinstance(arguments, AsyncEngineArgs)
    require_policy_applies(config.loaded_policy, probes)
    plugins = os.environ.get("VLLM_PLUGINS", "").split(",")
    if is_server and config.access.keys and KEY not in plugins:
        raise SidelightError(
            "SIDELIGHT_API_KEY is set, but the server would not check it, because vLLM loads the "
            "check only if VLLM_PLUGINS names it. Set VLLM_PLUGINS=sidelight."
        )
    rules = bound_rules(config.loaded_policy, probes)
    if not is_server and any(bound.is_enforced for bound in rules):
        raise SidelightError(
            f"{POLICY} blocks or redacts, but vLLM's LLM class returns its outputs directly to "
            f"the caller. Unset {POLICY}, or use a server."
        )


def require_states(arguments: Any) -> None:
    """Check that hidden states may be written, and belong to the unmodified model."""
    # Requests name the files that are written.
    if isinstance(arguments, AsyncEngineArgs):
        raise SidelightError(
            "Hidden states can be stored only offline. Use vLLM's LLM or LLMEngine, not a server."
        )
    if how := quantisation(arguments):
        raise SidelightError(
            "Training needs the hidden states of the model as stored, but vLLM is set to "
            f"quantise it while loading ({how}). Leave that out, or train on a quantised "
            "checkpoint."
        )


def require_supported(config: Any, probes: Sequence[Probe]) -> None:
    """Check that every feature in use is tested, so that nothing is served unclassified."""
    parallel, architecture = config.parallel_config, config.model_config.architecture
    speculation = getattr(config.speculative_config, "method", None)
    refused = {
        "probes of the response under speculative decoding": guesses_responses(config, probes),
        "dual batch overlap": parallel.enable_dbo,
        # Each worker has the states of some tokens.
        "sequence-parallel experts": parallel.use_sequence_parallel_moe,
        # Layers skip tokens whose keys and values they share.
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        # Projections would be lost with the released memory.
        "--enable-sleep-mode": config.model_config.enable_sleep_mode,
        # Probes would run on weights that were not checked against their fingerprint.
        "--weight-transfer-config": config.weight_transfer_config is not None,
        "VLLM_FLOAT32_MATMUL_PRECISION other than highest": envs.VLLM_FLOAT32_MATMUL_PRECISION
        != "highest",
        # It serves clients without the plugin.
        "VLLM_USE_RUST_FRONTEND": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0",
        f"the architecture {architecture}, which has several residual streams": architecture
        in _SEVERAL_STREAMS,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "--hf-overrides": bool(config.model_config.hf_overrides),
        "a pooling model": config.model_config.runner_type != "generate",
    }
    untested = {
        f"the device {config.device_config.device_type}": config.device_config.device_type
        not in ("cpu", "cuda"),
        f"the architecture {architecture}": architecture not in ARCHITECTURES,
        # On an Ampere GPU, it replaces the tap's matmuls by TF32 ones with ten bits.
        "VLLM_BATCH_INVARIANT": envs.VLLM_BATCH_INVARIANT,
        f"speculative decoding by {speculation}": speculation
        and speculation not in ("ngram", "draft_model"),
    }
    _refuse(
        refused if _allows_untested() else {**refused, **untested},
        "Probes inside vLLM do not support: {}. docs/vllm.md says what they support; turn it off, "
        "or serve with the transformers engine.",
    )
    _warn_of_gpus(config)


def _warn_of_gpus(config: Any) -> None:
    if config.device_config.device_type != "cpu":
        log.warning(
            "Probes inside vLLM have never run on a GPU. Before you rely on a verdict, measure "
            "this machine: 'sidelight bench gpu --out gpu-check' (30 minutes)."
        )


def _refuse(options: Mapping[str, Any], message: str) -> None:
    """Refuse the options that are set; the message names them."""
    if names := ", ".join(name for name, value in options.items() if value):
        raise SidelightError(message.format(names))


def _allows_untested() -> bool:
    return os.environ.get(UNTESTED) == "1"
