"""The served model and its probes at ``/v1``, and changes of them at ``/admin/probes``."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from sidelight.manifest import reference
from sidelight.policy.rules import BoundRule, Mode
from sidelight.probe import Probe
from sidelight.prompts import Side
from sidelight.server.probes import ProbeEntry
from sidelight.server.requests import AdminOnly, Route, ServerRequest
from sidelight.server.schemas import StrictBody
from sidelight.thresholds import OperatingCurve, read_curves
from sidelight.types import TaskKind

models_router = APIRouter(route_class=Route)


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
async def list_models(request: ServerRequest) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[_card(request)])


@models_router.get("/v1/models/{name:path}")
async def retrieve(name: str, request: ServerRequest) -> ModelCard:
    """The model of this name."""
    request.require_model(name)
    return _card(request)


def _card(request: ServerRequest) -> ModelCard:
    return ModelCard(
        id=request.engine.model,
        created=request.context.started_at,
        sidelight=ProbeCards(
            probes=[ProbeCard.model_validate(_described(probe)) for probe in request.probes]
        ),
    )


def _described(probe: Probe) -> dict[str, Any]:
    return {
        "name": probe.name,
        "kind": probe.task.kind,
        "labels": list(probe.task.labels),
        "reads": probe.reads.side,
        "version": probe.version,
    }


class ThresholdCard(BaseModel):
    """A threshold, and what others would flag of the texts that the probe was calibrated on.

    ``curve`` is null for an artifact that stores none.
    """

    label: str
    threshold: float
    curve: OperatingCurve | None


class RuleCard(ProbeCard):
    """A probe, its rule's mode, and its thresholds: null if the rule does not disclose scores."""

    mode: Mode
    thresholds: list[ThresholdCard] | None


class RuleList(BaseModel):
    """The probes that clients see."""

    probes: list[RuleCard]


@models_router.get("/v1/probes")
async def list_rules(request: ServerRequest) -> RuleList:
    """Each probe that clients see, with its thresholds and the curves that they were chosen on."""
    visible = [bound for bound in request.registry.rules if not bound.is_shadow]
    return RuleList(
        probes=[
            RuleCard(
                **_described(bound.probe),
                mode=bound.mode,
                thresholds=_thresholds(bound)
                if request.is_admin or bound.disclosure == "scores"
                else None,
            )
            for bound in visible
        ]
    )


def _thresholds(bound: BoundRule) -> list[ThresholdCard]:
    curves = read_curves(reference(bound.probe.record).get("curves", {}))
    return [
        ThresholdCard(label=label, threshold=threshold, curve=curves.get(label))
        for label, threshold in bound.thresholds.items()
    ]


admin_probes_router = APIRouter(route_class=Route, dependencies=[AdminOnly])


class ProbeList(BaseModel):
    """All probes, those that do not run last."""

    probes: list[ProbeEntry]


class LoadRequest(StrictBody):
    """An artifact in a folder of the server's machine."""

    path: str
    shadow_of: str | None = None


class ReloadRequest(StrictBody):
    """The artifact; null: the folder that the probe came from."""

    path: str | None = None


class ShadowRequest(StrictBody):
    """The probe that the shadow is compared with, if any."""

    shadow_of: str | None = None


@admin_probes_router.get("/admin/probes")
async def list_probes(request: ServerRequest) -> ProbeList:
    """Every probe, shadows and disabled ones too."""
    return ProbeList(probes=request.registry.entries)


@admin_probes_router.post("/admin/probes", status_code=201)
async def load(body: LoadRequest, request: ServerRequest) -> ProbeEntry:
    """Serves one more probe."""
    change = request.registry.load(Path(body.path), shadow_of=body.shadow_of)
    return await _made(request, "load", change)


@admin_probes_router.post("/admin/probes/{name:path}/reload")
async def reload(name: str, body: ReloadRequest, request: ServerRequest) -> ProbeEntry:
    """Replaces a probe by the artifact as it is now; if that fails, the last good one serves on."""
    path = None if body.path is None else Path(body.path)
    return await _made(request, "reload", request.registry.reload(name, path))


@admin_probes_router.post("/admin/probes/{name:path}/shadow")
async def shadow(name: str, body: ShadowRequest, request: ServerRequest) -> ProbeEntry:
    """Hides a probe from clients; it is still counted."""
    change = request.registry.shadow(name, shadow_of=body.shadow_of)
    return await _made(request, "shadow", change)


@admin_probes_router.post("/admin/probes/{name:path}/enable")
async def enable(name: str, request: ServerRequest) -> ProbeEntry:
    """Runs a probe under the policy's rule."""
    return await _made(request, "enable", request.registry.enable(name))


@admin_probes_router.post("/admin/probes/{name:path}/disable")
async def disable(name: str, request: ServerRequest) -> ProbeEntry:
    """Stops a probe; nothing follows from its rule meanwhile."""
    return await _made(request, "disable", request.registry.disable(name))


@admin_probes_router.delete("/admin/probes/{name:path}")
async def remove(name: str, request: ServerRequest) -> dict[str, Any]:
    """Forgets a probe; its artifact stays."""
    removed = await _made(request, "remove", request.registry.remove(name))
    return {"name": removed.name, "removed": True}


async def _made(
    request: ServerRequest, kind: str, change: Coroutine[Any, Any, ProbeEntry]
) -> ProbeEntry:
    """The outcome of a change, which is made and audited even if its caller leaves."""

    async def audited() -> ProbeEntry:
        entry = await change
        request.observer.change(kind, entry.name, entry.version)
        return entry

    return await asyncio.shield(asyncio.create_task(audited()))
