"""Which requests to read after a step, and what is known of each: the scheduler's side.

A request is read whole when its prompt ends, no matter which part was computed earlier or by
another request, and again from the start after a preemption.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Part
from sidelight.types import Judgement
from sidelight.vllm.columns import Reading
from sidelight.vllm.internals import Step
from sidelight.vllm.settings import KEY, described_prompt, report_of


@dataclass
class _Tracked:
    parts: bytes = b""
    is_plain: bool = False
    error: str = ""
    adapter: str = ""
    path: str = ""
    read: int = 0
    is_planned: bool = False
    is_judged: bool = False
    seconds: float = 0.0
    judgement: Judgement = field(default_factory=Judgement)
    identity: str = ""


class Tracking:
    """Follows every request from its arrival to its end.

    Args:
        prompt_of: Gives the prompt, from a request's ``kv_transfer_params`` and token ids.

    Attributes:
        reads_responses: Whether some probe reads the response.
    """

    def __init__(
        self,
        *,
        reads_responses: bool,
        prompt_of: Callable[
            [Mapping[str, Any] | None, Sequence[int] | None], EncodedPrompt
        ] = described_prompt,
    ):
        self.reads_responses = reads_responses
        self._prompt_of = prompt_of
        self._requests: dict[str, _Tracked] = {}

    def enter(
        self,
        request_id: str,
        params: Mapping[str, Any] | None,
        token_ids: Sequence[int] | None,
        *,
        adapter: str = "",
    ) -> None:
        """Notes a new request. One whose tokens are not known gets an error.

        Args:
            request_id: vLLM's name for it.
            params: Its ``kv_transfer_params``.
            token_ids: Its prompt; None if that is not text alone.
            adapter: The LoRA adapter that it runs with, if any.
        """
        tracked = self._requests[request_id] = _Tracked(adapter=adapter)
        try:
            prompt = self._prompt_of(params, token_ids)
            tracked.parts, tracked.is_plain = bytes(prompt.parts), prompt.is_plain
            tracked.path = str((params or {}).get(KEY, {}).get("path", ""))
        # Ids that the tokenizer does not take must not end the scheduler.
        except (SidelightError, OverflowError, TypeError, ValueError) as error:
            tracked.error = str(error)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def leave(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def plan(self, steps: Iterable[Step]) -> list[Reading]:
        """What to read after a pass with these steps."""
        readings = (self._read(step) for step in steps)
        return [reading for reading in readings if reading is not None]

    def record(
        self, request_id: str, judgement: Judgement, seconds: float = 0.0, identity: str = ""
    ) -> None:
        """Adds verdicts and the seconds of the step, unless the request has ended.

        Args:
            request_id: vLLM's name for it.
            judgement: The verdicts.
            seconds: Those of the step.
            identity: That of the probes which judged.
        """
        tracked = self._requests.get(request_id)
        if tracked is not None:
            tracked.is_judged = True
            tracked.seconds += seconds
            tracked.judgement |= judgement
            tracked.identity = identity

    def report(self, request_id: str) -> dict[str, Any] | None:
        """What goes on an output of the request; None if it is not tracked."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return None
        if not tracked.is_judged:
            return {KEY: {"error": tracked.error or "The request was not judged."}}
        report = report_of(tracked.judgement, tracked.seconds, tracked.identity)
        # Its probes were trained on the model without it.
        return {KEY: {**report, "adapter": tracked.adapter} if tracked.adapter else report}

    def _read(self, step: Step) -> Reading | None:
        tracked = self._requests.get(step.request_id)
        if tracked is None or tracked.error:
            return None
        if step.is_resumed:
            tracked.read = 0
        if step.computed < len(tracked.parts):
            return None
        # Not "is judged": the next step may be planned before this one has run.
        ends_prompt = not tracked.is_planned
        if not ends_prompt and not self.reads_responses:
            return None
        start = 0 if ends_prompt else tracked.read
        written = max(0, step.computed - max(start, len(tracked.parts)))
        tracked.read, tracked.is_planned = step.computed, True
        return Reading(
            request_id=step.request_id,
            blocks=tuple(step.blocks),
            start=start,
            parts=tracked.parts[start:] + bytes([Part.RESPONSE]) * written,
            ends_prompt=ends_prompt,
            is_plain=tracked.is_plain,
            path=tracked.path,
        )
