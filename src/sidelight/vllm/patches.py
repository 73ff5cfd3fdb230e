"""Everything that we use of vLLM beyond its documentation, and what is refused.

Tested with the versions in ``TESTED``. Four methods are wrapped. Around
``AsyncLLM.__init__`` an ``EngineGuard`` is put between the client and its callers; around
``EngineArgs.create_engine_config`` our connector, scheduler and worker extension are named in the
configuration; around ``BaseModelLoader.load_model`` the layers are hooked before they are compiled.
Around ``Executor.determine_available_memory`` room is left for the probes' columns. The guard wraps
``BeamSearchOnlineMixin.beam_search``. Also used:
``ForwardContext.slot_mapping`` (``pass_slots``), the specifications of the KV cache
(``keeps_every_token``), ``Scheduler.update_from_output`` (connector), and
``OutputProcessor.process_outputs`` with the ``external_req_id`` and ``request_index`` of its
``request_states`` (requests); ``RequestOutput.add`` and ``merge_async_iterators`` (outputs);
``ResponsesResponse.from_request`` and the state's ``online_renderer`` (endpoint).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import wraps
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor

from sidelight.artifact import load_probe
from sidelight.errors import SidelightError
from sidelight.fingerprint import Fingerprint
from sidelight.policy.rules import bound_rules, require_policy_applies
from sidelight.probe import Probe
from sidelight.vllm.quantised import admitted, named_report, quantisation, served_fingerprint
from sidelight.vllm.settings import (
    CAPTURE,
    DESCRIBED,
    ENVIRONMENT,
    KEY,
    POLICY,
    Captured,
    Served,
    fingerprint_of,
    named_columns,
    named_folders,
    server_config,
)

TESTED = SpecifierSet(">=0.32,<0.34")
UNTESTED = "SIDELIGHT_VLLM_UNTESTED"
"""Set it to 1 to allow versions, devices and architectures that have not been tested."""
DEVICES = frozenset({"cpu", "cuda"})
ARCHITECTURES = frozenset(
    {
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Glm4ForCausalLM",
        "Glm4MoeForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "Llama4ForCausalLM",
        "LlamaForCausalLM",
        "Mistral3ForConditionalGeneration",
        "MistralForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
"""Each has a parity test (``tests/matrix/vllm/test_families.py``)."""
_SEVERAL_STREAMS = {
    "DeepseekV4ForCausalLM", "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration",
}  # fmt: skip
_SPECULATION = {"ngram", "draft_model"}
# Those that read a checkpoint's safetensors files; "dummy", random weights, is for benchmarks.
_LOAD_FORMATS = {
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "runai_streamer",
    "dummy",
}  # fmt: skip

CONNECTOR = "ProbeConnector"
SHARED_CONNECTOR = "SharedConnector"
CAPTURE_CONNECTOR = "CaptureConnector"
_PACKAGE = "sidelight.vllm"
# Part of the key of vLLM's compile cache, so that a graph without our operation is not taken for
# one with it. The probes do not belong in it, since they change no graph.
_GRAPH = {KEY: "taps-1"}


def install() -> None:
    """Wraps the methods, once per process. If no probes are named, they do nothing more.

    vLLM calls it in each of its processes, by the entry point in ``sidelight.vllm``.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.abstract import Executor

    _wrap(AsyncLLM, "__init__", _guard)
    _wrap(EngineArgs, "create_engine_config", _configure)
    _wrap(BaseModelLoader, "load_model", _load)
    _wrap(Executor, "determine_available_memory", _leave_room)


def served_by(vllm_config: Any) -> Served | None:
    """The probes that a configuration names; None if the plugin is not part of it."""
    transfer = vllm_config.kv_transfer_config
    name = transfer and transfer.kv_connector
    if name == SHARED_CONNECTOR:
        ours = transfer.kv_connector_extra_config["connectors"][0]
        return Served.from_json(ours["kv_connector_extra_config"])
    return Served.from_json(transfer.kv_connector_extra_config) if name == CONNECTOR else None


