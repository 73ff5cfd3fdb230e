"""Descriptions of requests on their way into and out of vLLM, and the scheduler's tracking.

Descriptions of prompts and reports of verdicts travel in ``kv_transfer_params``, under ``KEY``.
``Tracking`` follows each request: the whole prompt is read when it is complete, even if part of it
was computed earlier or by another request. After preemption, it is read again from the start if a
probe reads responses.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, repeat
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from sidelight.engines.base import GenerationError
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, TokenRole
from sidelight.types import Verdicts
from sidelight_vllm import KEY
from sidelight_vllm.internals import Step
from sidelight_vllm.settings import ANNOTATED
from sidelight_vllm.slots import GatherPlan


@dataclass(frozen=True)
class PromptDescription:
    """A request's description of its prompt.

    Attributes:
        token_roles: Runs of equal ``TokenRole``: the role, and the number of tokens.
        tokens: Hash of these tokens.
        is_plain: Whether the prompt is plain text.
        path: Where to write hidden states for ``offline``; "" for none.
    """

    token_roles: list[tuple[TokenRole, NonNegativeInt]]
    tokens: str
    is_plain: bool
    path: str = ""


@dataclass(frozen=True)
class Report(Verdicts):
    """The verdicts in one of vLLM's outputs, for the text so far.

    Attributes:
        seconds: Time that the workers spent on it, in seconds.
        revision: Revision of the probes that gave the latest verdict.
        adapter: LoRA adapter that generates the text; "" for none.
        error: Reason for missing verdicts; "" if there are verdicts.
    """

    seconds: float = 0.0
    revision: str = ""
    adapter: str = ""
    error: str = "The request was not classified."

    def require_verdicts(self) -> None:
        """Check that the text has verdicts.

        Raises:
            GenerationError: There are no verdicts.
        """
        if self.error:
            raise GenerationError(
                f"vLLM sent no verdict ({self.error}). Treat the text as unclassified."
            )


_DESCRIPTION, _REPORT = TypeAdapter(PromptDescription), TypeAdapter(Report)


def request_params(prompt: EncodedPrompt, *, path: str = "") -> dict[str, Any]:
    """The ``kv_transfer_params`` of a request with these tokens.

    They go in a request's field, or in ``SamplingParams(extra_args=...)``.
    """
    runs = [(role, len([*same])) for role, same in groupby(prompt.token_roles)]
    tokens = token_hash(prompt.token_ids)
    description = PromptDescription(runs, tokens, prompt.is_plain, path)
    return {KEY: _DESCRIPTION.dump_python(description, mode="json")}


def read_description(params: Mapping[str, Any] | None) -> PromptDescription | None:
    """Read the description in a request's ``kv_transfer_params``; None if there is none.

    Raises:
        SidelightError: The description is malformed.
    """
    if not params or KEY not in params:
        return None
    try:
        return _DESCRIPTION.validate_python(params[KEY])
    except ValidationError as error:
        raise SidelightError(
            f"kv_transfer_params['{KEY}'] is malformed. Correct it, or leave it out."
        ) from error


def annotated_prompt(
    description: PromptDescription | None, token_ids: Sequence[int] | None
) -> EncodedPrompt:
    """The described prompt with these token ids.

    Raises:
        SidelightError: The request does not describe its tokens, or describes different ones.
    """
    if description is None or token_ids is None:
        raise SidelightError(
            f"The request has no kv_transfer_params['{KEY}'] that describes the roles of its "
            f"tokens. Send it, or leave '{ANNOTATED}' out of additional_config['{KEY}']."
        )
    count = sum(count for _, count in description.token_roles)
    # Before they are expanded, because a client may send any number.
    if count != len(token_ids) or description.tokens != token_hash(token_ids):
        raise SidelightError(
            f"kv_transfer_params['{KEY}'] describes different tokens from those that the engine "
            "reads. Encode the messages with the served model's tokenizer and chat template."
        )
    token_roles = chain.from_iterable(repeat(*run) for run in description.token_roles)
    return EncodedPrompt(tuple(token_ids), tuple(token_roles), is_plain=description.is_plain)


def token_hash(token_ids: Sequence[int]) -> str:
    """A short hash of a list of token ids."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=8).hexdigest()


def report_params(report: Report) -> dict[str, Any]:
    """The ``kv_transfer_params`` of an output."""
    return {KEY: _REPORT.dump_python(report, mode="json", exclude_none=True)}


