# pyright: reportMissingImports=false
"""VLLM without a server: many prompts, as fast as it takes them."""

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sidelight.backbones import TransformersBackbone
from sidelight.engines.vllm.loading import require_options, require_vllm
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt
from sidelight.vllm_plugin.settings import KEY

# Prompts that wait in vLLM beside those of the running step, in steps: none of them is half empty.
_STEPS_AHEAD = 2


@dataclass(frozen=True)
class OfflineRequest:
    """A prompt to run once.

    Attributes:
        index: By which the caller knows it.
        prompt: Its tokens.
        params: What the plugin is told of them (``kv_transfer_params``).
    """

    index: int
    prompt: EncodedPrompt
    params: Mapping[str, Any]


class Offline:
    """A running vLLM; ``start`` makes one.

    Args:
        llm: vLLM's ``LLMEngine``.
    """

    def __init__(self, llm: Any):
        self._llm = llm
        self._most_tokens = _STEPS_AHEAD * llm.vllm_config.scheduler_config.max_num_batched_tokens
        self._count = 0

    @classmethod
    def start(
        cls, backbone: TransformersBackbone, config: Mapping[str, Any], options: Mapping[str, Any]
    ) -> "Offline":
        """VLLM on the weights of a backbone.

        Args:
            backbone: Says which weights, and of which dtype.
            config: What the plugin is told.
            options: Fields of vLLM's ``EngineArgs``.

        Raises:
            SidelightError: vLLM is not installed, an option is unknown, or a feature is in use that
                the plugin does not support.
        """
        require_vllm()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        require_options(options, EngineArgs)
        arguments = EngineArgs(
            model=backbone.model.config._name_or_path,  # pyright: ignore[reportPrivateUsage]
            dtype=backbone.fingerprint.dtype,
            disable_log_stats=True,
            additional_config={KEY: dict(config)},
            **{"max_model_len": backbone.encoder.max_tokens, **options},
        )
        return cls(LLMEngine.from_engine_args(arguments))

    def run(self, requests: Iterable[OfflineRequest]) -> Generator[tuple[OfflineRequest, Any]]:
        """Each request with vLLM's output, in the order in which they end.

        Requests are taken as vLLM has room for them; closing the generator cancels those that run.

        Raises:
            SidelightError: vLLM has stopped, or gave up a request.
        """
        coming = iter(requests)
        running: dict[str, OfflineRequest] = {}
        try:
            while self._fill(running, coming):
                for output in self._step():
                    request = running.pop(output.request_id)
                    _require_finished(output)
                    yield request, output
        finally:
            self._llm.abort_request([*running])

    def close(self) -> None:
        """Ends vLLM's processes."""
        self._llm.engine_core.shutdown()

    def _fill(self, running: dict[str, OfflineRequest], coming: Iterable[OfflineRequest]) -> bool:
        """Adds requests while there is room; whether any is running."""
        tokens = sum(len(request.prompt) for request in running.values())
        while tokens < self._most_tokens and (request := next(iter(coming), None)) is not None:
            self._count += 1
            name = str(self._count)
            text = {"prompt_token_ids": list(request.prompt.token_ids)}
            self._llm.add_request(name, text, _sampling(request.params))
            running[name] = request
            tokens += len(request.prompt)
        return bool(running)

    def _step(self) -> list[Any]:
        """The outputs of the requests that end with this step."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return [output for output in self._llm.step() if output.finished]
        except EngineDeadError as error:
            raise SidelightError("vLLM has stopped; its log says why.") from error


def _sampling(params: Mapping[str, Any]) -> Any:
    """One token, which nobody reads: vLLM writes at least one."""
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"kv_transfer_params": dict(params)},
    )


def _require_finished(output: Any) -> None:
    reason = output.outputs[0].finish_reason
    if reason not in ("stop", "length"):
        raise SidelightError(f"vLLM ended a text without reading it ({reason}); its log says why.")
