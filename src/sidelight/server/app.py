"""What an operator decides about a server, whatever its engine and address.

``GET /health``: the server lives. Open to all, and says nothing else.

``GET /ready``: whether requests would be served now.

``GET /metrics``: counts and times in Prometheus' text format.

``GET /version``: which Sidelight this is.

The HTTP application: an engine behind OpenAI's API.

To add an endpoint, write its file in ``endpoints/`` and add its router to the list below.

Runs the server until it is told to stop.
"""

import logging
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from sidelight.engines.base import Engine, EngineUnavailableError
from sidelight.engines.loading import LoadingEngine
from sidelight.errors import SidelightError
from sidelight.policy.rules import Policy, require_fitting
from sidelight.server import admin, chat, checks, questions
from sidelight.server.config import Access, ServerLimits
from sidelight.server.connections import (
    ACCEPTED_AT_ONCE,
    QUEUED,
    DrainingServer,
    bounded_protocol,
    within_system,
)
from sidelight.server.context import Context, InContext
from sidelight.server.errors import add_error_handlers
from sidelight.server.metrics import Metrics
from sidelight.server.middleware import Deadline, Gatekeeper, RequestScope
from sidelight.server.observe import AuditLog, Observer, Sink, log_settings
from sidelight.server.probes import ProbeRegistry
from sidelight.server.schemas import REFUSALS


@dataclass(frozen=True)
class Service:
    """How requests are served.

    Attributes:
        policy: What follows from verdicts; by default nothing, they are told.
        sources: The folders that probes came from, by name: where they are reloaded from.
        access: Who may do what; by default everybody everything but administer.
        limits: How much a request may take.
        audit: Where decisions are written; None: nowhere.
        traces: Takes what there is to tell of each request; None: nobody.
    """

    policy: Policy = field(default_factory=Policy)
    sources: Mapping[str, Path] = field(default_factory=dict[str, Path])
    access: Access = field(default_factory=Access)
    limits: ServerLimits = field(default_factory=ServerLimits)
    audit: AuditLog | None = None
    traces: Sink | None = None


health_router = APIRouter()


@health_router.get("/health")
async def health() -> dict[str, str]:
    """Always the same answer."""
    return {"status": "ok"}


ready_router = APIRouter()


@ready_router.get("/ready")
async def ready(context: InContext) -> dict[str, str]:
    """200 once the model is loaded; 503 before, and once the server is about to stop."""
    if context.drain.is_draining:
        raise EngineUnavailableError("The server is about to stop. Ask another one.")
    if not context.engine.is_ready:
        raise EngineUnavailableError("The model is still loading, or its engine has stopped.")
    return {"status": "ready"}


metrics_router = APIRouter()


@metrics_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
)
async def metrics(context: InContext) -> Response:
    """All series."""
    return Response(context.observer.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


version_router = APIRouter()


@version_router.get("/version")
async def get_version() -> dict[str, str]:
    """The installed version."""
    return {"version": version("sidelight")}


_ROUTERS = (
    chat.router,
    checks.router,
    questions.router,
    admin.models_router,
    health_router,
    ready_router,
    metrics_router,
    version_router,
    admin.admin_probes_router,
)


def create_app(engine: Engine, service: Service | None = None) -> FastAPI:
    """The application; it starts the engine when it starts, and closes it when it ends.

    Args:
        engine: What answers; ``LoadingEngine`` for one whose model takes a while.
        service: How requests are served; None: as ``Service`` has it by default.
    """
    chosen = service or Service()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await engine.start()
        try:
            if engine.is_ready:
                require_fitting(chosen.policy, engine.probes)
            yield
        finally:
            await engine.close()

    app = FastAPI(title="Sidelight", lifespan=lifespan)
    registry = ProbeRegistry(engine, chosen.policy, chosen.sources)
    observer = Observer(Metrics(engine), chosen.audit)
    app.state.context = context = Context(engine, registry, chosen.limits, observer)
    for router in _ROUTERS:
        app.include_router(router, responses=REFUSALS)
    add_error_handlers(app)
    # The last one added stands outermost: refused requests are counted too.
    app.add_middleware(Deadline, seconds=chosen.limits.deadline_s, drain=context.drain)
    app.add_middleware(Gatekeeper, access=chosen.access, limit=chosen.limits.concurrent)
    app.add_middleware(RequestScope, metrics=context.observer.metrics, sink=chosen.traces)
    return app


_log = logging.getLogger("sidelight.server")
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def serve(
    load: Callable[[], Engine],
    service: Service | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_anonymous: bool = False,
    notice_s: float = 5.0,
    drain_s: float = 30.0,
    log_level: str = "info",
    json_logs: bool = False,
) -> None:
    """Serves until SIGINT or SIGTERM; requests in flight may finish.

    The port is open at once; until ``load`` returns, what needs the model answers 503.

    Args:
        load: Gives the engine; runs in a thread of its own.
        service: How requests are served; None: as ``Service`` has it by default.
        host: Address to listen on; the default is reachable from this machine only.
        port: Port to listen on; 0 takes a free one and logs it.
        allow_anonymous: Listens beyond this machine even where no key is needed.
        notice_s: Seconds that the server listens on after SIGTERM, with ``/ready`` at 503.
        drain_s: Seconds that requests in flight may then take.
        log_level: Of the server's log: ``debug``, ``info``, ``warning`` or ``error``.
        json_logs: One JSON object a line, in place of text.

    Raises:
        SidelightError: The address cannot be listened on, everybody would be served beyond this
            machine, or what ``load`` raised.
    """
    given = service or Service()
    chosen = replace(given, limits=within_system(given.limits))
    if host not in _LOOPBACK and chosen.access.is_open and not allow_anonymous:
        raise SidelightError(
            f"Everybody who reaches {host} would be served. Set SIDELIGHT_API_KEY or "
            "--api-keys-file, or say --allow-anonymous if something else keeps strangers out."
        )

    def stop() -> None:
        server.should_exit = True

    def load_fitting() -> Engine:
        loaded = load()
        require_fitting(chosen.policy, loaded.probes)
        return loaded

    engine = LoadingEngine(load_fitting, on_failure=stop)
    app = create_app(engine, chosen)
    config = server_settings(app, chosen.limits, log_level=log_level, json_logs=json_logs)
    server = DrainingServer(
        config, drain=app.state.context.drain, drain_s=drain_s, notice_s=notice_s
    )
    listener = _listen(host, port)
    _log.info("Listening on http://%s:%d (Ctrl-C stops)", host, listener.getsockname()[1])
    # uvicorn passes a SIGINT on once it has drained.
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if engine.failure is not None:
        raise engine.failure


def server_settings(
    app: FastAPI,
    limits: ServerLimits,
    *,
    log_level: str = "info",
    json_logs: bool = False,
) -> uvicorn.Config:
    """Uvicorn's settings for ``app``."""
    return uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        ws="none",
        lifespan="on",
        backlog=ACCEPTED_AT_ONCE,
        access_log=False,
        log_config=log_settings(log_level, as_json=json_logs),
        log_level=log_level,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=QUEUED)
    except OSError as error:
        raise SidelightError(
            f"Cannot listen on {host}:{port} ({error.strerror}). Give another --port or --host."
        ) from error
