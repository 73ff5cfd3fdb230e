"""Questions that a client puts to the probes by name, answered or refused; never guessed.

Questions put to the probes about one text, which is read once.

``POST /v1/decisions``: OpenAI's questions about a text, each answered by the probe it names.

``POST /v1/systemone``: the questions of vLLM's structured decisions, answered by probes.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictStr

from sidelight.probe import Probe
from sidelight.prompts import Message
from sidelight.server.checks import as_user, checked, is_answered
from sidelight.server.context import Context, InContext
from sidelight.server.enforcement import require_read
from sidelight.server.errors import RequestError
from sidelight.server.report import CategoryNames
from sidelight.server.schemas import FIRST_ERROR, JsonRoute, Listed, Name, Named, StrictBody
from sidelight.types import Verdict

Value = str | bool


@dataclass(frozen=True)
class Choice:
    """An answer to a question with given choices.

    Attributes:
        value: What the probe chose.
        confidence: Its probability.
        probabilities: Of each value, in the order of the question.
    """

    value: Value
    confidence: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Findings:
    """What the probes say of one text, by the names that questions use.

    Attributes:
        probes: The loaded probes.
        names: Their categories.
        verdicts: On the text; a probe without one cannot answer.
    """

    probes: Mapping[str, Probe]
    names: CategoryNames
    verdicts: Mapping[str, Verdict]

    @classmethod
    def of(
        cls, probes: Iterable[Probe], names: CategoryNames, verdicts: Iterable[Verdict]
    ) -> "Findings":
        """By name."""
        by_name = {probe.name: probe for probe in probes}
        return cls(by_name, names, {verdict.probe: verdict for verdict in verdicts})

    def probability(self, name: str | None) -> float | None:
        """Of the class that ``name`` means: a binary probe, or a category of any probe."""
        meant = self._meant(name)
        if meant is None or meant[0] not in self.verdicts:
            return None
        probe, label = meant
        return self.verdicts[probe].probabilities[label]

    def choice(self, name: str | None, values: Sequence[Value]) -> Choice | None:
        """Of probe ``name`` among ``values``, which have to be exactly its labels.

        A binary probe also takes ``true`` for its positive label and ``false`` for the other.
        """
        verdict = self.verdicts.get(name or "")
        if verdict is None or self.probes[verdict.probe].task.kind == "multilabel":
            return None
        labels = [self._label(verdict.probe, value) for value in values]
        if sorted(labels) != sorted(verdict.probabilities):
            return None
        return Choice(
            value=values[labels.index(verdict.label)],
            confidence=verdict.probabilities[verdict.label],
            probabilities=tuple(verdict.probabilities[label] for label in labels),
        )

    def asked(self, names: Iterable[str | None]) -> list[str]:
        """The loaded probes that these names mean."""
        meant = [self._meant(name) for name in names]
        found = [name for name in names if name in self.probes]
        return list(dict.fromkeys([*(m[0] for m in meant if m), *(n for n in found if n)]))

    def _meant(self, name: str | None) -> tuple[str, str] | None:
        """The probe and the label whose probability ``name`` asks for."""
        probe = self.probes.get(name or "")
        if probe is not None and probe.task.kind == "binary":
            return probe.name, probe.task.labels[1]
        for by_probe, categories in self.names.by_probe.items():
            for label, category in categories.items():
                if category == name:
                    return by_probe, label
        return None

    def _label(self, probe: str, value: Value) -> str:
        labels = self.probes[probe].task.labels
        if isinstance(value, str):
            return value
        return labels[int(value)] if self.probes[probe].task.kind == "binary" else ""


@dataclass(frozen=True)
class Found:
    """What was found, and what it cost.

    Attributes:
        findings: The verdicts, by the names that questions use.
        tokens: Tokens read; 0 where no question names a probe that can judge the text.
    """

    findings: Findings
    tokens: int


async def find(
    request: Request, context: Context, turns: Sequence[Message], names: Sequence[str | None]
) -> Found:
    """Judges the conversation by the probes that ``names`` mean; others are not reported.

    Raises:
        RequestError: The policy refuses how it begins.
    """
    require_read([turns], context.registry.policy)
    blank = Findings.of(context.probes, context.names, ())
    can_judge = {
        probe.name
        for probe in context.probes
        if not probe.reads.includes_response or is_answered(turns)
    }
    asked = [name for name in blank.asked(names) if name in can_judge]
    if not asked:
        return Found(blank, tokens=0)
    reporter = context.reporter(asked)
    (found,) = await checked(request, context, reporter, [turns])
    findings = Findings.of(context.probes, context.names, found.verdicts)
    return Found(findings, found.tokens)


_MAX_QUESTIONS = 400
_MAX_CHOICES = 255

decisions_router = APIRouter(route_class=JsonRoute)


class InputPart(StrictBody):
    """A piece of a message; only text is read."""

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(StrictBody):
    """One turn of the conversation to judge."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[InputPart],
        FIRST_ERROR,
        BeforeValidator(
            lambda v: [{"type": "input_text", "text": v}] if isinstance(v, str) else v,
            json_schema_input_type=str | list[InputPart],
        ),
    ]

    def as_message(self) -> Message:
        """The turn as plain text; several parts become lines."""
        return Message(self.role, "\n".join(part.text for part in self.content))


