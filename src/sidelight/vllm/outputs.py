"""vLLM's outputs in the process that takes them: what they report of their texts."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt
from sidelight.vllm.requests import request_params
from sidelight.vllm.settings import KEY

Listener = Callable[[int, Mapping[str, Any]], object]
"""Takes how many tokens a step has written, and the ``kv_transfer_params`` of its output."""


class OutputListener:
    """Hears every report of an engine.

    vLLM merges outputs that have not been read yet, and keeps only the last report. This listens
    before that.

    Args:
        llm: vLLM's ``AsyncLLM``. The ``process_outputs`` of its output processor is wrapped.

    Attributes:
        generate: vLLM's own, which enforces no policy.
    """

    def __init__(self, llm: Any):
        self.generate: Callable[..., AsyncGenerator[Any, None]] = llm.generate
        self._processor = llm.output_processor
        self._process = self._processor.process_outputs
        self._listeners: dict[str, tuple[str, Listener]] = {}
        self._processor.process_outputs = self._hear

    @contextmanager
    def to(self, request_id: str, identity: str, listener: Listener) -> Generator[None]:
        """Gives the listener every report on the request before its outputs can be read.

        A verdict by probes of another identity becomes an error.
        """
        self._listeners[request_id] = identity, listener
        try:
            yield
        finally:
            del self._listeners[request_id]

    async def read_whole(
        self,
        prompt: EncodedPrompt,
        request_id: str,
        *,
        identity: str,
        fields: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Mapping[str, Any] | None:
        """Has a text read; what the last step reports, or None if there was none.

        Args:
            prompt: The token ids, and what they belong to.
            request_id: Unique.
            identity: That of the probes which are to judge it.
            fields: What else vLLM's form of the prompt has.
            options: As ``AsyncLLM.generate`` takes them.
        """
        from vllm import SamplingParams

        # vLLM has to write a token.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            extra_args={"kv_transfer_params": request_params(prompt)},
        )
        reports: list[Mapping[str, Any]] = []
        with self.to(request_id, identity, lambda _, report: reports.append(report)):
            text = {**(fields or {}), "prompt_token_ids": [*prompt.token_ids]}
            async with aclosing(self.generate(text, params, request_id, **options)) as outputs:
                async for _ in outputs:
                    pass
        return reports[-1] if reports else None

    def _hear(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            # vLLM may still write for a request that has been cancelled.
            state = self._processor.request_states.get(output.request_id)
            if state is not None and state.external_req_id in self._listeners:
                identity, listener = self._listeners[state.external_req_id]
                report = (output.kv_transfer_params or {}).get(KEY, {})
                if "verdicts" in report and report.get("identity") != identity:
                    error = "Other probes have judged than those that the request began with."
                    report = {"error": error}
                listener(len(output.new_token_ids), {KEY: report})
        return self._process(outputs, *args, **kwargs)


def early_names(probes: Sequence[Probe]) -> frozenset[str]:
    """Names of the probes that read the prompt alone."""
    return frozenset(probe.name for probe in probes if not probe.reads.includes_response)


def without_report(output: Any) -> Any:
    """The output without the probes' report."""
    kept = {k: v for k, v in (output.kv_transfer_params or {}).items() if k != KEY}
    output.kv_transfer_params = kept or None
    return output
