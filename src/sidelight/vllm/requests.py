"""The reports on requests in vLLM, in the process that takes its outputs."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt
from sidelight.vllm.internals import texts_of
from sidelight.vllm.settings import KEY, request_params

# ``AsyncLLM.generate`` of a prompt, sampling parameters and an id.
Generate = Callable[[Any, Any, str], AsyncGenerator[Any, None]]


@dataclass(frozen=True)
class StepReport:
    """One step's report on one text.

    Attributes:
        text: The text's index in its request.
        tokens: How many tokens the step has written.
        params: The ``kv_transfer_params`` of its output.
    """

    text: int
    tokens: int
    params: Mapping[str, Any] | None


class OutputListener:
    """Hears every report of an engine, in the process that takes its outputs.

    vLLM merges outputs that have not been read yet, also those of several texts of a request, and
    keeps only the last report. This listens before that.

    Args:
        processor: vLLM's ``OutputProcessor``. Its ``process_outputs`` is wrapped.
    """

    def __init__(self, processor: Any):
        self._processor = processor
        self._process = processor.process_outputs
        self._listeners: dict[str, tuple[str, Callable[[StepReport], object]]] = {}
        processor.process_outputs = self._hear

    @contextmanager
    def to(
        self, request_id: str, identity: str, listener: Callable[[StepReport], object]
    ) -> Generator[None]:
        """Gives the listener every report on the request before its outputs can be read.

        Args:
            request_id: The caller's name for it.
            identity: That of the probes which are to judge it; what others say is no verdict.
            listener: Takes the reports.
        """
        self._listeners[request_id] = identity, listener
        try:
            yield
        finally:
            del self._listeners[request_id]

    def _hear(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for name, text, output in texts_of(self._processor, outputs):
            if name in self._listeners:
                identity, listener = self._listeners[name]
                params = _by_these(identity, output.kv_transfer_params)
                listener(StepReport(text, len(output.new_token_ids), params))
        return self._process(outputs, *args, **kwargs)


def _by_these(identity: str, params: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The report, unless other probes than these have judged."""
    report = (params or {}).get(KEY, {})
    if "verdicts" not in report or report.get("identity") == identity:
        return params
    return {KEY: {"error": "Other probes have judged than those that the request began with."}}


def listener_of(processor: Any) -> OutputListener:
    """The one listener to an engine's ``OutputProcessor``."""
    found = getattr(processor.process_outputs, "__self__", None)
    return found if isinstance(found, OutputListener) else OutputListener(processor)


async def read_whole(
    generate: Generate,
    listener: OutputListener,
    tokens: Mapping[str, Any],
    prompt: EncodedPrompt,
    request_id: str,
    *,
    identity: str,
) -> StepReport | None:
    """Has a text read; the report of the last step, or None if there was none.

    Args:
        generate: Runs it.
        listener: Hears the reports.
        tokens: The text as vLLM takes it, but for its token ids.
        prompt: The token ids, and what they belong to.
        request_id: Unique.
        identity: That of the probes which are to judge it.
    """
    from vllm import SamplingParams

    # vLLM has to write a token.
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        extra_args={"kv_transfer_params": request_params(prompt)},
    )
    reports: list[StepReport] = []
    with listener.to(request_id, identity, reports.append):
        text = {**tokens, "prompt_token_ids": [*prompt.token_ids]}
        async with aclosing(generate(text, params, request_id)) as outputs:
            async for _ in outputs:
                pass
    return reports[-1] if reports else None


def early_names(probes: Sequence[Probe]) -> frozenset[str]:
    """Names of the probes that read the prompt alone."""
    return frozenset(probe.name for probe in probes if not probe.reads.includes_response)
