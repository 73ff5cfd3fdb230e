"""Questions about one text, which is read once; each names the probe that answers it.

A question that no probe can answer is refused, never guessed. ``/v1/decisions`` takes OpenAI's
questions, ``/v1/systemone`` those of vLLM's structured decisions.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr

from sidelight.policy.enforcement import require_trusted_turns
from sidelight.probe import Probe
from sidelight.prompts import Message
from sidelight.server.checks import as_user, check, is_answered
from sidelight.server.errors import RequestError
from sidelight.server.report import Explanations, category_names
from sidelight.server.requests import Route, ServerRequest
from sidelight.server.schemas import (
    FIRST_ERROR,
    Explain,
    Listed,
    Name,
    Named,
    RequestBody,
    StrictBody,
)
from sidelight.types import Verdict

_MAX_QUESTIONS = 400
_MAX_CHOICES = 255
_TEXT_ONLY = "Must be empty: probes read text only."

Value = str | bool

router = APIRouter(route_class=Route)


@dataclass(frozen=True)
class QuestionAnswers:
    """What is known of one text, looked up by the names that questions use.

    Attributes:
        meanings: Probe and label that a name means: a binary probe's positive one, or a category.
        probes: The loaded probes by name, whether or not a question means them.
        verdicts: On the text, by probe; a probe without one answers no question.
        tokens: Tokens read; 0 if no question names a probe that can judge the text.
        explanations: Of the verdicts, as the client may see them; None: it does not ask.
    """

    meanings: Mapping[str | None, tuple[str, str]]
    probes: Mapping[str, Probe]
    verdicts: Mapping[str, Verdict]
    tokens: int
    explanations: list[dict[str, Any]] | None = None

    def probability(self, name: str | None) -> float | None:
        probe, label = self.meanings.get(name, ("", ""))
        return self.verdicts[probe].probabilities[label] if probe in self.verdicts else None

    def choice(
        self, name: str | None, values: Sequence[Value]
    ) -> tuple[Value, dict[Value, float]] | None:
        """What probe ``name`` chooses among ``values``, and the probability of each.

        The values must be exactly its labels. A binary probe also takes ``true`` for its positive
        label and ``false`` for the other.
        """
        verdict = self.verdicts.get(name or "")
        if verdict is None or self.probes[verdict.probe].task.kind == "multilabel":
            return None
        task = self.probes[verdict.probe].task
        of_bool = task.labels if task.kind == "binary" else ("", "")
        labels = [value if isinstance(value, str) else of_bool[value] for value in values]
        if sorted(labels) != sorted(verdict.probabilities):
            return None
        chosen = values[labels.index(verdict.label)]
        return chosen, {
            value: verdict.probabilities[label] for value, label in zip(values, labels, strict=True)
        }


async def find(
    request: ServerRequest,
    turns: Sequence[Message],
    names: Sequence[str | None],
    *,
    explains: Explain = None,
) -> QuestionAnswers:
    """Judges the conversation with the probes that ``names`` mean; others are not reported.

    Raises:
        PolicyError: The policy refuses the turns that the conversation begins with.
    """
    require_trusted_turns(request.registry.policy, [turns])
    probes = {probe.name: probe for probe in request.probes}
    meanings: dict[str | None, tuple[str, str]] = {
        category: (probe, label)
        for probe, own in category_names(request.probes).items()
        for label, category in own.items()
    }
    for probe in probes.values():
        if probe.task.kind == "binary":
            meanings[probe.name] = (probe.name, probe.task.labels[1])
    meant = [meanings[name][0] for name in names if name in meanings]
    named = [name for name in names if name in probes]
    hidden = request.undisclosed
    chosen = [
        name
        for name in dict.fromkeys([*meant, *named])
        if name
        and name not in hidden
        and (is_answered(turns) or not probes[name].reads.includes_response)
    ]
    if not chosen:
        why = [] if explains else None
        return QuestionAnswers(meanings, probes, verdicts={}, tokens=0, explanations=why)
    (checked,) = await check(request, request.report(chosen, explains=explains), [turns])
    verdicts = {verdict.probe: verdict for verdict in checked.verdicts}
    return QuestionAnswers(meanings, probes, verdicts, checked.tokens, checked.explanations)


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


class DecisionRequest(RequestBody):
    """A text or conversation, and questions about it. Probes do not read instructions."""

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
    explain: Explain = None


class PredicateAnswer(BaseModel):
    """A calibrated probability."""

    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float


class ChoiceProbability(BaseModel):
    """The probability of one value."""

    value: StrictStr | StrictBool
    probability: float


# Frozen OpenAPI names, which are the classes' ``__qualname__``: clients were generated when these
# classes lived in `server.endpoints`. Do not change them.


class ChoiceAnswer(BaseModel):
    """The probe's label, and the probability of each."""

    __qualname__ = "sidelight__server__endpoints__decisions__ChoiceAnswer"

    type: Literal["choice"] = "choice"
    name: str | None
    choice: StrictStr | StrictBool
    probabilities: list[ChoiceProbability]
    confidence: float


class Refusal(BaseModel):
    """No loaded probe answers this question about this text."""

    __qualname__ = "sidelight__server__endpoints__decisions__Refusal"

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
    answers: list[PredicateAnswer | ChoiceAnswer | Refusal]
    usage: DecisionUsage
    explanations: Explanations = None


