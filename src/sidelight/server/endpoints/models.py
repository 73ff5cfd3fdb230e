"""``GET /v1/models`` and ``/v1/models/{id}``: the served model and its probes."""

from typing import Any

from fastapi import APIRouter

from sidelight.server.context import Context, InContext

router = APIRouter()


@router.get("/v1/models")
async def list_models(context: InContext) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_card(context)]}


@router.get("/v1/models/{name:path}")
async def retrieve(name: str, context: InContext) -> dict[str, Any]:
    """The model of this name."""
    context.require_model(name)
    return _card(context)


def _card(context: Context) -> dict[str, Any]:
    probes = [
        {
            "name": probe.name,
            "kind": probe.task.kind,
            "labels": list(probe.task.labels),
            "reads": probe.reads.side,
            "version": probe.version,
        }
        for probe in context.probes
    ]
    return {
        "id": context.engine.model,
        "object": "model",
        "created": context.started_at,
        "owned_by": "sidelight",
        "sidelight": {"probes": probes},
    }
