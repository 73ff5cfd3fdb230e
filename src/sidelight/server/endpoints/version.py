"""``GET /version``: which Sidelight this is."""

from importlib.metadata import version

from fastapi import APIRouter

router = APIRouter()


@router.get("/version")
async def get_version() -> dict[str, str]:
    """The installed version."""
    return {"version": version("sidelight")}
