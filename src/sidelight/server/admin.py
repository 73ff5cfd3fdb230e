"""The served model and its probes at ``/v1``, and changes of them at ``/admin/probes``."""

import asyncio
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from fastapi import APIRouter
from openai.types import Model
from pydantic import BaseModel, Field

from sidelight.models.conversation import Side
from sidelight.policy.rules import Mode
from sidelight.policy.rules import Side as RuleSide
from sidelight.probes.probe import Probe
from sidelight.server.requests import AdminOnly, Route, ServerRequest
from sidelight.server.schemas import Listed, StrictBody
from sidelight.statistics.thresholds import OperatingCurve
from sidelight.types import TaskKind

models_router = APIRouter(route_class=Route)
Card = TypeVar("Card")


class ListedProbe(BaseModel):
    """A probe as clients see it."""

    name: str
    kind: TaskKind
    labels: list[str]
    reads: Side
    labels_spans: bool
    version: str


class Probes(BaseModel, Generic[Card]):
    """Cards of probes, in the order in which they were loaded."""

    probes: list[Card]


class ModelCard(Model):
    """The served model, as OpenAI words it, with its probes."""

    sidelight: Probes[ListedProbe]


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
    visible = [bound.probe for bound in request.registry.rules if not bound.is_shadow]
    cards = [ListedProbe.model_validate(_probe_fields(probe)) for probe in visible]
    return ModelCard(
        id=request.engine.model,
        object="model",
        created=request.context.started_at,
        owned_by="sidelight",
        sidelight=Probes(probes=cards),
    )


def _probe_fields(probe: Probe) -> dict[str, Any]:
    return {
        "name": probe.name,
        "kind": probe.task.kind,
        "labels": list(probe.task.labels),
        "reads": probe.reads.side,
        "labels_spans": probe.spans is not None,
        "version": probe.version,
    }


class ThresholdCard(BaseModel):
    """A threshold, and what others would flag of the texts that the probe was calibrated on.

    ``curve`` is null for an artifact that stores none.
    """

    label: str
    threshold: float
    curve: OperatingCurve | None


class RuleCard(ListedProbe):
    """A probe, its rule's mode, and its thresholds; null unless the rule discloses scores."""

    mode: Mode
    thresholds: list[ThresholdCard] | None


@models_router.get("/v1/probes")
async def list_rules(request: ServerRequest) -> Probes[RuleCard]:
    """Each probe that clients see, with its thresholds and the curves that they were chosen on."""
    cards: list[RuleCard] = []
    for bound in request.registry.rules:
        if bound.is_shadow:
            continue
        is_told = bound.discloses_scores(is_admin=request.is_admin)
        training = bound.probe.card.training
        thresholds = [
            ThresholdCard(label=label, threshold=threshold, curve=training.curves.get(label))
            for label, threshold in bound.thresholds.items()
        ]
        cards.append(
            RuleCard(
                **_probe_fields(bound.probe),
                mode=bound.mode,
                thresholds=thresholds if is_told else None,
            )
        )
    return Probes(probes=cards)


admin_probes_router = APIRouter(route_class=Route, dependencies=[AdminOnly])


class ServedProbe(ListedProbe):
    """One probe: what it is, where it came from, and what follows from its verdicts."""

    side: RuleSide
    mode: Mode
    thresholds: dict[str, float]
    shadow_of: str | None
    path: str | None


class Replacement(StrictBody):
    """The folders and the policy to serve from now on; null: the same as now, read again."""

    probe: Listed[str] | None = Field(
        None, description="All probes to serve: folders on this machine, or ready guards."
    )
    policy: str | None = Field(None, description="Policy file on this machine.")


@admin_probes_router.get("/admin/probes")
async def list_probes(request: ServerRequest) -> Probes[ServedProbe]:
    """All probes that run, shadows too, with their rules and the folders they came from."""
    return _served(request)


def _served(request: ServerRequest) -> Probes[ServedProbe]:
    cards: list[ServedProbe] = []
    for bound in request.registry.rules:
        folder = request.registry.folders.get(bound.name)
        cards.append(
            ServedProbe(
                **_probe_fields(bound.probe),
                side=bound.side,
                mode=bound.mode,
                thresholds=dict(bound.thresholds),
                shadow_of=bound.shadow_of,
                path=None if folder is None else str(folder),
            )
        )
    return Probes(probes=cards)


@admin_probes_router.put("/admin/probes")
async def replace(body: Replacement, request: ServerRequest) -> Probes[ServedProbe]:
    """Replace all probes and the policy at once; if that fails, the old ones serve on."""
    folders = None if body.probe is None else list(map(Path, body.probe))
    path = None if body.policy is None else Path(body.policy)

    async def audited() -> Probes[ServedProbe]:
        await request.registry.replace(folders, path)
        request.observer.change(request.registry.rules)
        return _served(request)

    # It is made and audited even if its caller leaves.
    return await asyncio.shield(asyncio.create_task(audited()))
