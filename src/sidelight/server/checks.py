"""The endpoints that judge texts and write none, as OpenAI and LiteLLM define them."""

import json
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sidelight.engines.base import PromptJudged, verdict_failure
from sidelight.policy.decisions import Decision
from sidelight.policy.enforcement import check_decisions
from sidelight.policy.redaction import Placeholders, without_placeholders
from sidelight.policy.request import Terms, category_fields
from sidelight.policy.rules import BoundRule, Side
from sidelight.prompts.conversation import Message, has_response
from sidelight.server.errors import RequestError
from sidelight.server.observe import RequestTextObserver
from sidelight.server.requests import Route, ServerRequest, unless_left
from sidelight.server.schemas import (
    Extension,
    IfAny,
    Many,
    ProbeNames,
    StrictBody,
    TextsRequest,
    ToolCall,
)
from sidelight.types import Span, spans_json

# Clients send OpenAI's own names by default; here they mean: every probe.
_OPENAI_MODELS = ("omni-moderation-", "text-moderation-")

router = APIRouter(route_class=Route)
Result = TypeVar("Result")


Checked = tuple[PromptJudged, Sequence[Decision]]
"""One text, and what follows from each chosen probe, of which ``Terms`` give what may be sent."""


async def check(
    request: ServerRequest,
    terms: Terms,
    conversations: Sequence[Sequence[Message]],
    *,
    judges_prompt: bool = True,
    explain: Collection[str] | None = None,
) -> list[Checked]:
    """The verdicts of the chosen probes on each conversation, from one pass each.

    A conversation that ends with the assistant's turn is judged by every chosen probe, any other by
    those that read the prompt alone. The work ends when the request's client leaves.

    Args:
        request: Which begins with these terms, and has awaited nothing since.
        terms: What holds for it.
        conversations: To judge.
        judges_prompt: Whether the turns before the assistant's are judged; if they are made up, no
            verdict on them counts.
        explain: Names of probes whose verdicts are explained; None: the client does not ask.

    Raises:
        VerdictError: A chosen probe gave no verdict.
        RequestError: No chosen probe can judge one of them. An empty answer would look harmless.
    """
    if all(bound.side == "output" for bound in terms.chosen):
        for turns in conversations:
            if not is_answered(turns):
                raise RequestError(
                    "No chosen probe reads a prompt alone, so none can judge a text by itself. "
                    "Load such a probe, or use /v1/chat/completions.",
                    code="no_prompt_probe",
                )
    judging = request.engine.judge(conversations, explain=explain)
    events = await unless_left(request, judging)
    checked: list[Checked] = []
    for index, (event, turns) in enumerate(zip(events, conversations, strict=True)):
        if len(turns) == 1:
            # A text by itself, whoever wrote it.
            event = replace(event, judgement=replace(event.judgement, tools=None))
        prompt: set[Side] = {"input"} if judges_prompt else set()
        response: set[Side] = {"output"} if is_answered(turns) else set()
        decisions = check_decisions(terms.rules, event, prompt | response)
        RequestTextObserver(request.observer, turns).check(event, decisions)
        chosen = terms.of_chosen(decisions)
        _require_verdicts(f"Text {index} (counted from 0)", turns, event.tokens, chosen)
        checked.append((event, chosen))
    return checked


def _require_verdicts(
    which: str, turns: Sequence[Message], tokens: int, decisions: Sequence[Decision]
) -> None:
    """Refuses a text on which a chosen probe has no verdict, and says why."""
    for decision in decisions:
        if decision.is_too_long:
            raise RequestError(
                f"{which} has {tokens} tokens, but probe '{decision.rule.name}' may judge at most "
                f"{decision.rule.rule.max_tokens}. Shorten it, or choose other probes.",
                code="verdict_failed",
            )
    silent = [decision.rule.name for decision in decisions if decision.verdict is None]
    if silent and not any(turn.content for turn in turns):
        raise RequestError(
            f"{which} is empty, so {', '.join(silent)} has nothing to read. Leave it out, or "
            "choose other probes.",
            code="verdict_failed",
        )
    if silent:
        raise verdict_failure(silent)


def as_user(text: str) -> list[Message]:
    """A bare text as a user's message."""
    return [Message("user", text)]