def read_report(params: Mapping[str, Any] | None) -> Report:
    """The inverse of ``report_params``; unreadable data becomes an error report."""
    if not params or KEY not in params:
        return Report(error="the plugin did not run")
    try:
        return _REPORT.validate_python(params[KEY])
    except ValidationError:
        return Report(error="its report is malformed")


@dataclass
class _Tracked:
    """A request in vLLM's scheduler.

    Attributes:
        report: Report for its next output.
        token_roles: ``TokenRole`` of every token of its prompt; None if it cannot be classified.
        path: Where ``offline`` wants its states; "" if it wants none.
        blocks: Its block table so far.
        read: Number of its tokens that have been planned for reading.
        is_planned: Whether its prompt has been, or is about to be, read.
    """

    report: Report
    token_roles: bytes | None = None
    is_plain: bool = False
    path: str = ""
    blocks: list[int] = field(default_factory=list[int])
    read: int = 0
    is_planned: bool = False


class Tracking:
    """Follows every request from its arrival to its end.

    Args:
        recognise: Determines token roles if a request has no description; None requires one. An
            ``EngineGuard`` replaces client descriptions with its own.

    Attributes:
        reads_responses: Whether a probe reads the response.
    """

    def __init__(
        self,
        *,
        reads_responses: bool,
        recognise: Callable[[Sequence[int]], EncodedPrompt] | None = None,
    ):
        self.reads_responses = reads_responses
        self._recognise = recognise
        self._requests: dict[str, _Tracked] = {}

    def enter(
        self,
        request_id: str,
        params: Mapping[str, Any] | None,
        token_ids: Sequence[int] | None,
        *,
        adapter: str = "",
    ) -> None:
        """Add a new request; one with unknown token roles gets an error report.

        Args:
            request_id: vLLM's id of the request.
            params: Its ``kv_transfer_params``.
            token_ids: Its prompt; None if it is not only text.
            adapter: Its LoRA adapter; "" for none.
        """
        tracked = self._requests[request_id] = _Tracked(Report(adapter=adapter))
        try:
            description = read_description(params)
            if description is not None or self._recognise is None:
                prompt = annotated_prompt(description, token_ids)
            elif token_ids is not None:
                prompt = self._recognise(token_ids)
            else:
                raise SidelightError(
                    "Only text can be classified, but the request has images, audio or embeddings."
                )
            tracked.token_roles, tracked.is_plain = bytes(prompt.token_roles), prompt.is_plain
            tracked.path = description.path if description else ""
        # Ids that the tokenizer does not accept must not crash the scheduler.
        except (SidelightError, OverflowError, TypeError, ValueError) as error:
            tracked.report = replace(tracked.report, error=str(error))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def leave(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def plan(self, steps: Iterable[Step]) -> list[GatherPlan]:
        """The gather plans after a pass with these steps."""
        return [plan for step in steps if (plan := self._read(step)) is not None]

    def record(
        self, request_id: str, verdicts: Verdicts, seconds: float = 0.0, revision: str = ""
    ) -> None:
        """Add a step's verdicts, seconds and probes, unless the request has ended."""
        tracked = self._requests.get(request_id)
        if tracked is not None:
            before = tracked.report
            seconds += before.seconds
            tracked.report = replace(
                before, **vars(before | verdicts), seconds=seconds, revision=revision, error=""
            )

    def report(self, request_id: str) -> dict[str, Any] | None:
        """The report for an output of the request; None if it is not tracked."""
        tracked = self._requests.get(request_id)
        return None if tracked is None else report_params(tracked.report)

    def _read(self, step: Step) -> GatherPlan | None:
        tracked = self._requests.get(step.request_id)
        if tracked is None or tracked.token_roles is None:
            return None
        if step.is_resumed:
            tracked.read, tracked.blocks = 0, []
        tracked.blocks += step.blocks
        if step.computed < len(tracked.token_roles):
            return None
        # Not "is classified", because the next step may be planned before this one has run.
        ends_prompt = not tracked.is_planned
        if not ends_prompt and not self.reads_responses:
            return None
        start = 0 if ends_prompt else tracked.read
        written = max(0, step.computed - max(start, len(tracked.token_roles)))
        tracked.read, tracked.is_planned = step.computed, True
        return GatherPlan(
            request_id=step.request_id,
            blocks=tuple(tracked.blocks),
            start=start,
            token_roles=tracked.token_roles[start:] + bytes([TokenRole.RESPONSE]) * written,
            ends_prompt=ends_prompt,
            is_plain=tracked.is_plain,
            path=tracked.path,
        )
