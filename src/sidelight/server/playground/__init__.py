"""The playground: a page in a browser.

Its files are served unchanged, contain no secrets, and load nothing from other hosts. The page gets
its data from the API with the user's own key.
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
    """The paths of the playground, each with its file or its redirect target."""
    # Relative, because a host from the client must not be used.
    moved = {"/": "playground", "/playground/": "../playground"}
    files = (path for path in sorted(_HERE.iterdir()) if path.suffix in (".js", ".css", ".svg"))
    named = {f"/playground/{file.name}": file for file in files}
    return {"/playground": _HERE / "index.html", **named, **moved}


def page_router(pages: Mapping[str, Path | str]) -> APIRouter:
    """Serve these files and redirects, excluded from the OpenAPI document."""
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
