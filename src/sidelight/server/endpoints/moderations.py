"""``POST /v1/moderations``: verdicts on texts, with nothing written."""

import uuid

from fastapi import APIRouter, Request
from pydantic import BaseModel

from sidelight.server.body import JsonRoute
from sidelight.server.categories import Categories
from sidelight.server.checking import as_user, checked
from sidelight.server.context import InContext
from sidelight.server.report import Extension, verdict_json
from sidelight.server.schemas import ModerationRequest

# Clients send OpenAI's own names by default; here they mean: every probe.
_OPENAI_MODELS = ("omni-moderation-", "text-moderation-")

router = APIRouter(route_class=JsonRoute)


class ModerationResult(Categories):
    """One text's categories; ``sidelight`` has the verdicts with all their labels."""

    sidelight: Extension


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
    if body.model is not None and not body.model.startswith(_OPENAI_MODELS):
        context.require_model(body.model)
    reporter = context.reporter(body.probes)
    judged = await checked(request, context, reporter, [as_user(text) for text in body.input])
    results = [
        ModerationResult(
            **reporter.names.report(one.verdicts).model_dump(),
            sidelight=Extension(verdicts=[verdict_json(verdict) for verdict in one.verdicts]),
        )
        for one in judged
    ]
    return ModerationResponse(
        id=f"modr-{uuid.uuid4().hex}", model=context.engine.model, results=results
    )
