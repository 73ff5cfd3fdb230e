"""Reports in vLLM's outputs, in the process that receives them."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from sidelight.models.conversation import EncodedPrompt
from sidelight.probes.probe import Probe
from sidelight_vllm import KEY
from sidelight_vllm.requests import Report, read_report, request_params


class TextReports:
    """The reports of vLLM's outputs on one text: first on its prompt, then step by step.

    Args:
        revision: Revision of the probes at the start of the request; later ones do not count.
        keeps_steps: Whether to keep all steps, not only the newest report.

    Attributes:
        prompt: The first report, once available.
        taken: Number of tokens of the taken steps.
    """

    def __init__(self, revision: str, *, keeps_steps: bool = False):
        self.prompt: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self._revision, self._keeps_steps = revision, keeps_steps
        self._newest: Mapping[str, Any] | None = None
        self._steps = deque[tuple[int, Mapping[str, Any] | None]]()
        self.taken = 0

    def hear(self, tokens: int, params: Mapping[str, Any] | None) -> None:
        """Add the number of tokens of a step, and the ``kv_transfer_params`` of its output."""
        self._newest = params
        if self._keeps_steps:
            self._steps.append((tokens, params))
        if not self.prompt.done():
            self.prompt.set_result(self._read(params))

    @property
    def newest(self) -> Report:
        """The newest report, or an error report if there is none."""
        return self._read(self._newest)

    def take(self, tokens: int | None) -> Iterator[tuple[int, Report]]:
        """Take the steps that generated the first tokens: the token count after each, and the
        report.

        None takes all; the last step may have no token.
        """
        while self._steps and (tokens is None or self.taken < tokens):
            written, params = self._steps.popleft()
            self.taken += written
            if written:
                yield self.taken, self._read(params)

    def _read(self, params: Mapping[str, Any] | None) -> Report:
        report = read_report(params)
        if report.revision == self._revision:
            return report
        message = "The probes changed during the request."
        return Report(error=report.error or message)


class OutputListener:
    """Receives every report of an engine.

    vLLM merges unread outputs and keeps only the last report; this listens before that.

    Args:
        llm: vLLM's ``AsyncLLM``. The ``process_outputs`` of its output processor is wrapped.

    Attributes:
        generate: vLLM's original method, without policy enforcement.
    """

    def __init__(self, llm: Any):
        self.generate: Callable[..., AsyncGenerator[Any, None]] = llm.generate
        self._processor = llm.output_processor
        self._process = self._processor.process_outputs
        self._texts: dict[str, TextReports] = {}
        self._processor.process_outputs = self._hear

    @contextmanager
    def to(self, request_id: str, reports: TextReports) -> Generator[None]:
        """Receive every report on the request before its outputs can be read."""
        self._texts[request_id] = reports
        try:
            yield
        finally:
            del self._texts[request_id]

    async def read_text(
        self,
        prompt: EncodedPrompt,
        request_id: str,
        *,
        revision: str,
        fields: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Report:
        """Read a text, and return the last step's report.

        Args:
            prompt: Token ids and their roles.
            request_id: A unique id.
            revision: Revision of the probes that must classify it.
            fields: Other fields of vLLM's form of the prompt.
            options: As ``AsyncLLM.generate`` takes them.
        """
        from vllm import SamplingParams

        # vLLM must generate a token.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            extra_args={"kv_transfer_params": request_params(prompt)},
        )
        reports = TextReports(revision)
        with self.to(request_id, reports):
            text = {**(fields or {}), "prompt_token_ids": [*prompt.token_ids]}
            async with aclosing(self.generate(text, params, request_id, **options)) as outputs:
                async for _ in outputs:
                    pass
        return reports.newest

    def _hear(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            # vLLM may still generate for a cancelled request.
            state = self._processor.request_states.get(output.request_id)
            if state is not None and state.external_req_id in self._texts:
                reports = self._texts[state.external_req_id]
                reports.hear(len(output.new_token_ids), output.kv_transfer_params)
        return self._process(outputs, *args, **kwargs)


def prompt_probe_names(probes: Sequence[Probe]) -> frozenset[str]:
    """Names of the probes that read only the prompt."""
    return frozenset(probe.name for probe in probes if not probe.reads.includes_response)


def without_report(output: Any) -> Any:
    """The output without the probes' report."""
    remaining = {k: v for k, v in (output.kv_transfer_params or {}).items() if k != KEY}
    output.kv_transfer_params = remaining or None
    return output
