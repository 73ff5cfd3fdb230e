"""The pages that the server shows in a browser: the playground, and the reference of the API.

They are files as they lie here, hold nothing secret, and load nothing from elsewhere; what they
show comes from the API, by the user's own key.
"""

from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

_HERE = Path(__file__).parent
_SOURCES = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
STRICT = f"default-src 'self'; {_SOURCES}"
# Swagger UI writes styles into its page, and has its icons in its stylesheet.
_LOOSE_STYLES = f"{STRICT}; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


def reference() -> dict[str, Path]:
    """The API's reference: each path with its file."""
    # Not where the pages are vLLM's own.
    import fastapi_offline

    swagger = Path(fastapi_offline.__file__).parent / "static"
    return {
        "/docs": _HERE / "docs.html",
        "/docs/docs.js": _HERE / "docs.js",
        "/docs/icon.svg": _HERE / "icon.svg",
        "/docs/swagger-ui.css": swagger / "swagger-ui.css",
        "/docs/swagger-ui-bundle.js": swagger / "swagger-ui-bundle.js",
    }


def playground() -> dict[str, Path]:
    """The playground: each path with its file."""
    files = (path for path in sorted(_HERE.iterdir()) if path.suffix in (".js", ".css", ".svg"))
    return {"/playground": _HERE / "index.html", **{f"/playground/{f.name}": f for f in files}}


def page_router(pages: Mapping[str, Path]) -> APIRouter:
    """Serves these files, outside of the OpenAPI document."""
    router = APIRouter()
    for path, file in pages.items():
        router.add_route(path, _page(file), include_in_schema=False)
    return router


def _page(file: Path) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    headers = {
        "Content-Security-Policy": _LOOSE_STYLES if file.name == "docs.html" else STRICT,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    async def page(_request: Request) -> Response:
        return FileResponse(file, headers=headers)

    return page
