"""The endpoints that judge texts and write none, as OpenAI, vLLM and LiteLLM define them."""

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sidelight.engines.base import verdict_failure
from sidelight.explanation import Explanation
from sidelight.policy.enforcement import check_decisions
from sidelight.policy.request import Terms, category_fields, verdict_json
from sidelight.policy.rules import Side
from sidelight.prompts import Message, has_response
from sidelight.server.errors import RequestError
from sidelight.server.requests import Route, ServerRequest, unless_left
from sidelight.server.schemas import (
    Extension,
    Listed,
    ModerationRequest,
    Name,
    ProbeNames,
    StrictBody,
    Texts,
    ToolCall,
)
from sidelight.types import Verdict

# Clients send OpenAI's own names by default; here they mean: every probe.
_OPENAI_MODELS = ("omni-moderation-", "text-moderation-")

router = APIRouter(route_class=Route)


@dataclass(frozen=True)
class Checked:
    """What the chosen probes say of one text.

    Attributes:
        verdicts: As the client may see them.
        flagged: Names of those that flag it, also if the client does not see their verdicts.
        tokens: How many were read.
        explanations: Of the probes that were named for it.
    """

    verdicts: Sequence[Verdict]
    flagged: Sequence[str]
    tokens: int
    explanations: Sequence[Explanation]


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
        prompt: set[Side] = {"input"} if judges_prompt else set()
        response: set[Side] = {"output"} if is_answered(turns) else set()
        decisions = check_decisions(terms.rules, event, prompt | response)
        request.observer.text(turns).check(event, decisions)
        chosen = terms.reported(decisions)
        for decision in chosen:
            if decision.is_too_long:
                raise RequestError(
                    f"Text {index} (counted from 0) has {event.tokens} tokens, but probe "
                    f"'{decision.rule.name}' may judge at most {decision.rule.rule.max_tokens}. "
                    "Shorten it, or choose other probes.",
                    code="verdict_failed",
                )
        if silent := [decision.rule.name for decision in chosen if decision.verdict is None]:
            raise verdict_failure(silent)
        verdicts = [d.verdict for d in terms.shown(decisions) if d.verdict is not None]
        flagged = [d.rule.name for d in chosen if d.verdict is not None and d.verdict.flagged]
        checked.append(Checked(verdicts, flagged, event.tokens, event.explanations))
    return checked


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


class ModerationResponse(BaseModel):
    """One result per text, in order."""

    id: str
    model: str
    results: list[ModerationResult]


@router.post("/v1/moderations", name="create")
async def moderate(body: ModerationRequest, request: ServerRequest) -> ModerationResponse:
    """Each text is judged as a user's message, by the probes that read the prompt alone."""
    if body.model is not None and not body.model.startswith(_OPENAI_MODELS):
        request.require_model(body.model)
    texts = [as_user(text) for text in body.input]
    terms = (await request.begin(texts, max_tokens=0)).choose_disclosed(body.probes)
    checked = await check(request, terms, texts)
    results = [
        ModerationResult(
            **category_fields(text.verdicts, terms.categories),
            sidelight=Extension(verdicts=[verdict_json(verdict) for verdict in text.verdicts]),
        )
        for text in checked
    ]
    return ModerationResponse(
        id=f"modr-{uuid.uuid4().hex}", model=request.engine.model, results=results
    )


class ClassifyRequest(StrictBody):
    """Texts for one probe: the one in ``model`` or ``probes``, or the only one loaded."""

    model: Name | None = Field(None, description="A probe's name, or the served model's.")
    input: Texts = Field(min_length=1)
    probes: ProbeNames = None


class Classification(BaseModel):
    """The label of one text; ``probs`` are in the order of the probe's labels."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(BaseModel):
    """One classification per text, in order; ``model`` is the probe."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: dict[Literal["prompt_tokens", "total_tokens", "completion_tokens"], int]