def is_answered(turns: Sequence[Message]) -> bool:
    """Whether it has a response that says something; an empty one cannot be judged."""
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
    """Each text is judged as a user's message, by the probes that read the prompt alone."""
    if body.model is not None and not body.model.startswith(_OPENAI_MODELS):
        request.require_model(body.model)
    texts = [as_user(text) for text in body.input]
    terms = await request.begin(texts, body.probes)
    terms = terms.require_disclosed(are_named=body.probes is not None)
    checked = await check(request, terms, texts)
    results = [
        ModerationResult(
            **category_fields(terms.disclosed(decisions), terms.categories),
            sidelight=Extension(verdicts=terms.entries(decisions)),
        )
        for _, decisions in checked
    ]
    return Results(id=f"modr-{uuid.uuid4().hex}", model=request.engine.model, results=results)


class Redaction(BaseModel):
    """A text with its placeholders, and the spans that they stand for, in the text as sent.

    Spans have probabilities, so only those of rules that disclose scores are there.
    """

    text: str
    spans: list[dict[str, Any]]


@router.post("/v1/redact", name="create")
async def redact(body: TextsRequest, request: ServerRequest) -> Results[Redaction]:
    """Words that probes label become ``[LABEL_1]``: equal words alike in all texts of a request."""
    if body.model is not None:
        request.require_model(body.model)
    texts = [as_user(text) for text in body.input]
    terms = await request.begin(texts, body.probes)
    # What is replaced says which words a probe has found.
    labelling = tuple(
        bound
        for bound in terms.chosen
        if bound.probe.spans is not None
        and bound.side == "input"
        and (bound.mode == "redact" or bound.disclosed_part(sees_all=terms.sees_all) == "scores")
    )
    if not labelling or (body.probes and len(labelling) < len(terms.chosen)):
        raise RequestError(
            "Words are replaced by probes that label spans of prompts, and that the policy lets "
            f"you read. Got {_listed(terms.chosen)}, of which these can: {_listed(labelling)}. "
            "Serve one that was trained with --spans.",
            code="no_span_probe",
            param="probes",
        )
    # An empty text has nothing to judge.
    judged = [index for index, text in enumerate(body.input) if text]
    checked = await check(request, replace(terms, chosen=labelling), [texts[i] for i in judged])
    results = [Redaction(text="", spans=[]) for _ in texts]
    found = [
        _spans_of(body.input[index], decisions)
        for index, (_, decisions) in zip(judged, checked, strict=True)
    ]
    placeholders = Placeholders()
    for index, spans in zip(judged, found, strict=True):
        placeholders.read(body.input[index], spans)
    for index, spans, (_, decisions) in zip(judged, found, checked, strict=True):
        parts = [d.rule.disclosed_part(sees_all=terms.sees_all) for d in decisions]
        told = (d for d, part in zip(decisions, parts, strict=True) if part == "scores")
        results[index] = Redaction(
            text=placeholders.mask(body.input[index], spans),
            spans=spans_json(_spans_of(body.input[index], told)),
        )
    return Results(id=f"redact-{uuid.uuid4().hex}", model=request.engine.model, results=results)


def _spans_of(text: str, decisions: Iterable[Decision]) -> list[Span]:
    """The words that these probes have labelled, in order.

    Raises:
        VerdictError: Nobody knows where those of a probe stand.
    """
    every: list[Span] = []
    labels: list[str] = []
    for decision in decisions:
        if decision.verdict is None or decision.verdict.spans is None:
            raise verdict_failure([decision.rule.name])
        every += decision.verdict.spans
        labels += decision.rule.probe.task.output_labels
    return without_placeholders(text, sorted(every), labels)


def _listed(rules: Iterable[BoundRule]) -> str:
    return ", ".join(bound.name for bound in rules) or "none"


class GuardrailParameters(StrictBody):
    """The parameters that a proxy's configuration passes to this guardrail."""

    probes: ProbeNames = None