def captured_by(vllm_config: Any) -> Captured | None:
    """The hidden states that a configuration keeps; None if it keeps none."""
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
    """The engine's configuration, with our parts named in it."""
    given = arguments.additional_config.get(KEY, {})
    given = given if isinstance(given, dict) else {}
    folders = named_folders(given)
    captured = Captured(**given[CAPTURE]) if CAPTURE in given else None
    if captured is None and folders is None:
        _require_no_policy(arguments)
        return original(arguments, *args, **kwargs)
    _require_version()
    _require_free(arguments, is_captured=captured is not None)
    _require_identified(arguments)
    probes: list[Probe] = []
    if captured is not None:
        _require_offline(arguments)
        if how := quantisation(arguments):
            raise SidelightError(
                f"Hidden states for training are those of the model's files, but vLLM is to "
                f"quantise what it loads ({how}). Leave that out, or train on a quantised "
                "checkpoint."
            )
        _connect(arguments, CAPTURE_CONNECTOR, asdict(captured))
    else:
        served = _served(arguments, folders or (), given)
        # Loaded here too, since an error in a worker is harder to read.
        probes = served.load()
        if not served.is_described:
            _require_policy(arguments, probes)
        arguments.worker_extension_cls = f"{_PACKAGE}.worker.WorkerExtension"
        _connect(arguments, CONNECTOR, served.to_json())
    config = original(arguments, *args, **kwargs)
    require_supported(config, probes)
    if captured is None:
        is_async = config.scheduler_config.async_scheduling
        kind = "AsyncProbeScheduler" if is_async else "ProbeScheduler"
        config.scheduler_config.scheduler_cls = f"{_PACKAGE}.connector.{kind}"
    elif config.cache_config.enable_prefix_caching:
        raise SidelightError(
            "Tokens from vLLM's prefix cache have no hidden states to keep. Leave "
            "enable_prefix_caching out."
        )
    return config


def _guard(original: Callable[..., Any], llm: Any, *args: Any, **kwargs: Any) -> None:
    """Puts the policy between the engine client and whatever calls it."""
    original(llm, *args, **kwargs)
    served = served_by(llm.vllm_config)
    # Our own engine describes its requests, and our own server enforces its policy on them.
    if served is not None and not served.is_described:
        from sidelight.vllm.guard import EngineGuard

        EngineGuard(llm, served, server_config())


def guard_beams() -> None:
    """Has each beam search ask the guard of its engine, whatever calls it."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    _wrap(BeamSearchOnlineMixin, "beam_search", _search_beams)


def _search_beams(original: Callable[..., Any], serving: Any, *args: Any, **kwargs: Any) -> Any:
    guard = getattr(serving.engine_client, "sidelight_guard", None)
    if guard is not None:
        guard.require_no_beams()
    return original(serving, *args, **kwargs)


def _connect(arguments: Any, name: str, extra: dict[str, Any]) -> None:
    """Names our connector in the configuration, beside one that the user has chosen."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    arguments.additional_config = {**arguments.additional_config, **_GRAPH}
    ours = {
        "kv_connector": name,
        "kv_connector_module_path": f"{_PACKAGE}.connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": extra,
    }
    theirs = arguments.kv_transfer_config
    if theirs is not None:
        given = theirs if isinstance(theirs, dict) else vars(theirs)
        known = {own.name for own in fields(KVTransferConfig)} - {"engine_id"}
        beside = {key: value for key, value in given.items() if key in known}
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


def _served(arguments: Any, folders: tuple[str, ...], given: dict[str, Any]) -> Served:
    known = given.get("fingerprint")
    files = Fingerprint(**known) if known else fingerprint_of(arguments.model, folders)
    model = served_fingerprint(files, arguments)
    probes = [load_probe(folder) for folder in folders]
    own = admitted(probes, model, named_report(given))
    copies = [now.version for was, now in zip(probes, own, strict=True) if now is not was]
    is_described = bool(given.get(DESCRIBED))
    return Served(folders, model, is_described, named_columns(given), tuple(copies))


def _load(
    original: Callable[..., Any],
    loader: Any,
    vllm_config: Any,
    model_config: Any,
    prefix: str = "",
) -> Any:
    """The loaded model, with its layers hooked."""
    model = original(loader, vllm_config, model_config, prefix)
    if model_config.runner_type == "draft":
        # It guesses tokens; the model that is judged by reads them.
        return model
    served, captured = served_by(vllm_config), captured_by(vllm_config)
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    device = next(model.parameters()).device
    if served is not None:
        from sidelight.vllm import worker

        layers = _tap(model, served.fingerprint.width)
        worker.INSTALLED.put(worker.Worker(served, layers=layers, tokens=tokens, device=device))
    if captured is not None:
        from sidelight.vllm import capture
        from sidelight.vllm.taps import set_receiver

        layers, dtype = _tap(model, captured.width), model_config.dtype
        recorder = capture.Recorder(
            layers, tokens=tokens, width=captured.width, dtype=dtype, device=device
        )
        capture.INSTALLED.put(recorder)
        set_receiver(recorder)
    return model


