"""``GET /ready``: whether requests would be served now."""

from fastapi import APIRouter

from sidelight.engines.base import EngineUnavailableError
from sidelight.server.context import InContext

router = APIRouter()


@router.get("/ready")
async def ready(context: InContext) -> dict[str, str]:
    """200 once the model is loaded; 503 before, and once the server is about to stop."""
    if context.drain.is_draining:
        raise EngineUnavailableError("The server is about to stop. Ask another one.")
    if not context.engine.is_ready:
        raise EngineUnavailableError("The model is still loading, or its engine has stopped.")
    return {"status": "ready"}
