"""``GET /v1/models`` and ``/v1/models/{id}``: the served model and its probes."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from sidelight.prompts import Side
from sidelight.server.context import Context, InContext
from sidelight.types import TaskKind

router = APIRouter()


class ProbeCard(BaseModel):
    """What a client has to know of a probe."""

    name: str
    kind: TaskKind
    labels: list[str]
    reads: Side
    version: str


class ProbeCards(BaseModel):
    """The ``sidelight`` field of a model."""

    probes: list[ProbeCard]


class ModelCard(BaseModel):
    """The served model, as OpenAI words it, with its probes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sidelight"
    sidelight: ProbeCards


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models")
async def list_models(context: InContext) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[_card(context)])


@router.get("/v1/models/{name:path}")
async def retrieve(name: str, context: InContext) -> ModelCard:
    """The model of this name."""
    context.require_model(name)
    return _card(context)


def _card(context: Context) -> ModelCard:
    probes = [
        ProbeCard(
            name=probe.name,
            kind=probe.task.kind,
            labels=list(probe.task.labels),
            reads=probe.reads.side,
            version=probe.version,
        )
        for probe in context.probes
    ]
    return ModelCard(
        id=context.engine.model, created=context.started_at, sidelight=ProbeCards(probes=probes)
    )