def _leave_room(original: Callable[..., list[int]], executor: Any) -> list[int]:
    """The memory of each worker for keys and values, in bytes, less what their columns will take.

    vLLM gives all the memory of a GPU to its KV cache before a connector can allocate anything.
    """
    available = original(executor)
    if served_by(executor.vllm_config) is None:
        return available
    columns = executor.collective_rpc("sidelight_bytes_per_token")
    shares: list[float] = []
    for own, specs in zip(columns, executor.get_kv_cache_specs(), strict=True):
        # A block holds keys and values of one kind of layer, at least those of the rarest kind.
        kinds: dict[Any, int] = defaultdict(int)
        for spec in specs.values():
            kinds[True if keeps_every_token(spec) else spec] += spec.page_size_bytes
        full = next(filter(keeps_every_token, specs.values()), None)
        needed = own * full.block_size if full is not None else 0
        shares.append(min(kinds.values()) / (min(kinds.values()) + needed) if kinds else 1.0)
    return [int(memory * share) for memory, share in zip(available, shares, strict=True)]


def keeps_every_token(spec: Any) -> bool:
    """Whether a layer with this specification of its KV cache has a slot for every token."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    # Other classes made from these forget tokens, or keep something else.
    return type(spec) in (FullAttentionSpec, MLAAttentionSpec)


def pass_slots(attention: str) -> Tensor | None:
    """The KV slots of the tokens of the current forward pass; None if it fills no cache.

    Args:
        attention: The attention layer whose slots are wanted.
    """
    from vllm.forward_context import get_forward_context

    mappings = get_forward_context().slot_mapping
    return mappings[attention] if mappings else None


def require_slots(slots: Tensor, tokens: int) -> None:
    """Checks that each row of the residual stream has a slot.

    Raises:
        SidelightError: The rows are others, such as those of one of several workers.
    """
    if len(slots) != tokens:
        raise SidelightError(
            f"The layers of this model give {tokens} states for {len(slots)} tokens, so Sidelight "
            "cannot tell them apart. Serve it without sequence parallelism, or with the "
            "transformers engine."
        )


def _tap(model: Any, width: int) -> range:
    """Hooks the layers of this worker; returns the range of hidden states that they give."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.model_executor.models.utils import PPMissingLayer

    from sidelight.vllm.taps import tap_layers

    # Of a multimodal model, the part that reads text.
    text = model.get_language_model() if hasattr(model, "get_language_model") else model
    decoder = getattr(text, "model", text)
    layers = enumerate(decoder.layers, 1)
    local = {number: one for number, one in layers if not isinstance(one, PPMissingLayer)}
    is_first = get_pp_group().is_first_rank
    start = 0 if is_first else min(local)
    count = tap_layers([*local.values()], reads_embedding=is_first, width=width)
    return range(start, start + count)


def _require_version() -> None:
    from vllm import __version__

    if Version(__version__) not in TESTED and not _allows_untested():
        raise SidelightError(
            f"This is vLLM {__version__}; probes inside vLLM were tested with {TESTED}. Install "
            f"such a version, serve with the transformers engine, or set {UNTESTED}=1 and compare "
            "with 'sidelight parity'."
        )


def _require_free(arguments: Any, *, is_captured: bool) -> None:
    """Checks that the user has not set the options that we set."""
    taken = {
        "--kv-transfer-config": is_captured and arguments.kv_transfer_config,
        # It is short for a --kv-transfer-config.
        "--kv-offloading-size": arguments.kv_offloading_size,
        "--scheduler-cls": arguments.scheduler_cls,
        "--worker-extension-cls": arguments.worker_extension_cls,
    }
    names = [name for name, value in taken.items() if value]
    if names:
        raise SidelightError(
            f"Probes inside vLLM set {', '.join(names)} themselves. Leave it out, or unset "
            "SIDELIGHT_PROBES."
        )


def _require_identified(arguments: Any) -> None:
    """Checks that the files by which the model is identified are those that vLLM loads."""
    others = {
        "--revision": arguments.revision,
        "--tokenizer": arguments.tokenizer not in (None, arguments.model),
        "--tokenizer-revision": arguments.tokenizer_revision,
        "--hf-config-path": arguments.hf_config_path,
        f"--load-format {arguments.load_format}": arguments.load_format not in _LOAD_FORMATS,
    }
    names = [name for name, is_given in others.items() if is_given]
    if names:
        raise SidelightError(
            f"Probes inside vLLM belong to a model with its own tokenizer and configuration, and "
            f"weights in safetensors files, so {', '.join(names)} cannot be used. Name a folder "
            "that has the files you want."
        )


