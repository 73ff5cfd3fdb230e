"""The HTTP application: an engine behind OpenAI's API.

To add an endpoint, write its file in ``endpoints/`` and add its router to the list below.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from sidelight.engines.base import Engine
from sidelight.server.access_log import LogRequests
from sidelight.server.admission import BoundRequests
from sidelight.server.audit import AuditLog
from sidelight.server.auth import BearerAuth
from sidelight.server.context import Context
from sidelight.server.crash import AnswerCrashes
from sidelight.server.deadline import Deadline
from sidelight.server.endpoints import (
    admin_probes,
    chat_completions,
    classify,
    completions,
    decisions,
    guardrail,
    health,
    metrics,
    models,
    moderations,
    ready,
    systemone,
    tokenize,
    version,
)
from sidelight.server.errors import add_error_handlers
from sidelight.server.keys import Access
from sidelight.server.limits import ServerLimits
from sidelight.server.metrics import CountRequests
from sidelight.server.openapi import REFUSALS
from sidelight.server.policy import Policy, require_fitting
from sidelight.server.roster import Roster
from sidelight.server.tracing import Sink, TraceRequests

_ROUTERS = (
    chat_completions.router,
    completions.router,
    moderations.router,
    decisions.router,
    systemone.router,
    classify.router,
    guardrail.router,
    tokenize.router,
    models.router,
    health.router,
    ready.router,
    metrics.router,
    version.router,
    admin_probes.router,
)


def create_app(
    engine: Engine,
    *,
    policy: Policy | None = None,
    sources: Mapping[str, Path] | None = None,
    access: Access | None = None,
    limits: ServerLimits | None = None,
    audit: AuditLog | None = None,
    traces: Sink | None = None,
) -> FastAPI:
    """The application; it starts the engine when it starts, and closes it when it ends.

    Args:
        engine: What answers; ``LoadingEngine`` for one whose model takes a while.
        policy: What follows from verdicts; None: nothing, they are told.
        sources: The folders that probes came from, by name: where they are reloaded from.
        access: Who may do what; None: everybody everything but administer.
        limits: How much a request may take.
        audit: Where decisions are written; None: nowhere.
        traces: Takes what there is to tell of each request; None: nobody.
    """
    rules = policy or Policy()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await engine.start()
        try:
            if engine.is_ready:
                require_fitting(rules, engine.probes)
            yield
        finally:
            await engine.close()

    app = FastAPI(title="Sidelight", lifespan=lifespan)
    bounds = limits or ServerLimits()
    roster = Roster(engine, rules, sources or {})
    app.state.context = context = Context.new(engine, roster, bounds, audit)
    for router in _ROUTERS:
        app.include_router(router, responses=REFUSALS)
    add_error_handlers(app)
    # The last one added stands outermost: refused requests are counted too.
    app.add_middleware(Deadline, seconds=bounds.deadline_s, drain=context.drain)
    app.add_middleware(BoundRequests, limit=bounds.concurrent)
    app.add_middleware(BearerAuth, access=access or Access())
    app.add_middleware(CountRequests, metrics=context.metrics)
    if traces is not None:
        app.add_middleware(TraceRequests, sink=traces)
    app.add_middleware(AnswerCrashes)
    app.add_middleware(LogRequests)
    return app
