"""The served model and its probes at ``/v1/models``, and changes of them at ``/admin/probes``."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from sidelight.prompts import Side
from sidelight.server.context import AdminOnly, Context, InContext
from sidelight.server.probes import ProbeEntry
from sidelight.server.schemas import ClosedBody, JsonRoute
from sidelight.types import TaskKind

models_router = APIRouter()


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


@models_router.get("/v1/models")
async def list_models(context: InContext) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[_card(context)])


@models_router.get("/v1/models/{name:path}")
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


admin_probes_router = APIRouter(dependencies=[AdminOnly])
_with_body = APIRouter(route_class=JsonRoute)


class ProbeList(BaseModel):
    """All probes, those that do not run last."""

    probes: list[ProbeEntry]


class LoadRequest(ClosedBody):
    """An artifact in a folder of the server's machine."""

    path: str
    shadow_of: str | None = None


class ReloadRequest(ClosedBody):
    """The artifact; null: the folder that the probe came from."""

    path: str | None = None


class ShadowRequest(ClosedBody):
    """The probe that the shadow is compared with, if any."""

    shadow_of: str | None = None


@admin_probes_router.get("/admin/probes")
async def list_probes(context: InContext) -> ProbeList:
    """Every probe, shadows and disabled ones too."""
    return ProbeList(probes=context.registry.entries)


@_with_body.post("/admin/probes", status_code=201)
async def load(body: LoadRequest, context: InContext) -> ProbeEntry:
    """Serves one more probe."""
    change = context.registry.load(Path(body.path), shadow_of=body.shadow_of)
    return await _made(context, "load", change)


@_with_body.post("/admin/probes/{name:path}/reload")
async def reload(name: str, body: ReloadRequest, context: InContext) -> ProbeEntry:
    """Replaces a probe by the artifact as it is now; if that fails, the last good one serves on."""
    path = None if body.path is None else Path(body.path)
    return await _made(context, "reload", context.registry.reload(name, path))


@_with_body.post("/admin/probes/{name:path}/shadow")
async def shadow(name: str, body: ShadowRequest, context: InContext) -> ProbeEntry:
    """Hides a probe from clients; it is still counted."""
    change = context.registry.shadow(name, shadow_of=body.shadow_of)
    return await _made(context, "shadow", change)


@admin_probes_router.post("/admin/probes/{name:path}/enable")
async def enable(name: str, context: InContext) -> ProbeEntry:
    """Runs a probe under the policy's rule."""
    return await _made(context, "enable", context.registry.enable(name))


@admin_probes_router.post("/admin/probes/{name:path}/disable")
async def disable(name: str, context: InContext) -> ProbeEntry:
    """Stops a probe; nothing follows from its rule meanwhile."""
    return await _made(context, "disable", context.registry.disable(name))


@admin_probes_router.delete("/admin/probes/{name:path}")
async def remove(name: str, context: InContext) -> dict[str, Any]:
    """Forgets a probe; its artifact stays."""
    removed = await _made(context, "remove", context.registry.remove(name))
    return {"name": removed.name, "removed": True}


async def _made(context: Context, kind: str, change: Coroutine[Any, Any, ProbeEntry]) -> ProbeEntry:
    """The outcome of a change, which is made and audited even if its caller leaves."""

    async def audited() -> ProbeEntry:
        entry = await change
        context.observer.change(kind, entry.name, entry.version)
        return entry

    return await asyncio.shield(asyncio.create_task(audited()))


admin_probes_router.include_router(_with_body)