def _require_no_policy(arguments: Any) -> None:
    """Checks that nobody counts on a policy where no probe is named."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    if os.environ.get(POLICY) and isinstance(arguments, AsyncEngineArgs):
        raise SidelightError(
            f"{POLICY} is set, but no probe is named, so everything would pass. Name the folders "
            f"of the probes in {ENVIRONMENT}, or unset {POLICY}."
        )


def _require_policy(arguments: Any, probes: Sequence[Probe]) -> None:
    """Checks that the policy fits the probes, and that what enforces it and the keys is there."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    config, is_server = server_config(), isinstance(arguments, AsyncEngineArgs)
    policy = config.loaded_policy
    require_policy_applies(policy, probes)
    is_blocking = any(bound.is_blocking for bound in bound_rules(policy, probes))
    plugins = os.environ.get("VLLM_PLUGINS", "").split(",")
    if is_server and config.access.keys and KEY not in plugins:
        raise SidelightError(
            "SIDELIGHT_API_KEY is set, but the server would not ask for it: vLLM loads what asks "
            "only if VLLM_PLUGINS names it. Set VLLM_PLUGINS=sidelight."
        )
    if is_blocking and not is_server:
        raise SidelightError(
            "SIDELIGHT_POLICY blocks, and vLLM's LLM class gives its outputs to whoever calls it. "
            "Unset it, or use a server."
        )


def _require_offline(arguments: Any) -> None:
    """Requests name the files that states are written to, so they must not come from a network."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    if isinstance(arguments, AsyncEngineArgs):
        raise SidelightError(
            "Hidden states are kept offline only. Use vLLM's LLM or LLMEngine, not a server."
        )


def guesses_responses(config: Any, probes: Sequence[Probe]) -> bool:
    """Whether a step also runs guessed tokens, which may never become part of a response read."""
    is_guessing = getattr(config.speculative_config, "method", None) is not None
    return is_guessing and any(probe.reads.includes_response for probe in probes)


def require_supported(config: Any, probes: Sequence[Probe]) -> None:
    """Checks that a test covers every feature in use, so that nothing is served unjudged."""
    from vllm import envs

    parallel, architecture = config.parallel_config, config.model_config.architecture
    speculation = getattr(config.speculative_config, "method", None)
    refused = {
        "probes of the response under speculative decoding": guesses_responses(config, probes),
        "dual batch overlap": parallel.enable_dbo,
        # Each worker has the states of some tokens.
        "sequence-parallel experts": parallel.use_sequence_parallel_moe,
        # Layers skip tokens whose keys and values they share.
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        # The columns would be lost with the memory that is given up.
        "--enable-sleep-mode": config.model_config.enable_sleep_mode,
        # Probes would judge by weights that nobody has compared with their own.
        "--weight-transfer-config": config.weight_transfer_config is not None,
        "VLLM_FLOAT32_MATMUL_PRECISION other than highest": envs.VLLM_FLOAT32_MATMUL_PRECISION
        != "highest",
        # It answers clients without the plugin.
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
        not in DEVICES,
        f"the architecture {architecture}": architecture not in ARCHITECTURES,
        f"speculative decoding by {speculation}": speculation and speculation not in _SPECULATION,
    }
    if not _allows_untested():
        refused = {**refused, **untested}
    found = [name for name, is_used in refused.items() if is_used]
    if found:
        raise SidelightError(
            f"Probes inside vLLM do not support: {', '.join(found)}. docs/vllm.md says what they "
            "support; turn it off, or serve with the transformers engine."
        )
    if config.device_config.device_type != "cpu":
        _warn_of_gpu()


def _warn_of_gpu() -> None:
    from vllm.logger import init_logger

    init_logger("vllm.sidelight").warning(
        "Probes inside vLLM have not run on a GPU yet. On CPUs, verdicts were compared with those "
        "of transformers, under every schedule that the tests draw; kernels, captured graphs and "
        "copies between devices are written and have never run. Before you rely on a verdict, "
        "measure this machine: 'sidelight bench gpu --out gpu-check', or 'make gpu-check' in the "
        "repository (25 minutes)."
    )


def _allows_untested() -> bool:
    return os.environ.get(UNTESTED) == "1"
