"""OpenAI's questions about one text, which is read once; each names the probe that answers it.

A question that no probe can answer is refused, never guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictStr

from sidelight.policy.enforcement import require_trusted_turns
from sidelight.probe import Probe
from sidelight.prompts import Message
from sidelight.server.checks import check, is_answered
from sidelight.server.report import Explanations, category_names
from sidelight.server.requests import Route, ServerRequest
from sidelight.server.schemas import (
    FIRST_ERROR,
    Listed,
    Name,
    StrictBody,
    Unread,
)
from sidelight.types import Verdict

_MAX_QUESTIONS = 400
_MAX_CHOICES = 255

Explain = Annotated[
    Literal["matrix"] | bool | None,
    Field(
        description="Whether to say what each token and layer adds to the logits; "
        "`matrix`: also each token in each layer."
    ),
]
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
    report = replace(request.report(chosen), explains=explains or False)
    (checked,) = await check(request, report, [turns])
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


class DecisionRequest(StrictBody):
    """A text or conversation, and questions about it. Probes do not read instructions."""

    unread: ClassVar[Unread] = {
        "prompt_cache_key": None,
        "prompt_cache_options": None,
        "safety_identifier": None,
    }

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


class ChoiceAnswer(BaseModel):
    """The probe's label, and the probability of each."""

    type: Literal["choice"] = "choice"
    name: str | None
    choice: StrictStr | StrictBool
    probabilities: list[ChoiceProbability]
    confidence: float


class Refusal(BaseModel):
    """No loaded probe answers this question about this text."""

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
