"""Routes that classify without generating text: OpenAI's moderations, and redaction."""

import asyncio
import uuid
from collections.abc import Collection, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel

from sidelight.engines.base import PromptClassified, verdict_failure
from sidelight.models.conversation import Message, has_response
from sidelight.models.invisible import visible
from sidelight.policy.decisions import Decision
from sidelight.policy.enforcement import check_decisions, checked_decisions
from sidelight.policy.redaction import redacted
from sidelight.policy.request import RequestContext, category_fields
from sidelight.policy.rules import BoundRule, Side
from sidelight.policy.second_stage import SecondStage, redacted_response
from sidelight.server.errors import RequestError
from sidelight.server.observe import RequestTextObserver
from sidelight.server.requests import Route, ServerRequest, unless_left
from sidelight.server.schemas import Extension, TextsRequest
from sidelight.types import Span, Verdicts, spans_json

# Clients send OpenAI's model names by default; here they select every probe.
_OPENAI_MODELS = ("omni-moderation-", "text-moderation-")

router = APIRouter(route_class=Route)
Result = TypeVar("Result")


Checked = tuple[PromptClassified, Sequence[Decision]]
"""One text, and what follows from each chosen probe, of which ``RequestContext`` give what may
be sent.
"""


async def check(
    request: ServerRequest,
    context: RequestContext,
    conversations: Sequence[Sequence[Message]],
    *,
    decides_prompt: bool = True,
    counts_shadows: bool = False,
    tools: Collection[int] | None = None,
    trusted: Collection[int] = (),
    explain: Collection[str] | None = None,
) -> list[Checked]:
    """Classify each conversation with the chosen probes, in one pass each.

    A conversation that ends with an assistant turn is classified by every chosen probe, any other
    only by those that read only the prompt. The work is cancelled when the client disconnects.

    Args:
        request: The request that began with this context, and has awaited nothing since.
        context: Context of the request.
        conversations: Conversations to classify.
        decides_prompt: Whether the turns before the assistant's are classified; if they are
            synthetic, no verdict on them counts.
        counts_shadows: Whether verdicts of probes in shadow mode, which are only counted, suffice.
        tools: Indices of single-text conversations that count as tool results; None means all,
            because their roles are unknown.
        trusted: Indices of conversations to which only redacting rules apply.
        explain: Names of probes whose verdicts to explain; None if not requested.

    Raises:
        VerdictError: A chosen probe gave no verdict.
        RequestError: No chosen probe can classify a conversation. An empty result would look
            harmless.
    """
    if not counts_shadows and not all(map(is_answered, conversations)):
        require_prompt_probe(context)
    invisible = context.policy.invisible_characters
    read = [[replace(turn, invisible=invisible) for turn in turns] for turns in conversations]
    classification = request.engine.classify(read, explain=explain)
    events = await unless_left(request, classification)

    async def decided(index: int, event: PromptClassified) -> Checked:
        turns = conversations[index]
        if len(turns) == 1:
            tool_verdicts = None if tools is None or index in tools else Verdicts()
            event = replace(event, verdicts=replace(event.verdicts, tools=tool_verdicts))
        prompt: set[Side] = {"input"} if decides_prompt else set()
        response: set[Side] = {"output"} if is_answered(turns) else set()
        is_trusted = index in trusted
        rules = [bound for bound in context.rules if not is_trusted or bound.mode == "redact"]
        observer = RequestTextObserver(request.observer, turns)
        decisions = check_decisions(rules, event, prompt | response)
        decisions = await _after_second_stage(context, turns, decisions, observer)
        observer.check(event, [each for each in decisions if each.deferred is None])
        chosen = context.of_chosen(decisions)
        _require_verdicts(f"Text {index} (counted from 0)", turns, event.tokens, chosen)
        return event, chosen

    return [*await unless_left(request, _all(decided(*each) for each in enumerate(events)))]