@router.post("/v1/decisions", name="create")
async def decide(body: DecisionRequest, request: ServerRequest) -> DecisionResponse:
    """The input is read once, however many questions there are; each names its probe."""
    request.require_model(body.model)
    turns = [message.as_message() for message in body.input]
    names = [question.name for question in body.questions]
    judged = await find(request, turns, names, explains=body.explain)
    return DecisionResponse(
        model=body.model,
        answers=[_answer(question, judged) for question in body.questions],
        usage=DecisionUsage(input_tokens=judged.tokens, total_tokens=judged.tokens),
        explanations=judged.explanations,
    )


def _answer(
    question: PredicateQuestion | ChoiceQuestion | ScoreQuestion, judged: QuestionAnswers
) -> PredicateAnswer | ChoiceAnswer | Refusal:
    name = question.name
    if isinstance(question, PredicateQuestion):
        probability = judged.probability(name)
        if probability is not None:
            return PredicateAnswer(name=name, probability=probability)
    if isinstance(question, ChoiceQuestion):
        found = judged.choice(name, [option.value for option in question.choices])
        if found is not None:
            chosen, by_value = found
            each = [ChoiceProbability(value=v, probability=p) for v, p in by_value.items()]
            return ChoiceAnswer(
                name=name, choice=chosen, probabilities=each, confidence=by_value[chosen]
            )
    return Refusal(name=name)


class SystemOneQuestion(StrictBody):
    """``noul`` asks yes or no, ``choice`` for one of the names in ``criteria``."""

    type: Literal["choice", "noul", "score"]
    instructions: Any = ""
    criteria: dict[str, Any] | list[Any] | None = None


class SystemOneRequest(RequestBody):
    """A state, as text or any JSON, and questions by id; the id names the probe."""

    model: Name | None = None
    state: Any = Field(description="Text, or JSON, which is judged as one line of text.")
    questions: Named[SystemOneQuestion] = Field(min_length=1)
    instructions: str | None = None
    images: Listed[str] | None = Field(None, max_length=0, description=_TEXT_ONLY)
    explain: Literal[False] | None = None
    audio: Listed[str] | None = Field(None, max_length=0, description=_TEXT_ONLY)
    videos: Listed[str] | None = Field(None, max_length=0, description=_TEXT_ONLY)

    def text(self) -> str:
        """The state as it is judged.

        Raises:
            RequestError: It has a number that no float can hold.
        """
        if isinstance(self.state, str):
            return self.state
        try:
            # One line: indented, a body of deep lists would be two hundred times as long.
            return json.dumps(self.state, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise RequestError(
                "A number in 'state' is too large for a float. Send it as text.", param="state"
            ) from error


class NoulAnswer(BaseModel):
    """The probability of yes."""

    type: Literal["noul"] = "noul"
    noul: float
    probabilities: dict[str, float]
    confidence: float


class SystemOneChoice(BaseModel):
    """The probe's label, and the probability of each."""

    __qualname__ = "sidelight__server__endpoints__systemone__ChoiceAnswer"
    model_config = ConfigDict(title="ChoiceAnswer")

    type: Literal["choice"] = "choice"
    choice: str
    probabilities: dict[str, float]
    confidence: float


class SystemOneRefusal(BaseModel):
    """No loaded probe answers this question."""

    __qualname__ = "sidelight__server__endpoints__systemone__Refusal"
    model_config = ConfigDict(title="Refusal")

    type: Literal["refusal"] = "refusal"


class SystemOneUsage(BaseModel):
    """Tokens read; none are written."""

    input_tokens: int
    output_tokens: int = 0


class Diagnostics(BaseModel):
    """As vLLM reports them; a probe has no outputs but its labels, so these have all the mass."""

    label_mass: float = 1.0
    argmax_is_label: bool = True


class SystemOneResponse(BaseModel):
    """Answers and diagnostics by question id."""

    id: str
    object: Literal["structured_decision"] = "structured_decision"
    created: int
    model: str
    answers: dict[str, NoulAnswer | SystemOneChoice | SystemOneRefusal]
    usage: SystemOneUsage
    diagnostics: dict[str, Diagnostics]


@router.post("/v1/systemone", name="create")
async def decide_state(body: SystemOneRequest, request: ServerRequest) -> SystemOneResponse:
    """The state is read once, as a user's message."""
    if body.model is not None:
        request.require_model(body.model)
    judged = await find(request, as_user(body.text()), list(body.questions))
    answers = {name: _of_state(name, own, judged) for name, own in body.questions.items()}
    return SystemOneResponse(
        id=f"decision-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=request.engine.model,
        answers=answers,
        usage=SystemOneUsage(input_tokens=judged.tokens),
        diagnostics={
            name: Diagnostics()
            for name, answer in answers.items()
            if not isinstance(answer, SystemOneRefusal)
        },
    )


def _of_state(
    name: str, question: SystemOneQuestion, judged: QuestionAnswers
) -> NoulAnswer | SystemOneChoice | SystemOneRefusal:
    if question.type == "noul":
        yes = judged.probability(name)
        if yes is not None:
            both = {"yes": yes, "no": 1 - yes}
            return NoulAnswer(noul=yes, probabilities=both, confidence=max(both.values()))
    if question.type == "choice" and isinstance(question.criteria, dict):
        found = judged.choice(name, list(question.criteria))
        if found is not None:
            chosen = str(found[0])
            by_value = {str(value): probability for value, probability in found[1].items()}
            return SystemOneChoice(
                choice=chosen, probabilities=by_value, confidence=by_value[chosen]
            )
    return SystemOneRefusal()