class ChoiceOption(StrictBody):
    """One of the values to choose from."""

    value: StrictStr | StrictBool
    description: str | None = None


class PredicateQuestion(StrictBody):
    """How probable is the class that ``name`` means?"""

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
    """A rating on ordered levels: no probe gives one, so it is refused."""

    type: Literal["score"]
    name: str | None = None
    instructions: Any = None
    levels: Listed[dict[str, Any]]


Question = Annotated[
    PredicateQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")
]


class DecisionRequest(StrictBody):
    """A text or conversation, and what to say of it. Instructions are not read by probes."""

    model: Name
    input: Annotated[
        list[InputMessage],
        FIRST_ERROR,
        Field(min_length=1),
        BeforeValidator(
            lambda v: [{"role": "user", "content": v}] if isinstance(v, str) else v,
            json_schema_input_type=str | list[InputMessage],
        ),
    ]
    questions: Listed[Question] = Field(min_length=1, max_length=_MAX_QUESTIONS)


class PredicateAnswer(BaseModel):
    """A calibrated probability."""

    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float


class ChoiceProbability(BaseModel):
    """Of one value."""

    value: StrictStr | StrictBool
    probability: float


class DecisionsChoiceAnswer(BaseModel):
    """The probe's label, and the probability of each."""

    type: Literal["choice"] = "choice"
    name: str | None
    choice: StrictStr | StrictBool
    probabilities: list[ChoiceProbability]
    confidence: float


class DecisionsRefusal(BaseModel):
    """No loaded probe answers this question on this text."""

    type: Literal["refusal"] = "refusal"
    name: str | None


class InputDetails(BaseModel):
    """Nothing is cached between requests."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Nothing is written."""

    reasoning_tokens: int = 0


