"""What of vLLM is tested, and what is refused at the start."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
from collections.abc import Mapping, Sequence
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logger import init_logger

import vllm
from sidelight.errors import SidelightError
from sidelight.policy.rules import bound_rules, require_policy_applies
from sidelight.probe import Probe
from sidelight.vllm.internals import guesses_responses, quantisation
from sidelight.vllm.settings import ENVIRONMENT, KEY, POLICY, server_config
from vllm import envs

_log = init_logger("vllm.sidelight")

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


def require_arguments(arguments: Any) -> None:
    """Checks vLLM's version, and that nothing in its ``EngineArgs`` takes the place of our parts.

    Raises:
        SidelightError: The version is not tested, an option is one that we set, or the files by
            which the model is identified are not those that vLLM loads.
    """
    if Version(vllm.__version__) not in TESTED and not _allows_untested():
        raise SidelightError(
            f"This is vLLM {vllm.__version__}; probes inside vLLM were tested with {TESTED}. "
            f"Install such a version, serve with the transformers engine, or set {UNTESTED}=1 and "
            "compare with 'sidelight parity'."
        )
    if names := _used(
        {
            # It is short for a --kv-transfer-config.
            "--kv-offloading-size": arguments.kv_offloading_size,
            "--scheduler-cls": arguments.scheduler_cls,
            "--worker-extension-cls": arguments.worker_extension_cls,
        }
    ):
        raise SidelightError(
            f"Probes inside vLLM set {names} themselves. Leave it out, or unset {ENVIRONMENT}."
        )
    if names := _used(
        {
            "--revision": arguments.revision,
            "--tokenizer": arguments.tokenizer not in (None, arguments.model),
            "--tokenizer-revision": arguments.tokenizer_revision,
            "--hf-config-path": arguments.hf_config_path,
            f"--load-format {arguments.load_format}": arguments.load_format not in _LOAD_FORMATS,
        }
    ):
        raise SidelightError(
            f"Probes inside vLLM belong to a model with its own tokenizer and configuration, and "
            f"weights in safetensors files, so {names} cannot be used. Name a folder that has the "
            "files you want."
        )


def require_no_policy(arguments: Any) -> None:
    """Checks that nobody counts on a policy where no probe is named."""
    if os.environ.get(POLICY) and isinstance(arguments, AsyncEngineArgs):
        raise SidelightError(
            f"{POLICY} is set, but no probe is named, so everything would pass. Name the folders "
            f"of the probes in {ENVIRONMENT}, or unset {POLICY}."
        )


def require_policy(arguments: Any, probes: Sequence[Probe]) -> None:
    """Checks that the policy fits the probes, and that what enforces it and the keys is there."""
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
            f"{POLICY} blocks, and vLLM's LLM class gives its outputs to whoever calls it. "
            "Unset it, or use a server."
        )


def require_states(arguments: Any) -> None:
    """Checks that hidden states may be written, and are those of the model's files.

    Raises:
        SidelightError: Requests, which name the files that are written, could come from a network,
            or vLLM quantises the model.
    """
    if isinstance(arguments, AsyncEngineArgs):
        raise SidelightError(
            "Hidden states are kept offline only. Use vLLM's LLM or LLMEngine, not a server."
        )
    if how := quantisation(arguments):
        raise SidelightError(
            f"Hidden states for training are those of the model's files, but vLLM is to quantise "
            f"what it loads ({how}). Leave that out, or train on a quantised checkpoint."
        )


def require_supported(config: Any, probes: Sequence[Probe]) -> None:
    """Checks that a test covers every feature in use, so that nothing is served unjudged."""
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
    if names := _used(refused):
        raise SidelightError(
            f"Probes inside vLLM do not support: {names}. docs/vllm.md says what they support; "
            "turn it off, or serve with the transformers engine."
        )
    if config.device_config.device_type != "cpu":
        _log.warning(
            "Probes inside vLLM have not run on a GPU yet. On CPUs, verdicts were compared with "
            "those of transformers, under every schedule that the tests draw; kernels, captured "
            "graphs and copies between devices are written and have never run. Before you rely on "
            "a verdict, measure this machine: 'sidelight bench gpu --out gpu-check', or 'make "
            "gpu-check' in the repository (25 minutes)."
        )


def _used(options: Mapping[str, Any]) -> str:
    """Names of those that are set, with commas."""
    return ", ".join(name for name, value in options.items() if value)


def _allows_untested() -> bool:
    return os.environ.get(UNTESTED) == "1"
