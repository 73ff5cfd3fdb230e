"""The HTTP application, which puts an engine behind OpenAI's API, and its server."""

import logging
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from logging.config import dictConfig
from math import ceil

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

from sidelight.engines.base import Engine, EngineUnavailableError
from sidelight.errors import SidelightError
from sidelight.server import admin, chat, checks, classify, detectors, guardrail, questions
from sidelight.server.config import ServerConfig
from sidelight.server.errors import add_error_handlers
from sidelight.server.middleware import Gatekeeper, RequestScope
from sidelight.server.observe import audit_of, log_settings
from sidelight.server.playground import page_router, playground
from sidelight.server.requests import Route, ServerContext, ServerRequest
from sidelight.server.schemas import REFUSALS

_log = logging.getLogger("sidelight.server")
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
status_router = APIRouter(route_class=Route)


@status_router.get("/health")
async def health() -> dict[str, str]:
    """200 while the server runs."""
    return {"status": "ok"}


status_router.head("/health", include_in_schema=False)(health)


@status_router.get("/ready")
async def ready(request: ServerRequest) -> dict[str, str]:
    """200 while the engine accepts requests; 503 otherwise."""
    if not request.engine.is_ready:
        raise EngineUnavailableError("The engine has stopped. Start the server again.")
    return {"status": "ready"}


@status_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
)
async def metrics(request: ServerRequest) -> Response:
    """All series, including what the policy does not disclose."""
    return Response(request.observer.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@status_router.get("/version")
async def get_version() -> dict[str, str]:
    """The installed version."""
    return {"version": version("sidelight")}


_ROUTERS = (
    chat.router,
    checks.router,
    guardrail.router,
    classify.router,
    detectors.router,
    questions.router,
    admin.models_router,
    status_router,
    admin.admin_probes_router,
)


def create_app(
    engine: Engine,
    config: ServerConfig | None = None,
) -> FastAPI:
    """Create the application, which starts the engine on startup and closes it on shutdown.

    Args:
        engine: Engine that serves requests.
        config: Configuration; None uses the defaults, with keys from the environment.

    Raises:
        SidelightError: As for ``ServerContext``.
    """
    config = config or ServerConfig()
    context = ServerContext(engine, config)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.close()
            await context.registry.judges.close()
            if context.observer.audit is not None:
                context.observer.audit.close()

    pages = playground() if config.playground else {}
    return application(
        context,
        (*_ROUTERS, page_router(pages)),
        lifespan=lifespan,
        # Browsers do not send a key when opening a page.
        open_paths=tuple(pages),
    )


def application(
    context: ServerContext,
    routers: Sequence[APIRouter],
    *,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    open_paths: Collection[str] = (),
) -> FastAPI:
    """Build the application with these routes; ``open_paths`` need no key."""
    # A redirect would use the host that the client sent.
    app = FastAPI(
        title="Sidelight", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.context = context
    config = context.config
    for router in routers:
        app.include_router(router, responses=REFUSALS)
    add_error_handlers(app)
    # The last middleware is outermost, so refused requests are counted too.
    app.add_middleware(
        Gatekeeper,
        access=config.access,
        hides_scores=lambda: context.registry.hides_scores,
        defers=lambda: context.registry.defers,
        open_paths=open_paths,
        hosts=config.hosts,
    )
    app.add_middleware(
        RequestScope,
        observer=context.observer,
        deadline=config.deadline,
    )
    return app


def serve(load: Callable[[], Engine], config: ServerConfig) -> None:
    """Serve until SIGINT or SIGTERM, which is raised again once running requests have finished.

    The port is bound immediately; clients that connect before ``load`` returns wait.

    Args:
        load: Function that loads the engine.
        config: The configuration.

    Raises:
        SidelightError: The address cannot be bound, or the server would be open to other machines
            without a key.
    """
    require_keys(config)
    # An audit log that cannot be written is refused before the model is loaded.
    if audit := audit_of(config):
        audit.close()
    with listen(config) as listener:
        dictConfig(log_settings(config.log_level, as_json=config.json_logs))
        _log.info("Loading the model")
        app = create_app(load(), config)
        place = (config.host, listener.getsockname()[1])
        rules = app.state.context.registry.rules
        served = ", ".join(f"{bound.name} ({bound.mode})" for bound in rules)
        _log.info("Probes: %s", served or "none, so no text is classified")
        _log.info("Listening on http://%s:%d (Ctrl-C stops)", *place)
        if config.playground:
            _log.info("The playground is at http://%s:%d/playground", *place)
        _Server(server_settings(app, config)).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's server, which logs what the shutdown waits for."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        running, limit_s = len(self.server_state.tasks), self.config.timeout_graceful_shutdown
        _log.info("Stopping: waiting up to %s s for running requests: %d", limit_s, running)
        await super().shutdown(sockets)


def listen(config: ServerConfig) -> socket.socket:
    """Bind the server's address.

    Raises:
        SidelightError: The address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise cannot_listen(config, error) from error


def require_keys(config: ServerConfig) -> None:
    """Check that other machines need a key, unless anonymous access is allowed.

    Raises:
        SidelightError: Other machines would be served without a key.
    """
    if config.host not in LOOPBACK and not config.access.keys and not config.allow_anonymous:
        raise SidelightError(
            f"Anyone who can reach {config.host} could use this server. Set SIDELIGHT_API_KEY or "
            "--api-keys-file, or pass --allow-anonymous if access is restricted by other means."
        )


def cannot_listen(config: ServerConfig, error: OSError) -> SidelightError:
    return SidelightError(
        f"Cannot listen on {config.host}:{config.port} ({error.strerror}). Choose another --port "
        "or --host."
    )


def server_settings(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=log_settings(config.log_level, as_json=config.json_logs),
        timeout_graceful_shutdown=ceil(config.drain_s),
    )