class DecisionUsage(BaseModel):
    """Tokens read; none are written."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int = 0
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class DecisionResponse(BaseModel):
    """Answers in the order of the questions."""

    model: str
    answers: list[PredicateAnswer | DecisionsChoiceAnswer | DecisionsRefusal]
    usage: DecisionUsage


@decisions_router.post("/v1/decisions")
async def decisions_create(
    body: DecisionRequest, request: Request, context: InContext
) -> DecisionResponse:
    """The input is read once, whatever the number of questions; a question names its probe."""
    context.require_model(body.model)
    turns = [message.as_message() for message in body.input]
    found = await find(request, context, turns, [q.name for q in body.questions])
    return DecisionResponse(
        model=body.model,
        answers=[_decisions_answer(question, found.findings) for question in body.questions],
        usage=DecisionUsage(input_tokens=found.tokens, total_tokens=found.tokens),
    )


def _decisions_answer(
    question: PredicateQuestion | ChoiceQuestion | ScoreQuestion, findings: Findings
) -> PredicateAnswer | DecisionsChoiceAnswer | DecisionsRefusal:
    match question:
        case PredicateQuestion(name=name):
            probability = findings.probability(name)
            if probability is not None:
                return PredicateAnswer(name=name, probability=probability)
        case ChoiceQuestion(name=name, choices=choices):
            values = [option.value for option in choices]
            choice = findings.choice(name, values)
            if choice is not None:
                probabilities = [
                    ChoiceProbability(value=value, probability=probability)
                    for value, probability in zip(values, choice.probabilities, strict=True)
                ]
                return DecisionsChoiceAnswer(
                    name=name,
                    choice=choice.value,
                    probabilities=probabilities,
                    confidence=choice.confidence,
                )
        case ScoreQuestion():
            pass
    return DecisionsRefusal(name=question.name)


_Type = Literal["choice", "noul", "score"]

systemone_router = APIRouter(route_class=JsonRoute)


class SystemOneQuestion(StrictBody):
    """``noul`` asks yes or no, ``choice`` for one of the names in ``criteria``."""

    type: _Type
    instructions: Any = ""
    criteria: dict[str, Any] | list[Any] | None = None


class SystemOneRequest(StrictBody):
    """A state, as text or any JSON, and questions by id; the id names the probe."""

    model: Name | None = None
    state: Any = Field(description="Text, or JSON, which is judged as one line of text.")
    questions: Named[SystemOneQuestion] = Field(min_length=1)
    instructions: str | None = None
    images: Listed[str] | None = Field(None, max_length=0, description="Not read.")
    audio: Listed[str] | None = Field(None, max_length=0, description="Not read.")
    videos: Listed[str] | None = Field(None, max_length=0, description="Not read.")


class NoulAnswer(BaseModel):
    """The probability of yes."""

    type: Literal["noul"] = "noul"
    noul: float
    probabilities: dict[str, float]
    confidence: float


class SystemoneChoiceAnswer(BaseModel):
    """The probe's label, and the probability of each."""

    type: Literal["choice"] = "choice"
    choice: str
    probabilities: dict[str, float]
    confidence: float


class SystemoneRefusal(BaseModel):
    """No loaded probe answers this question."""

    type: Literal["refusal"] = "refusal"


class SystemOneUsage(BaseModel):
    """Tokens read; none are written."""

    input_tokens: int
    output_tokens: int = 0


class Diagnostics(BaseModel):
    """vLLM's: a probe has no output but its labels, so all its mass is on them."""

    label_mass: float = 1.0
    argmax_is_label: bool = True


class SystemOneResponse(BaseModel):
    """Answers and diagnostics by question id."""

    id: str
    object: Literal["structured_decision"] = "structured_decision"
    created: int
    model: str
    answers: dict[str, NoulAnswer | SystemoneChoiceAnswer | SystemoneRefusal]
    usage: SystemOneUsage
    diagnostics: dict[str, Diagnostics]


@systemone_router.post("/v1/systemone")
async def systemone_create(
    body: SystemOneRequest, request: Request, context: InContext
) -> SystemOneResponse:
    """The state is read once, as a user's message."""
    if body.model is not None:
        context.require_model(body.model)
    turns = as_user(_as_text(body.state))
    found = await find(request, context, turns, list(body.questions))
    answers = {
        name: _systemone_answer(name, q, found.findings) for name, q in body.questions.items()
    }
    return SystemOneResponse(
        id=f"decision-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=context.engine.model,
        answers=answers,
        usage=SystemOneUsage(input_tokens=found.tokens),
        diagnostics={
            name: Diagnostics()
            for name, a in answers.items()
            if not isinstance(a, SystemoneRefusal)
        },
    )


def _as_text(state: Any) -> str:
    if isinstance(state, str):
        return state
    try:
        # One line: indented, a body of deep lists would be two hundred times as long.
        return json.dumps(state, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RequestError(
            "A number in 'state' is too large for a float. Write it as a text.", param="state"
        ) from error


def _systemone_answer(
    name: str, question: SystemOneQuestion, findings: Findings
) -> NoulAnswer | SystemoneChoiceAnswer | SystemoneRefusal:
    if question.type == "noul":
        yes = findings.probability(name)
        if yes is not None:
            both = {"yes": yes, "no": 1 - yes}
            return NoulAnswer(noul=yes, probabilities=both, confidence=max(both.values()))
    if question.type == "choice" and isinstance(question.criteria, dict):
        values = list(question.criteria)
        choice = findings.choice(name, values)
        if choice is not None:
            by_value = dict(zip(values, choice.probabilities, strict=True))
            return SystemoneChoiceAnswer(
                choice=str(choice.value), probabilities=by_value, confidence=choice.confidence
            )
    return SystemoneRefusal()
