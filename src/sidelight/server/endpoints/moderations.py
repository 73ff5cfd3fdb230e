"""``POST /v1/moderations``: verdicts on texts, with nothing written."""

import uuid

from fastapi import APIRouter, Request
from pydantic import BaseModel

from sidelight.prompts import Message
from sidelight.server.body import JsonRoute
from sidelight.server.categories import Categories
from sidelight.server.context import InContext
from sidelight.server.disconnect import unless_left
from sidelight.server.report import verdict_json
from sidelight.server.schemas import ModerationRequest

# Clients send OpenAI's own names by default; here they mean: every probe.
_OPENAI_MODELS = ("omni-moderation-", "text-moderation-")

router = APIRouter(route_class=JsonRoute)


class ModerationResult(Categories):
    """One text's categories; ``sidelight`` has the verdicts with all their labels."""

    sidelight: dict[str, list[dict[str, object]]]


class ModerationResponse(BaseModel):
    """One result per text, in order."""

    id: str
    model: str
    results: list[ModerationResult]


@router.post("/v1/moderations")
async def create(
    body: ModerationRequest, request: Request, context: InContext
) -> ModerationResponse:
    """Each text is judged as a user's message, by the probes that read the prompt alone."""
    model = context.engine.model
    if body.model is not None and not body.model.startswith(_OPENAI_MODELS):
        context.require_model(body.model)
    reporter = context.reporter(body.probes)
    context.require_prompt_probe(reporter.probes)
    conversations = [[Message("user", text)] for text in body.input]
    judged = await unless_left(request, context.engine.judge(conversations))
    results: list[ModerationResult] = []
    for event in judged:
        context.metrics.count_verdicts(event.verdicts, event.failed)
        verdicts = reporter.required(event)
        results.append(
            ModerationResult(
                **reporter.names.report(verdicts).model_dump(),
                sidelight={"verdicts": [verdict_json(verdict) for verdict in verdicts]},
            )
        )
    return ModerationResponse(id=f"modr-{uuid.uuid4().hex}", model=model, results=results)
