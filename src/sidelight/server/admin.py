"""The served model and its probes at ``/v1``, and changes of them at ``/admin/probes``."""

import asyncio
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from sidelight.manifest import OrdinaryText, reference
from sidelight.policy.rules import BoundRule, Mode
from sidelight.probe import Probe
from sidelight.prompts import Side
from sidelight.server.probes import ProbeEntry
from sidelight.server.requests import AdminOnly, Route, ServerRequest
from sidelight.server.schemas import Listed, StrictBody
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
    """A probe, its rule's mode, its thresholds, and the worst of ordinary traffic in training.

    The last two are null if the rule does not disclose scores.
    """

    mode: Mode
    thresholds: list[ThresholdCard] | None
    ordinary: list[OrdinaryText] | None


class RuleList(BaseModel):
    """The probes that clients see."""

    probes: list[RuleCard]


@models_router.get("/v1/probes")
async def list_rules(request: ServerRequest) -> RuleList:
    """Each probe that clients see, with its thresholds and the curves that they were chosen on."""
    visible = [bound for bound in request.registry.rules if not bound.is_shadow]
    cards: list[RuleCard] = []
    for bound in visible:
        is_told = request.is_admin or bound.disclosure == "scores"
        worst = bound.probe.record.get("traffic", {}).get("worst", [])
        cards.append(
            RuleCard(
                **_described(bound.probe),
                mode=bound.mode,
                thresholds=_thresholds(bound) if is_told else None,
                ordinary=[OrdinaryText.model_validate(own) for own in worst] if is_told else None,
            )
        )
    return RuleList(probes=cards)


def _thresholds(bound: BoundRule) -> list[ThresholdCard]:
    curves = read_curves(reference(bound.probe.record).get("curves", {}))
    return [
        ThresholdCard(label=label, threshold=threshold, curve=curves.get(label))
        for label, threshold in bound.thresholds.items()
    ]


admin_probes_router = APIRouter(route_class=Route, dependencies=[AdminOnly])


class ProbeList(BaseModel):
    """All probes, shadows too."""

    probes: list[ProbeEntry]


class Replacement(StrictBody):
    """What is served from now on; null: the same folders and file as now, read again."""

    probe: Listed[str] | None = Field(None, description="Folders of all probes on this machine.")
    policy: str | None = Field(None, description="A policy's file on this machine.")


@admin_probes_router.get("/admin/probes")
async def list_probes(request: ServerRequest) -> ProbeList:
    """Every probe with its rule."""
    return ProbeList(probes=request.registry.entries)


@admin_probes_router.put("/admin/probes")
async def replace(body: Replacement, request: ServerRequest) -> ProbeList:
    """Replaces all probes and the policy at once; if that fails, the old ones serve on."""
    folders = None if body.probe is None else list(map(Path, body.probe))
    path = None if body.policy is None else Path(body.policy)

    async def audited() -> ProbeList:
        await request.registry.replace(folders, path)
        served = request.registry.entries
        request.observer.change(
            {entry.name: entry.version for entry in served},
            {entry.name: {"mode": entry.mode, "thresholds": entry.thresholds} for entry in served},
        )
        return ProbeList(probes=served)

    # It is made and audited even if its caller leaves.
    return await asyncio.shield(asyncio.create_task(audited()))
