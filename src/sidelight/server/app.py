"""The HTTP application: an engine behind OpenAI's API.

To add an endpoint, write its file in ``endpoints/`` and add its router to the list below.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from sidelight.engines.base import Engine
from sidelight.server.auth import BearerAuth
from sidelight.server.context import Context
from sidelight.server.endpoints import (
    chat_completions,
    classify,
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

_ROUTERS = (
    chat_completions.router,
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
)
MAX_BODY_BYTES = 4 * 2**20


def create_app(
    engine: Engine, *, api_keys: Sequence[str] = (), max_body_bytes: int = MAX_BODY_BYTES
) -> FastAPI:
    """The application; it starts the engine when it starts, and closes it when it ends.

    Args:
        engine: What answers; ``LoadingEngine`` for one whose model takes a while.
        api_keys: Keys of which requests must carry one; none: everybody is served.
        max_body_bytes: Larger requests are refused unread.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await engine.start()
        yield
        await engine.close()

    app = FastAPI(title="Sidelight", lifespan=lifespan)
    app.state.context = context = Context.new(engine)
    app.state.max_body_bytes = max_body_bytes
    for router in _ROUTERS:
        app.include_router(router, responses=REFUSALS)
    add_error_handlers(app)
    # The last one added stands outermost: refused requests are counted too.
    app.add_middleware(BearerAuth, keys=api_keys)
    app.add_middleware(CountRequests, metrics=context.metrics)
    return app
