"""The served model and its probes at ``/v1``, and their administration at ``/admin/probes``."""

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
    """The served model in OpenAI's format, with its probes."""

    sidelight: Probes[ListedProbe]


class ModelList(BaseModel):
    """The list of served models, which has one entry."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@models_router.get("/v1/models")
async def list_models(request: ServerRequest) -> ModelList:
    """List the single served model."""
    return ModelList(data=[_card(request)])


@models_router.get("/v1/models/{name:path}")
async def retrieve(name: str, request: ServerRequest) -> ModelCard:
    """Retrieve the model with this name."""
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
    """A threshold, and how other thresholds would perform on the calibration texts.

    ``curve`` is null if the artifact has no stored curve.
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
    """List each visible probe with its thresholds and the curves that they were chosen on."""
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
    """A loaded probe, its origin, and its rule."""

    side: RuleSide
    mode: Mode
    thresholds: dict[str, float]
    shadow_of: str | None
    path: str | None


class Replacement(StrictBody):
    """The probes and the policy to serve; null reloads the current ones."""

    probe: Listed[str] | None = Field(
        None, description="All probes to serve: folders on this machine, or ready guards."
    )
    policy: str | None = Field(None, description="Policy file on this machine.")


@admin_probes_router.get("/admin/probes")
async def list_probes(request: ServerRequest) -> Probes[ServedProbe]:
    """List all loaded probes, including those in shadow mode, with their rules and folders."""
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
    """Replace all probes and the policy atomically; on failure, the old ones stay."""
    folders = None if body.probe is None else list(map(Path, body.probe))
    path = None if body.policy is None else Path(body.policy)

    async def audited() -> Probes[ServedProbe]:
        await request.registry.replace(folders, path)
        request.observer.change(request.registry.rules)
        return _served(request)

    # The change completes and is audited even if the client disconnects.
    return await asyncio.shield(asyncio.create_task(audited()))
