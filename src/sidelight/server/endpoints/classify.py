"""``POST /classify``: one probe's labels for texts, as vLLM's classification models give them."""

import time
import uuid
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from sidelight.engines.base import LoadedProbe
from sidelight.server.body import JsonRoute
from sidelight.server.checking import as_user, checked
from sidelight.server.context import Context, InContext
from sidelight.server.errors import RequestError
from sidelight.server.schemas import Name, ProbeNames, StrictBody, Texts

router = APIRouter(route_class=JsonRoute)


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


class ClassifyUsage(BaseModel):
    """Tokens read; none are written."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyResponse(BaseModel):
    """One classification per text, in order; ``model`` is the probe."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: ClassifyUsage


@router.post("/classify")
async def create(body: ClassifyRequest, request: Request, context: InContext) -> ClassifyResponse:
    """Each text is judged as a user's message."""
    probe = _probe(body, context)
    conversations = [as_user(text) for text in body.input]
    judged = await checked(request, context, context.reporter([probe.name]), conversations)
    tokens = sum(one.tokens for one in judged)
    data = [
        Classification(
            index=index,
            label=verdict.label,
            probs=[verdict.probabilities[label] for label in probe.task.labels],
            num_classes=len(probe.task.labels),
        )
        for index, (verdict,) in enumerate(one.verdicts for one in judged)
    ]
    return ClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=probe.name,
        data=data,
        usage=ClassifyUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _probe(body: ClassifyRequest, context: Context) -> LoadedProbe:
    names = [probe.name for probe in context.probes]
    chosen = body.probes
    if body.model in names and body.model != context.engine.model:
        chosen = [body.model] if chosen is None else chosen
    elif body.model is not None:
        context.require_model(body.model)
    probes = context.reporter(chosen).probes
    if len(probes) != 1:
        raise RequestError(
            f"One probe classifies at a time, got {len(probes)}. Name it as 'model'. "
            f"Known: {', '.join(sorted(names)) or 'none'}.",
            code="probe_not_chosen",
            param="model",
        )
    return probes[0]
