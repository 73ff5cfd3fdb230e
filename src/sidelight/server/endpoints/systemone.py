"""``POST /v1/systemone``: the questions of vLLM's structured decisions, answered by probes."""

import json
import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from sidelight.server.asking import find
from sidelight.server.body import JsonRoute
from sidelight.server.checking import as_user
from sidelight.server.context import InContext
from sidelight.server.errors import RequestError
from sidelight.server.questions import Findings
from sidelight.server.schemas import Listed, Name, Named, StrictBody

_Type = Literal["choice", "noul", "score"]

router = APIRouter(route_class=JsonRoute)


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


class ChoiceAnswer(BaseModel):
    """The probe's label, and the probability of each."""

    type: Literal["choice"] = "choice"
    choice: str
    probabilities: dict[str, float]
    confidence: float


class Refusal(BaseModel):
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
    answers: dict[str, NoulAnswer | ChoiceAnswer | Refusal]
    usage: SystemOneUsage
    diagnostics: dict[str, Diagnostics]


@router.post("/v1/systemone")
async def create(body: SystemOneRequest, request: Request, context: InContext) -> SystemOneResponse:
    """The state is read once, as a user's message."""
    if body.model is not None:
        context.require_model(body.model)
    turns = as_user(_as_text(body.state))
    found = await find(request, context, turns, list(body.questions))
    answers = {name: _answer(name, q, found.findings) for name, q in body.questions.items()}
    return SystemOneResponse(
        id=f"decision-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=context.engine.model,
        answers=answers,
        usage=SystemOneUsage(input_tokens=found.tokens),
        diagnostics={
            name: Diagnostics() for name, a in answers.items() if not isinstance(a, Refusal)
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


def _answer(
    name: str, question: SystemOneQuestion, findings: Findings
) -> NoulAnswer | ChoiceAnswer | Refusal:
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
            return ChoiceAnswer(
                choice=str(choice.value), probabilities=by_value, confidence=choice.confidence
            )
    return Refusal()
