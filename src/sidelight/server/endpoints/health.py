"""``GET /health``: the server lives. Open to all, and says nothing else."""

from fastapi import APIRouter

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Always the same answer."""
    return {"status": "ok"}
