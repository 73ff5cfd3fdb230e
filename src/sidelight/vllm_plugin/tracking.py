"""Which requests can be judged after a step, and what is known of each: the scheduler's side.

A request is read whole when its prompt ends, whatever part of it was computed before and by whom,
and again from the start when it comes back from preemption. Knows requests, not hidden states.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidelight.errors import SidelightError
from sidelight.prompts import Part
from sidelight.vllm_plugin.panel import Outcome
from sidelight.vllm_plugin.params import KEY, parts_of


@dataclass(frozen=True)
class Step:
    """One request's share of a forward pass.

    Attributes:
        request_id: Whose.
        computed: Tokens of the request that have keys and values after the pass.
        is_resumed: Whether it has come back from preemption with this pass.
        blocks: Gives its block table.
    """

    request_id: str
    computed: int
    is_resumed: bool
    blocks: Callable[[], Sequence[int]]


@dataclass(frozen=True)
class Reading:
    """What a worker reads of a request after a pass.

    Attributes:
        request_id: Whose.
        blocks: Its block table.
        start: First token to read; 0 begins anew.
        parts: What each token from ``start`` on belongs to.
        ends_prompt: Whether the prompt is complete for the first time.
    """

    request_id: str
    blocks: tuple[int, ...]
    start: int
    parts: bytes
    ends_prompt: bool


@dataclass
class _Tracked:
    parts: bytes = b""
    error: str = ""
    read: int = 0
    is_planned: bool = False
    is_judged: bool = False
    seconds: float = 0.0
    outcome: Outcome = field(default_factory=dict[str, dict[str, Any]])


class Tracking:
    """Every request from its arrival to its end.

    Attributes:
        reads_responses: Whether some probe reads what is written.
    """

    def __init__(self, *, reads_responses: bool):
        self.reads_responses = reads_responses
        self._requests: dict[str, _Tracked] = {}

    def enter(
        self, request_id: str, params: Mapping[str, Any] | None, token_ids: Sequence[int] | None
    ) -> None:
        """Takes note of a new request; one whose tokens are not described gets an error."""
        try:
            self._requests[request_id] = _Tracked(parts=parts_of(params, token_ids))
        except SidelightError as error:
            self._requests[request_id] = _Tracked(error=str(error))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def leave(self, request_id: str) -> None:
        """Forgets a request."""
        self._requests.pop(request_id, None)

    def plan(self, steps: Iterable[Step]) -> list[Reading]:
        """What to read after a pass with these steps."""
        readings = (self._read(step) for step in steps)
        return [reading for reading in readings if reading is not None]

    def record(self, request_id: str, outcome: Outcome, seconds: float = 0.0) -> None:
        """Adds verdicts, and the seconds of the step; those of an ended request are dropped."""
        tracked = self._requests.get(request_id)
        if tracked is not None:
            tracked.is_judged = True
            tracked.seconds += seconds
            tracked.outcome = {**tracked.outcome, **outcome}

    def report(self, request_id: str) -> dict[str, Any] | None:
        """What goes on an output of the request; None for one that is not tracked."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return None
        if not tracked.is_judged:
            return {KEY: {"error": tracked.error or "The request was not judged."}}
        return {KEY: {"verdicts": tracked.outcome, "seconds": tracked.seconds}}

    def _read(self, step: Step) -> Reading | None:
        tracked = self._requests.get(step.request_id)
        if tracked is None or tracked.error:
            return None
        if step.is_resumed:
            tracked.read = 0
        if step.computed < len(tracked.parts):
            return None
        # Not whether it has been judged: the next step may be planned before this one has run.
        ends_prompt = not tracked.is_planned
        if not ends_prompt and not self.reads_responses:
            return None
        start = 0 if ends_prompt else tracked.read
        written = max(0, step.computed - max(start, len(tracked.parts)))
        tracked.read, tracked.is_planned = step.computed, True
        return Reading(
            request_id=step.request_id,
            blocks=tuple(step.blocks()),
            start=start,
            parts=tracked.parts[start:] + bytes([Part.RESPONSE]) * written,
            ends_prompt=ends_prompt,
        )
