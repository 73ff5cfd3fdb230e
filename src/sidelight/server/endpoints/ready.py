"""``GET /ready``: whether requests would be served now."""

from fastapi import APIRouter

from sidelight.engines.base import EngineUnavailableError
from sidelight.server.context import InContext

router = APIRouter()


@router.get("/ready")
async def ready(context: InContext) -> dict[str, str]:
    """200 once the model is loaded, 503 before and after the engine has stopped."""
    if not context.engine.is_ready:
        raise EngineUnavailableError("The model is still loading, or its engine has stopped.")
    return {"status": "ready"}
