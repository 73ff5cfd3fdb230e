"""The labelling page and its API: this machine only, and the token is required."""

import secrets
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sidelight import server
from sidelight.errors import SidelightError
from sidelight.server.playground import page_router
from sidelight_label.queue import ConflictError, LabelQueue

HOST = "127.0.0.1"
_PAGE = Path(__file__).parent / "page"
_SHARED = Path(server.__file__).parent / "playground"
# Each path with its file, so no path leads elsewhere.
_FILES: Mapping[str, Path] = {
    "/": _PAGE / "index.html",
    **{f"/{name}": _PAGE / name for name in ("label.js", "label.css")},
    **{f"/{name}": _SHARED / name for name in ("style.css", "icon.svg", "dom.js", "api.js")},
}


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    row: int


class _Decision(_Text):
    labels: list[str]


def create_app(queue: LabelQueue, token: str) -> FastAPI:
    """The page for a queue. All but its files needs the token."""
    app = FastAPI(openapi_url=None)
    app.include_router(page_router(_FILES))
    app.add_exception_handler(SidelightError, _refuse)
    app.add_middleware(_Guard, token=token)
    failure = ""

    @app.get("/api/state")
    def state() -> JSONResponse:
        headers = {"Cache-Control": "no-store"}
        return JSONResponse(_state(queue, failure), headers=headers)

    @app.post("/api/label")
    def label(body: _Decision) -> JSONResponse:
        queue.label(body.row, body.labels)
        return state()

    @app.post("/api/skip")
    def skip(body: _Text) -> JSONResponse:
        queue.skip(body.row)
        return state()

    @app.post("/api/undo")
    def undo(body: _Text) -> JSONResponse:
        queue.undo(body.row)
        return state()

    def run_training() -> None:
        nonlocal failure
        try:
            queue.train()
        except SidelightError as error:
            failure = str(error)
        except Exception as error:  # noqa: BLE001 - the page says so, and labelling goes on
            failure = f"The training failed: {type(error).__name__}."

    @app.post("/api/train")
    def train() -> JSONResponse:
        """Begins a training; the state says when it has ended."""
        nonlocal failure
        if not queue.is_training:
            if obstacle := queue.obstacle:
                raise SidelightError(obstacle)
            failure = ""
            threading.Thread(target=run_training, daemon=True).start()
        return state()

    return app


def server_settings(queue: LabelQueue, token: str) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(queue, token),
        host=HOST,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        # A browser keeps its connection open.
        timeout_graceful_shutdown=1,
    )


def serve(queue: LabelQueue, listener: socket.socket, token: str) -> None:
    """Serves the page until SIGINT or SIGTERM."""
    # uvicorn raises a SIGINT again once it has stopped.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(server_settings(queue, token)).run(sockets=[listener])


class _Guard:
    """Refuses other sites, other names of this host, and whoever does not have the token.

    A page of another site has another origin. One whose name was rebound to this machine sends its
    own name as the host. Another user of the machine does not know the token.
    """

    def __init__(self, app: ASGIApp, token: str):
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        address = f"{HOST}:{scope['server'][1]}"
        token = headers.get("authorization", "").encode()
        refusal: JSONResponse | None = None
        if headers.getlist("host") != [address]:
            refusal = _error(421, f"This page is at http://{address} only.")
        elif any(origin != f"http://{address}" for origin in headers.getlist("origin")):
            refusal = _error(403, "Another site asked for this.")
        elif scope["path"] not in _FILES and not secrets.compare_digest(token, self._expected):
            refusal = _error(401, "Open the address that 'sidelight label' printed.")
        await (refusal or self._app)(scope, receive, send)


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    return _error(409 if isinstance(error, ConflictError) else 400, str(error))


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status, {"Cache-Control": "no-store"})


def _state(queue: LabelQueue, failure: str) -> dict[str, Any]:
    return {
        "kind": queue.pool.task.kind,
        "labels": list(queue.pool.task.labels),
        "counts": queue.counts,
        "done": len(queue.decided),
        "skipped": queue.skipped,
        "total": len(queue.pool.examples),
        "order": queue.order,
        "last": queue.last,
        "training": {
            "is_running": queue.is_training,
            "obstacle": queue.obstacle,
            "failure": failure,
            "folder": str(queue.folder),
        },
        "figures": [asdict(figures) for figures in queue.figures],
        "text": _text(queue),
    }


def _text(queue: LabelQueue) -> dict[str, Any] | None:
    row = queue.next()
    if row is None:
        return None
    item, prompt = queue.pool.examples.items[row], queue.pool.prompts[row]
    return {
        "row": row,
        "messages": [{"role": m.role, "content": m.content} for m in item.messages],
        "response": item.response,
        "tokens": len(prompt) + prompt.dropped,
        "dropped": prompt.dropped,
        "opinions": queue.opinions(row),
    }
