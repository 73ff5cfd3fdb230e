"""``POST /v1/decisions``: OpenAI's questions about a text, each answered by the probe it names."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictStr

from sidelight.prompts import Message
from sidelight.server.asking import find
from sidelight.server.body import JsonRoute
from sidelight.server.context import InContext
from sidelight.server.questions import Findings
from sidelight.server.schemas import FIRST_ERROR, Listed, Name, StrictBody

_MAX_QUESTIONS = 400
_MAX_CHOICES = 255

router = APIRouter(route_class=JsonRoute)


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


class ChoiceAnswer(BaseModel):
    """The probe's label, and the probability of each."""

    type: Literal["choice"] = "choice"
    name: str | None
    choice: StrictStr | StrictBool
    probabilities: list[ChoiceProbability]
    confidence: float


class Refusal(BaseModel):
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
    answers: list[PredicateAnswer | ChoiceAnswer | Refusal]
    usage: DecisionUsage


@router.post("/v1/decisions")
async def create(body: DecisionRequest, request: Request, context: InContext) -> DecisionResponse:
    """The input is read once, whatever the number of questions; a question names its probe."""
    context.require_model(body.model)
    turns = [message.as_message() for message in body.input]
    found = await find(request, context, turns, [q.name for q in body.questions])
    return DecisionResponse(
        model=body.model,
        answers=[_answer(question, found.findings) for question in body.questions],
        usage=DecisionUsage(input_tokens=found.tokens, total_tokens=found.tokens),
    )


def _answer(
    question: PredicateQuestion | ChoiceQuestion | ScoreQuestion, findings: Findings
) -> PredicateAnswer | ChoiceAnswer | Refusal:
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
                return ChoiceAnswer(
                    name=name,
                    choice=choice.value,
                    probabilities=probabilities,
                    confidence=choice.confidence,
                )
        case ScoreQuestion():
            pass
    return Refusal(name=question.name)
