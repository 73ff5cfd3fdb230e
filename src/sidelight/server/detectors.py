"""The detectors API of the FMS guardrails orchestrator.

Only what a rule flags is a detection, and its score is the probability, so callers need no
threshold.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Header
from pydantic import BaseModel, Field

from sidelight.errors import did_you_mean
from sidelight.models.conversation import Message
from sidelight.policy.decisions import Decision
from sidelight.policy.request import Json, RequestContext
from sidelight.policy.rules import Side
from sidelight.server.checks import as_answer, as_user, check, is_answered
from sidelight.server.errors import DETECTORS, RequestError
from sidelight.server.requests import Route, ServerRequest
from sidelight.server.schemas import (
    MAX_ITEMS,
    ChatMessage,
    IfAny,
    Listed,
    MessageList,
    Name,
    StrictBody,
    Unread,
)
from sidelight.types import Span


class DetectorError(BaseModel):
    """An error in the orchestrator's format; ``code`` is the HTTP status."""

    code: int
    message: str


_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": DetectorError, "description": "Refused; the message says what to do."},
    "5XX": {"model": DetectorError, "description": "Failed, loading, or past its deadline."},
}
router = APIRouter(route_class=Route, prefix=DETECTORS.rstrip("/"), responses=_REFUSALS)
DetectorId = Annotated[
    Name | None, Header(description="Name of a probe. [default: all probes that read the text]")
]


class DetectorParameters(StrictBody):
    """Parameters of a detector, which are ignored: the server's policy has the thresholds."""

    unread: ClassVar[Unread] = {"threshold": None}


class DetectorRequest(StrictBody):
    """The common field of requests."""

    detector_params: DetectorParameters | None = None


class ContentsRequest(DetectorRequest):
    """Independent texts."""

    contents: Listed[str] = Field(min_length=1, max_length=MAX_ITEMS)


class ChatDetectionRequest(DetectorRequest):
    """A conversation."""

    unread: ClassVar[Unread] = {"tools": ()}
    unsupported: ClassVar[str] = "Leave it out: probes do not read tool descriptions."

    messages: MessageList[ChatMessage] = Field(min_length=1)


class GenerationRequest(DetectorRequest):
    """A prompt, and the text that a model has generated."""

    prompt: str
    generated_text: str


class Detection(BaseModel):
    """A label flagged by the probe named in ``detection``."""

    detection: str
    detection_type: str
    score: float


class ContentDetection(Detection):
    """A label that is flagged in a span of a text, or in the whole text."""

    start: int
    end: int
    text: str


class ChatDetection(Detection):
    """A label that is flagged in a conversation.

    ``metadata`` has the ``start`` and ``end`` of a labelled span, and the index of its ``message``
    if there are several.
    """

    metadata: IfAny[dict[str, int]] = None


@router.post("/contents", name="create")
async def detect_in_contents(
    body: ContentsRequest, request: ServerRequest, detector_id: DetectorId = None
) -> list[list[ContentDetection]]:
    """One list per text, empty if nothing is flagged in it."""
    begun = await request.begin([as_user(text) for text in body.contents])
    context = _detecting(begun, detector_id, {"input"})
    is_answer = any(bound.side == "output" for bound in context.chosen)
    # An empty text has nothing to classify.
    texts = {number: text for number, text in enumerate(body.contents) if text}
    turns = [as_answer(text) if is_answer else as_user(text) for text in texts.values()]
    checked = await check(
        request, context, turns, decides_prompt=not is_answer, counts_shadows=not context.chosen
    )
    detected: list[list[ContentDetection]] = [[] for _ in body.contents]
    for (number, text), (_, decisions) in zip(texts.items(), checked, strict=True):
        for fields, span in _flags(context, decisions):
            start, end = (0, len(text)) if span is None else (span.start, span.end)
            found = ContentDetection(**fields, start=start, end=end, text=text[start:end])
            detected[number].append(found)
    return detected


@router.post("/chat", name="create")
async def detect_in_chat(
    body: ChatDetectionRequest, request: ServerRequest, detector_id: DetectorId = None
) -> list[ChatDetection]:
    """Detect in a chat. Probes of prompts read the turns before a response; probes of responses
    read a final response.
    """
    turns = [message.as_message() for message in body.messages]
    sides: set[Side] = {"input", "output"} if is_answered(turns) else {"input"}
    context = _detecting(await request.begin([turns]), detector_id, sides)
    return await _detected(request, context, turns)


@router.post("/generation", name="create")
async def detect_in_generation(
    body: GenerationRequest, request: ServerRequest, detector_id: DetectorId = None
) -> list[ChatDetection]:
    """Detect in a generated text with probes of responses."""
    turns = [Message("user", body.prompt), Message("assistant", body.generated_text)]
    context = _detecting(await request.begin([turns]), detector_id, {"output"})
    if any(bound.side == "input" for bound in context.chosen):
        raise RequestError(
            f"Probe '{detector_id}' reads prompts, not generated texts. Use {DETECTORS}contents, "
            "or name a probe that reads responses.",
            code="no_response_probe",
        )
    if not body.generated_text:
        return []
    return await _detected(request, context, turns, decides_prompt=bool(body.prompt))


async def _detected(
    request: ServerRequest,
    context: RequestContext,
    turns: Sequence[Message],
    *,
    decides_prompt: bool = True,
) -> list[ChatDetection]:
    ((_, decisions),) = await check(
        request, context, [turns], decides_prompt=decides_prompt, counts_shadows=not context.chosen
    )
    return [
        ChatDetection(**fields, metadata=span and _place(span))
        for fields, span in _flags(context, decisions)
    ]


def _place(span: Span) -> dict[str, int]:
    message = {} if span.message is None else {"message": span.message}
    return {"start": span.start, "end": span.end, **message}


def _detecting(
    context: RequestContext, name: str | None, sides: Collection[Side]
) -> RequestContext:
    """A copy that reports the probe with this name, or all probes of the sides if None.

    If no probe is left, probes in shadow mode read these sides, and their verdicts are counted.

    Raises:
        RequestError: The probe does not exist.
    """
    if name is not None:
        chosen = tuple(bound for bound in context.chosen if bound.name == name)
        if not chosen:
            known = [bound.name for bound in context.chosen]
            raise RequestError(
                f"Unknown detector '{name}'.{did_you_mean(name, known)}",
                status=404,
                code="probe_not_found",
                param="detector-id",
            )
        return replace(context, chosen=chosen)
    chosen = tuple(bound for bound in context.chosen if bound.side in sides)
    if not chosen and not any(bound.is_shadow for side in sides for bound in context.on(side)):
        raise RequestError(
            "No probe reads this side of a chat. The contents and chat detectors need a probe "
            "that reads prompts; the generation detector needs a probe that reads responses. "
            "Load one.",
            code="no_prompt_probe" if "input" in sides else "no_response_probe",
        )
    return replace(context, chosen=chosen)


def _flags(
    context: RequestContext, decisions: Iterable[Decision]
) -> Iterator[tuple[Json, Span | None]]:
    """The fields of a ``Detection`` for each visible flag, and its span."""
    for each in context.visible(decisions):
        verdict = each.verdict
        assert verdict is not None, "check refuses a text without one"
        spans = verdict.known_spans
        found = [(span.label, span.probability, span) for span in spans]
        in_spans = {span.label for span in spans}
        found += [
            (label, verdict.probabilities[label], None)
            for label in verdict.labels
            if label not in in_spans
        ]
        for label, score, span in found if verdict.flagged else ():
            yield {"detection": each.probe, "detection_type": label, "score": score}, span
