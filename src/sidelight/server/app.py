"""The HTTP application: an engine behind OpenAI's API.

To add an endpoint, write its file in ``endpoints/`` and add its router to the list below.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from sidelight.engines.base import Engine
from sidelight.server.access_log import LogRequests
from sidelight.server.admission import BoundRequests
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
from sidelight.server.metrics import CountRequests
from sidelight.server.openapi import REFUSALS
from sidelight.server.policy import require_fitting
from sidelight.server.roster import Roster
from sidelight.server.service import Service
from sidelight.server.tracing import TraceRequests

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
    roster = Roster(engine, chosen.policy, chosen.sources)
    app.state.context = context = Context.new(engine, roster, chosen.limits, chosen.audit)
    for router in _ROUTERS:
        app.include_router(router, responses=REFUSALS)
    add_error_handlers(app)
    # The last one added stands outermost: refused requests are counted too.
    app.add_middleware(Deadline, seconds=chosen.limits.deadline_s, drain=context.drain)
    app.add_middleware(BoundRequests, limit=chosen.limits.concurrent)
    app.add_middleware(BearerAuth, access=chosen.access)
    app.add_middleware(CountRequests, metrics=context.metrics)
    if chosen.traces is not None:
        app.add_middleware(TraceRequests, sink=chosen.traces)
    app.add_middleware(AnswerCrashes)
    app.add_middleware(LogRequests)
    return app
