"""``GET /metrics``: counts and times in Prometheus' text format."""

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from sidelight.server.context import InContext

router = APIRouter()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
)
async def metrics(context: InContext) -> Response:
    """All series."""
    return Response(context.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
