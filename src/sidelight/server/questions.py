"""OpenAI's decisions API: questions about one text, each answered by the probe that it names.

A question that no probe can answer is refused, never guessed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from openai.types import Decision
from pydantic import BeforeValidator, Field, StrictBool, StrictStr

from sidelight.policy.request import Json, RequestContext
from sidelight.policy.rules import BoundRule
from sidelight.server.checks import check, is_answered
from sidelight.server.requests import Route, ServerRequest
from sidelight.server.schemas import (
    ChatMessage,
    IfAny,
    Listed,
    MessageList,
    Name,
    StrictBody,
    Unread,
    few,
)
from sidelight.types import Task, Verdict, spans_json

_MAX_QUESTIONS = 400
_MAX_CHOICES = 255

# The probe and label that a name in a question refers to.
Meanings = Mapping[str, tuple[str, str]]

router = APIRouter(route_class=Route)


class InputMessage(ChatMessage):
    """One turn of the conversation to classify."""

    type: Literal["message"] = "message"


class ChoiceOption(StrictBody):
    """One of the values to choose from."""

    value: StrictStr | StrictBool
    description: str | None = None


class PredicateQuestion(StrictBody):
    """How probable is the class that ``name`` refers to?"""

    type: Literal["predicate"]
    name: str | None = None
    instructions: Any = None


class ChoiceQuestion(StrictBody):
    """Which of its labels does the probe ``name`` choose?"""

    type: Literal["choice"]
    name: str | None = None
    instructions: Any = None
    choices: Listed[ChoiceOption] = Field(min_length=2, max_length=_MAX_CHOICES)


class ScoreQuestion(StrictBody):
    """A rating on ordered levels, which is refused because no probe provides one."""

    type: Literal["score"]
    name: str | None = None
    instructions: Any = None
    levels: Listed[dict[str, Any]]


Question = Annotated[
    PredicateQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")
]


class DecisionRequest(StrictBody):
    """A text or conversation, and questions about it. Probes do not read instructions."""

    unread: ClassVar[Unread] = {
        "prompt_cache_key": None,
        "prompt_cache_options": None,
        "safety_identifier": None,
    }

    model: Name
    input: Annotated[
        MessageList[InputMessage],
        Field(min_length=1),
        BeforeValidator(
            lambda v: [{"role": "user", "content": v}] if isinstance(v, str) else v,
            json_schema_input_type=str | list[InputMessage],
        ),
    ]
    questions: Annotated[
        Listed[Question],
        Field(min_length=1, max_length=_MAX_QUESTIONS),
        few("choices", "levels"),
    ]
    explain: Literal["matrix"] | bool | None = Field(
        None,
        description="Whether to return what each token and layer adds to the logits; `matrix` adds "
        "each token in each layer.",
    )


class DecisionResponse(Decision):
    """OpenAI's decision, whose answers are in the order of the questions.

    Explanations are in the order of the verdicts. Spans are listed by probe, if it labels spans and
    its rule discloses them.
    """

    explanations: IfAny[list[dict[str, Any]]] = None
    spans: IfAny[dict[str, list[dict[str, Any]]]] = None


@router.post("/v1/decisions", name="create")
async def decide(body: DecisionRequest, request: ServerRequest) -> DecisionResponse:
    """Answer questions about an input, which is read only once."""
    request.require_model(body.model)
    turns = [message.as_message() for message in body.input]
    context = await request.begin([turns])
    meanings = _meanings(context)
    chosen = _asked(body, context, meanings, is_answered=is_answered(turns))
    verdicts: dict[str, Verdict] = {}
    tokens, explanations = 0, [] if body.explain else None
    if chosen:
        context = replace(context, chosen=chosen)
        explained = [b.name for b in chosen if context.is_admin or b.explains]
        explain = explained if body.explain else None
        ((event, decisions),) = await check(request, context, [turns], explain=explain)
        visible_verdicts, tokens = context.visible(decisions), event.tokens
        verdicts = {
            each.probe: each.verdict for each in visible_verdicts if each.verdict is not None
        }
        if body.explain:
            reasons = {each.verdict.probe: each for each in event.explanations}
            explanations = [
                reasons[name].to_dict(matrix=body.explain == "matrix")
                if name in reasons
                else {"probe": name, "error": "not_disclosed"}
                for name in verdicts
            ]
    tasks = {bound.name: bound.probe.task for bound in context.chosen}
    spans = {v.probe: spans_json(v.spans) for v in verdicts.values() if v.spans is not None}
    return DecisionResponse.model_validate(
        {
            "model": body.model,
            "answers": [_answer(each, meanings, tasks, verdicts) for each in body.questions],
            "usage": {
                "input_tokens": tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": 0,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens,
            },
            "explanations": explanations,
            "spans": spans or None,
        }
    )


def _asked(
    body: DecisionRequest, context: RequestContext, meanings: Meanings, *, is_answered: bool
) -> tuple[BoundRule, ...]:
    """The probes that a question names and that can classify the input."""
    named = {question.name or "" for question in body.questions}
    asked = named | {meanings[name][0] for name in named if name in meanings}
    return tuple(
        bound
        for bound in context.chosen
        if bound.name in asked and (is_answered or bound.side == "input")
    )


def _meanings(context: RequestContext) -> Meanings:
    """Categories, and the names of binary probes for their positive labels."""
    meanings = {
        category: (probe, label)
        for probe, labels in context.categories.items()
        for label, category in labels.items()
    }
    binary = (probe for probe in context.probes if probe.task.kind == "binary")
    return meanings | {probe.name: (probe.name, probe.task.labels[1]) for probe in binary}


def _answer(
    question: PredicateQuestion | ChoiceQuestion | ScoreQuestion,
    meanings: Meanings,
    tasks: Mapping[str, Task],
    verdicts: Mapping[str, Verdict],
) -> Json:
    name = question.name or ""
    if isinstance(question, PredicateQuestion):
        probe, label = meanings.get(name, ("", ""))
        if probe in verdicts:
            probability = verdicts[probe].probabilities[label]
            return {"type": "predicate", "name": name, "probability": probability}
    if isinstance(question, ChoiceQuestion) and name in verdicts:
        verdict, task = verdicts[name], tasks[name]
        values = [option.value for option in question.choices]
        by_label = {task.choices[value]: value for value in values if value in task.choices}
        if len(by_label) == len(values) and by_label.keys() == verdict.probabilities.keys():
            return {
                "type": "choice",
                "name": name,
                "choice": by_label[verdict.label],
                "probabilities": [
                    {"value": value, "probability": verdict.probabilities[label]}
                    for label, value in by_label.items()
                ],
                "confidence": verdict.probabilities[verdict.label],
            }
    return {"type": "refusal", "name": question.name}
