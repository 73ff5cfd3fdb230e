"""Ray Serve: any number of replicas of Sidelight's server behind one address, on one cluster."""

import os
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

from sidelight.engines.base import Engine, EngineUnavailableError
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.guards import named_sources, probe_folders
from sidelight.probes.artifact import load_probe
from sidelight.probes.probe import Probe
from sidelight.server.app import create_app
from sidelight.server.config import ServerConfig


class Settings(BaseModel, extra="forbid"):
    """What stands behind ``ray_serve:app`` as NAME=VALUE, or as ``args`` in a Serve config file.

    Paths are those of every machine: a shared disk, or the same folders on each. Several probes
    have a colon between them: ``guard:injection:/probes/intent``.
    """

    probes: str
    model: str | None = None
    policy: Path | None = None
    replicas: int = 1
    cpus: float = 1
    gpus: float = 0


class Replica:
    """Ray asks it every ten seconds, and replaces it when it raises three times."""

    app: FastAPI

    def check_health(self) -> None:
        """Raises where ``/ready`` would be 503."""
        if not self.app.state.context.engine.is_ready:
            raise EngineUnavailableError("The engine has stopped.")


def app(settings: Settings) -> serve.Application:
    """What ``serve run`` deploys."""

    def replica_app() -> FastAPI:
        # Ray sends no request before this returns, so the model may load in it. Without a key
        # the replica does not start: Ray may listen beyond this machine.
        folders = probe_folders(named_sources(settings.probes), settings.model)
        probes = [load_probe(folder) for folder in folders]
        key = os.environ.get("SIDELIGHT_API_KEY", "")
        config = ServerConfig(policy=settings.policy, api_key=(key,))
        return create_app(engine_of(settings, probes), config)

    deployment = serve.deployment(
        serve.ingress(replica_app)(Replica),
        name="sidelight",
        num_replicas=settings.replicas,
        # Ray's default of five would leave the engine's batches empty.
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    return deployment.bind()


def engine_of(settings: Settings, probes: list[Probe]) -> Engine:
    model = settings.model or probes[0].card.backbone.name
    backbone = load_backbone(model, prompt_format=probes[0].card.prompt_format)
    return TransformersEngine(backbone, probes)