async def _all(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Gather results; the first failure cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _after_second_stage(
    context: RequestContext,
    turns: Sequence[Message],
    decisions: Sequence[Decision],
    observer: RequestTextObserver,
) -> list[Decision]:
    """Complete the decisions on a conversation with the opinions of judges."""
    if context.judges is None:
        return await checked_decisions(decisions, observer, None)
    shadows = (bound for bound in context.rules if bound.is_shadow)
    asked = {bound.name for bound in (*context.chosen, *shadows)}
    decisions = [d if d.rule.name in asked else replace(d, deferred=None) for d in decisions]
    *prompt, last = turns
    response = None
    if is_answered(turns):
        response = redacted_response(last.content, decisions)
    else:
        prompt = turns
    invisible = context.policy.invisible_characters
    second_stage = SecondStage(context.judges, prompt, decisions, invisible=invisible)
    return await checked_decisions(decisions, observer, second_stage, response)


def require_prompt_probe(context: RequestContext) -> None:
    """Refuse a prompt that no chosen probe reads."""
    if any(bound.side == "input" for bound in context.chosen):
        return
    message = (
        "None of the chosen probes reads prompts only, so none can classify a single text. Load "
        "such a probe, or use /v1/chat/completions."
    )
    if (prompt_rules := context.on("input")) and all(bound.is_shadow for bound in prompt_rules):
        message = (
            "Every probe that reads prompts is in shadow mode, so there is no verdict to report. "
            'Set another mode for one of them in the policy, such as mode = "score".'
        )
    raise RequestError(message, code="no_prompt_probe")


def _require_verdicts(
    which: str, turns: Sequence[Message], tokens: int, decisions: Sequence[Decision]
) -> None:
    """Refuse a text on which a chosen probe has no verdict, and say why."""
    for decision in decisions:
        if decision.is_too_long:
            raise RequestError(
                f"{which} has {tokens} tokens, but the limit of probe '{decision.rule.name}' is "
                f"{decision.rule.rule.max_tokens}. Shorten it, or choose other probes.",
                code="verdict_failed",
            )
    silent = [decision.rule.name for decision in decisions if decision.verdict is None]
    if silent and not any(visible(turn.content) for turn in turns):
        raise RequestError(
            f"{which} is empty, so {', '.join(silent)} has nothing to read. Leave it out, or "
            "choose other probes.",
            code="verdict_failed",
        )
    if silent:
        raise verdict_failure(silent)


def as_user(text: str) -> list[Message]:
    """A plain text as a user message."""
    return [Message("user", text)]


def as_answer(text: str) -> list[Message]:
    """A plain text as a response to an unknown prompt, on which no verdict counts."""
    return [*as_user(""), Message("assistant", text)]


def is_answered(turns: Sequence[Message]) -> bool:
    """Whether there is a response with content; an empty one cannot be classified."""
    return has_response(turns) and bool(turns[-1].content)


class ModerationResult(BaseModel):
    """One text's categories; ``sidelight`` has the verdicts with all their labels."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]
    sidelight: Extension


class Results(BaseModel, Generic[Result]):
    """One result per text, in order."""

    id: str
    model: str
    results: list[Result]


@router.post("/v1/moderations", name="create")
async def moderate(body: TextsRequest, request: ServerRequest) -> Results[ModerationResult]:
    """Classify each text as a user message with the probes that read only the prompt."""
    if body.model is not None and not body.model.startswith(_OPENAI_MODELS):
        request.require_model(body.model)
    texts = [as_user(text) for text in body.input]
    context = await request.begin(texts, body.probes)
    checked = await check(request, context, texts)
    results = [
        ModerationResult(
            **category_fields(context.visible(decisions), context.categories),
            sidelight=Extension(verdicts=context.entries(decisions)),
        )
        for _, decisions in checked
    ]
    return Results(id=f"modr-{uuid.uuid4().hex}", model=request.engine.model, results=results)


class Redaction(BaseModel):
    """A text with placeholders, and the spans that they replace, in the text as sent.

    Spans include probabilities, so only those of rules that disclose scores are listed.
    """

    text: str
    spans: list[dict[str, Any]]


@router.post("/v1/redact", name="create")
async def redact(body: TextsRequest, request: ServerRequest) -> Results[Redaction]:
    """Replace words that probes label with ``[LABEL]``."""
    if body.model is not None:
        request.require_model(body.model)
    texts = [as_user(text) for text in body.input]
    context = await request.begin(texts, body.probes)
    # The replaced words reveal what a probe has found.
    labelling = tuple(
        bound
        for bound in context.chosen
        if bound.probe.spans is not None
        and bound.side == "input"
        and (bound.mode == "redact" or bound.discloses_scores(is_admin=context.is_admin))
    )
    if not labelling or (body.probes and len(labelling) < len(context.chosen)):
        raise RequestError(
            "Redaction needs probes that label spans of prompts and whose scores you may read. "
            f"Chosen: {_listed(context.chosen)}. Usable: {_listed(labelling)}. Serve a probe "
            "that was trained with --spans.",
            code="no_span_probe",
            param="probes",
        )
    # An empty text has nothing to classify.
    nonempty = [index for index, text in enumerate(body.input) if text]
    checked = await check(request, replace(context, chosen=labelling), [texts[i] for i in nonempty])
    results = [Redaction(text="", spans=[]) for _ in texts]
    for index, (_, decisions) in zip(nonempty, checked, strict=True):
        visible_verdicts = (
            d for d in decisions if d.rule.discloses_scores(is_admin=context.is_admin)
        )
        results[index] = Redaction(
            text=redacted(body.input[index], spans_of(decisions)),
            spans=spans_json(spans_of(visible_verdicts)),
        )
    return Results(id=f"redact-{uuid.uuid4().hex}", model=request.engine.model, results=results)


def spans_of(decisions: Iterable[Decision]) -> list[Span]:
    """The spans that these probes have labelled, in order.

    Raises:
        VerdictError: The positions of a probe's spans are unknown.
    """
    every: list[Span] = []
    for decision in decisions:
        if not decision.has_spans:
            raise verdict_failure([decision.rule.name])
        every += decision.spans
    return sorted(every)


def _listed(rules: Iterable[BoundRule]) -> str:
    return ", ".join(bound.name for bound in rules) or "none"
