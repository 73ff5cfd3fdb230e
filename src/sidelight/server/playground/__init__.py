"""The playground: a page in a browser.

Its files are served as they lie here, hold nothing secret, and load nothing from elsewhere; what
they show comes from the API, by the user's own key.
"""

from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

_HERE = Path(__file__).parent
STRICT = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
_HEADERS = {
    "Content-Security-Policy": STRICT,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def playground() -> dict[str, Path | str]:
    """The playground: each path with its file, or with the path that it leads to."""
    # Relative, as no host may be named that a client wrote.
    moved = {"/": "playground", "/playground/": "../playground"}
    files = (path for path in sorted(_HERE.iterdir()) if path.suffix in (".js", ".css", ".svg"))
    named = {f"/playground/{file.name}": file for file in files}
    return {"/playground": _HERE / "index.html", **named, **moved}


def page_router(pages: Mapping[str, Path | str]) -> APIRouter:
    """Serve these files and redirects, outside of the OpenAPI document."""
    router = APIRouter()
    for path, file in pages.items():
        router.add_route(path, _page(file), include_in_schema=False)
    return router


def _page(file: Path | str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def page(_request: Request) -> Response:
        if isinstance(file, str):
            return RedirectResponse(file, headers=_HEADERS)
        return FileResponse(file, headers=_HEADERS)

    return page