@router.post("/classify", name="create")
async def classify(body: ClassifyRequest, request: ServerRequest) -> ClassifyResponse:
    """Each text is judged as a user's message; the answer is that of vLLM's classifiers."""
    texts = [as_user(text) for text in body.input]
    terms = _classifier(body, request, await request.begin(texts, max_tokens=0))
    (probe,) = terms.probes
    checked = await check(request, terms, texts)
    tokens = sum(text.tokens for text in checked)
    data = [
        Classification(
            index=index,
            label=verdict.label,
            probs=[verdict.probabilities[label] for label in probe.task.labels],
            num_classes=len(probe.task.labels),
        )
        for index, text in enumerate(checked)
        for verdict in text.verdicts
    ]
    return ClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=probe.name,
        data=data,
        usage={"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    )


def _classifier(body: ClassifyRequest, request: ServerRequest, terms: Terms) -> Terms:
    """The terms with the one probe that the request names."""
    names, chosen = [bound.name for bound in terms.chosen], body.probes
    if body.model in names and body.model != terms.model:
        chosen = [body.model] if chosen is None else chosen
    elif body.model is not None:
        request.require_model(body.model)
    terms = terms.choose_disclosed(chosen)
    if len(terms.chosen) != 1:
        raise RequestError(
            f"Choose one probe, got {len(terms.chosen)}. Name it as 'model'. Known: "
            f"{', '.join(sorted(names)) or 'none'}.",
            code="probe_not_chosen",
            param="model",
        )
    return terms


class GuardrailParameters(StrictBody):
    """What a proxy's configuration passes to this guardrail."""

    probes: ProbeNames = None


class GuardrailRequest(StrictBody):
    """Texts and tool calls of a request or of its response.

    Images cannot be judged, so they are refused. A proxy sends more, which is not read.
    """

    model_config = ConfigDict(extra="ignore")

    input_type: Literal["request", "response"]
    texts: Listed[str] | None = None
    tool_calls: Listed[ToolCall] | None = None
    images: list[Any] | None = Field(
        None, max_length=0, description="Must be empty: probes read text only."
    )
    additional_provider_specific_params: GuardrailParameters | None = None

    @model_validator(mode="after")
    def _holds_what_is_judged(self) -> "GuardrailRequest":
        # A proxy that sends texts in another field would have all of them passed.
        if self.texts is None and self.tool_calls is None:
            raise RequestError(
                "Got neither 'texts' nor 'tool_calls', so there is nothing to judge. Send 'texts'.",
                code="missing_parameter",
                param="texts",
            )
        return self

    def judged(self) -> list[str]:
        """The texts, then the calls; empty ones have nothing to judge."""
        functions = [call.function for call in self.tool_calls or ()]
        calls = ["\n".join(filter(None, (f.name, f.arguments))) for f in functions]
        return [text for text in (*(self.texts or ()), *calls) if text]


class GuardrailResponse(BaseModel):
    """``BLOCKED`` if a probe flags a text, else ``NONE``."""

    action: Literal["BLOCKED", "NONE"]
    blocked_reason: str | None
    sidelight: Extension


@router.post("/beta/litellm_basic_guardrail_api", name="create")
async def guard(body: GuardrailRequest, request: ServerRequest) -> GuardrailResponse:
    """Texts of a request are judged as users' messages, those of a response as answers.

    The answer has no ``texts``: a proxy keeps its own.
    """
    parameters = body.additional_provider_specific_params or GuardrailParameters()
    is_response = body.input_type == "response"
    texts = [
        [*as_user(""), Message("assistant", text)] if is_response else as_user(text)
        for text in body.judged()
    ]
    terms = (await request.begin(texts, max_tokens=0)).choose(parameters.probes)
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
    verdicts = [verdict for text in checked for verdict in text.verdicts]
    flagged = list(dict.fromkeys(name for text in checked for name in text.flagged))
    return GuardrailResponse(
        action="BLOCKED" if flagged else "NONE",
        blocked_reason=f"Flagged by {', '.join(flagged)}." if flagged else None,
        sidelight=Extension(verdicts=[verdict_json(verdict) for verdict in verdicts]),
    )
