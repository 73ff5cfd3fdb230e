"""What is said of a request on its way into vLLM and out, and the scheduler's side of it.

Descriptions of prompts and reports of verdicts travel in ``kv_transfer_params``, under ``KEY``.
``Tracking`` follows each request: it is read whole when its prompt ends, no matter which part was
computed earlier or by another request. After a preemption it is read again from the start if some
probe reads responses.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, repeat
from typing import Any

from sidelight.engines.base import GenerationError
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Part
from sidelight.types import Judgement, Verdict
from sidelight.vllm.columns import Reading
from sidelight.vllm.internals import Step
from sidelight.vllm.settings import DESCRIBED, KEY


def request_params(prompt: EncodedPrompt) -> dict[str, Any]:
    """The ``kv_transfer_params`` of a request that carries these tokens.

    They go in a request's field, or in ``SamplingParams(extra_args=...)``.
    """
    runs = [[int(part), len(list(same))] for part, same in groupby(prompt.parts)]
    tokens = token_hash(prompt.token_ids)
    return {KEY: {"parts": runs, "tokens": tokens, "is_plain": prompt.is_plain}}


def described_prompt(
    params: Mapping[str, Any] | None, token_ids: Sequence[int] | None
) -> EncodedPrompt:
    """The inverse of ``request_params``, of the token ids that the engine runs.

    Raises:
        SidelightError: The request does not describe its tokens, or describes other ones.
    """
    description = (params or {}).get(KEY)
    if description is None or token_ids is None:
        raise SidelightError(
            f"The request has no kv_transfer_params['{KEY}'] to say what its tokens belong to. "
            f"Give it, or leave '{DESCRIBED}' out of additional_config['{KEY}']."
        )
    try:
        runs = [(Part(part), int(count)) for part, count in description["parts"]]
        counts = [count for _, count in runs]
        # Before they are written out: whoever describes the tokens may give any number.
        if min(counts, default=0) < 0 or sum(counts) != len(token_ids):
            runs = []
        parts = tuple(chain.from_iterable(repeat(*run) for run in runs))
        matches = description["tokens"] == token_hash(token_ids) and len(parts) == len(token_ids)
        prompt = EncodedPrompt(tuple(token_ids), parts, is_plain=bool(description["is_plain"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SidelightError(f"kv_transfer_params['{KEY}'] is malformed.") from error
    if not matches:
        raise SidelightError(
            f"kv_transfer_params['{KEY}'] describes other tokens than the engine reads. Encode the "
            "messages with the served model's tokenizer and chat template."
        )
    return prompt


def token_hash(token_ids: Sequence[int]) -> str:
    """A short name for a list of token ids."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=8).hexdigest()


def report_of(judgement: Judgement, seconds: float, identity: str = "") -> dict[str, Any]:
    """The report under ``KEY`` in an output's ``kv_transfer_params``.

    It has what the probes of this identity say so far, and how long the workers took for it.
    """
    verdicts: dict[str, Any] = {
        verdict.probe: {
            name: value
            for name, value in vars(verdict).items()
            if name != "probe" and value is not None
        }
        for verdict in judgement.verdicts
    }
    failed = {name: {"error": "verdict_failed"} for name in judgement.failed}
    labels = {name: [*map(list, each)] for name, each in judgement.token_labels.items()}
    said = {"verdicts": verdicts | failed, "seconds": seconds, "identity": identity}
    if judgement.tools is not None:
        said["tools"] = report_of(judgement.tools, seconds)
    return {**said, "token_labels": labels} if labels else said


def judgement_of(params: Mapping[str, Any] | None) -> tuple[Judgement, float]:
    """The inverse of ``report_of``, from an output's ``kv_transfer_params``.

    Raises:
        GenerationError: They hold no verdict, so the request must not pass for judged.
    """
    report = (params or {}).get(KEY, {})
    if "verdicts" not in report:
        raise GenerationError(
            f"vLLM sent no verdict ({report.get('error', 'the plugin did not run')}). Treat the "
            "text as not judged."
        )
    by_probe: Mapping[str, Any] = report["verdicts"]
    failed = tuple(name for name, fields in by_probe.items() if "error" in fields)
    verdicts = (
        Verdict(name, **(fields | {"labels": tuple(fields["labels"])}))
        for name, fields in by_probe.items()
        if "error" not in fields
    )
    labels = {
        name: [(token, label, score) for token, label, score in each]
        for name, each in report.get("token_labels", {}).items()
    }
    tools = judgement_of({KEY: report["tools"]})[0] if "tools" in report else None
    return Judgement(tuple(verdicts), failed, labels, tools), report.get("seconds", 0.0)


PromptReader = Callable[[Mapping[str, Any] | None, Sequence[int] | None], EncodedPrompt]
"""Gives the prompt from a request's ``kv_transfer_params`` and token ids."""


@dataclass
class _Tracked:
    """A request that vLLM's scheduler holds.

    Attributes:
        adapter: The LoRA adapter that it runs with; "" for none.
        error: Why it cannot be judged; "" if it can.
        parts: The ``Part`` of every token of its prompt.
        path: Where ``offline`` wants its states; "" if it wants none.
        blocks: Its block table so far.
        read: How many of its tokens have been planned to be read.
        is_planned: Whether its prompt has been, or is about to be read.
        judgement: What the probes have said so far; None: nothing.
        identity: That of the probes that gave the latest verdict.
    """

    adapter: str = ""
    error: str = ""
    parts: bytes = b""
    is_plain: bool = False
    path: str = ""
    blocks: list[int] = field(default_factory=list[int])
    read: int = 0
    is_planned: bool = False
    judgement: Judgement | None = None
    seconds: float = 0.0
    identity: str = ""


class Tracking:
    """Follows every request from its arrival to its end.

    Attributes:
        reads_responses: Whether some probe reads the response.
    """

    def __init__(self, *, reads_responses: bool, prompt_of: PromptReader = described_prompt):
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
            adapter: The LoRA adapter that it runs with; "" for none.
        """
        tracked = self._requests[request_id] = _Tracked(adapter)
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
        """The readings after a pass with these steps."""
        readings = (self._read(step) for step in steps)
        return [reading for reading in readings if reading is not None]

    def record(
        self, request_id: str, judgement: Judgement, seconds: float = 0.0, identity: str = ""
    ) -> None:
        """Adds a step's verdicts and seconds, and who judged, unless the request has ended."""
        tracked = self._requests.get(request_id)
        if tracked is not None:
            tracked.seconds += seconds
            tracked.judgement = (tracked.judgement or Judgement()) | judgement
            tracked.identity = identity

    def report(self, request_id: str) -> dict[str, Any] | None:
        """The report for an output of the request; None if it is not tracked."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return None
        if tracked.judgement is None:
            return {KEY: {"error": tracked.error or "The request was not judged."}}
        report = report_of(tracked.judgement, tracked.seconds, tracked.identity)
        # Its probes were trained on the model without it.
        return {KEY: {**report, "adapter": tracked.adapter} if tracked.adapter else report}

    def _read(self, step: Step) -> Reading | None:
        tracked = self._requests.get(step.request_id)
        if tracked is None or tracked.error:
            return None
        if step.is_resumed:
            tracked.read, tracked.blocks = 0, []
        tracked.blocks += step.blocks
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
            blocks=tuple(tracked.blocks),
            start=start,
            parts=tracked.parts[start:] + bytes([Part.RESPONSE]) * written,
            ends_prompt=ends_prompt,
            is_plain=tracked.is_plain,
            path=tracked.path,
        )