class GuardrailRequest(StrictBody):
    """Texts and tool calls of a request or of its response.

    Images cannot be judged, so they are refused. A proxy sends more, which is not read. LiteLLM
    sends the messages of a request, whose texts are judged, and never those before a response.
    """

    model_config = ConfigDict(extra="ignore")

    input_type: Literal["request", "response"]
    texts: Many[str] = None
    tool_calls: Many[ToolCall] = None
    images: list[Any] | None = Field(
        None, max_length=0, description="Must be empty: probes read text only."
    )
    structured_messages: list[dict[str, Any]] | None = Field(
        None, description="Where `texts` stand: which of them the model wrote."
    )
    additional_provider_specific_params: GuardrailParameters | None = None

    @model_validator(mode="after")
    def _require_content(self) -> "GuardrailRequest":
        # A proxy that sends texts in another field would have all of them passed.
        if self.texts is None and self.tool_calls is None:
            raise RequestError(
                "Got neither 'texts' nor 'tool_calls', so there is nothing to judge. Send 'texts'.",
                code="missing_parameter",
                param="texts",
            )
        return self

    def judged(self) -> dict[int, str]:
        """The texts, then the calls, by number; empty ones have nothing to judge."""
        functions = [call.function for call in self.tool_calls or ()]
        calls = ["\n".join(filter(None, (f.name, f.arguments))) for f in functions]
        return {i: text for i, text in enumerate((*(self.texts or ()), *calls)) if text}

    def placeholders(self, spans: Mapping[str, Sequence[Span]]) -> Placeholders:
        """Placeholders of the labelled words of each text, which has read all of the request."""
        placeholders = Placeholders(is_answer=self.input_type == "response")
        for message in self.structured_messages or ():
            content, is_written = message.get("content"), message.get("role") == "assistant"
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            texts = [text for text in texts if isinstance(text, str)]
            # Calls of tools may repeat a placeholder, and parts of a message may make up one.
            whole = json.dumps(message, ensure_ascii=False) + "".join(texts)
            placeholders.read(whole, is_written=is_written)
            for text in texts:
                placeholders.read(text, spans.get(text, ()), is_written=is_written)
        for text, own in spans.items():
            placeholders.read(text, own)
        return placeholders


class GuardrailResponse(BaseModel):
    """``BLOCKED`` if a probe flags a text, else ``NONE``.

    ``GUARDRAIL_INTERVENED`` if a rule redacts: then ``texts`` are what is to be sent on. Of a text
    that is still being written, ``stream_holdback_chars`` are to wait for what follows.
    """

    action: Literal["BLOCKED", "GUARDRAIL_INTERVENED", "NONE"]
    blocked_reason: str | None
    texts: IfAny[list[str]] = None
    stream_holdback_chars: IfAny[list[int]] = None
    sidelight: Extension


@router.post("/beta/litellm_basic_guardrail_api", name="create")
async def guard(body: GuardrailRequest, request: ServerRequest) -> GuardrailResponse:
    """Texts of a request are judged as users' messages, those of a response as answers.

    The answer has ``texts`` only if a rule redacts: a proxy keeps its own.
    """
    parameters = body.additional_provider_specific_params or GuardrailParameters()
    is_response = body.input_type == "response"
    judged = body.judged()
    texts = [
        [*as_user(""), Message("assistant", text)] if is_response else as_user(text)
        for text in judged.values()
    ]
    terms = await request.begin(texts, parameters.probes)
    if is_response:
        late = tuple(bound for bound in terms.chosen if bound.side == "output")
        if not late:
            raise RequestError(
                "No chosen probe reads a response, so none can judge this one. Load such a probe, "
                "or use this guardrail in mode pre_call only.",
                code="no_response_probe",
            )
        terms = replace(terms, chosen=late)
    checked = await check(request, terms, texts, judges_prompt=not is_response)
    redacts = any(bound.mode == "redact" for bound in terms.chosen)
    masked, flagged = _interventions(body, [decisions for _, decisions in checked])
    is_masked = not flagged and masked != (body.texts or [])
    return GuardrailResponse(
        action="BLOCKED" if flagged else "GUARDRAIL_INTERVENED" if is_masked else "NONE",
        blocked_reason=f"Flagged by {', '.join(flagged)}." if flagged else None,
        texts=masked if is_masked else None,
        # The next words may label the last ones anew, so a proxy sends a text once it is whole.
        stream_holdback_chars=[*map(len, masked)] if is_response and redacts else None,
        sidelight=Extension(
            verdicts=[entry for _, decisions in checked for entry in terms.entries(decisions)]
        ),
    )


def _interventions(
    body: GuardrailRequest, decisions: Sequence[Sequence[Decision]]
) -> tuple[list[str], list[str]]:
    """The texts with placeholders for what rules redact, and the probes that flag one.

    Args:
        body: The texts and calls.
        decisions: On each that was judged, in order.
    """
    judged = body.judged()
    pairs = [*zip(judged.items(), decisions, strict=True)]
    spans = {
        text: _spans_of(text, [d for d in own if d.rule.mode == "redact"])
        for (_, text), own in pairs
    }
    masked, placeholders = [*(body.texts or ())], body.placeholders(spans)
    flagged: list[str] = []
    for (index, text), own in pairs:
        if index < len(masked):
            masked[index] = placeholders.mask(text, spans[text])
        elif spans[text]:
            # The protocol has no way to send a call on in other words.
            flagged += [d.rule.name for d in own if d.action == "redact"]
        flagged += [
            d.rule.name
            for d in own
            if d.rule.mode != "redact" and d.verdict is not None and d.verdict.flagged
        ]
    return masked, [*dict.fromkeys(flagged)]
