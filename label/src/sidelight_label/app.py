"""The page of a sitting and what it asks for, on this machine and for who holds the token."""

import secrets
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
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
    "/label.js": _PAGE / "label.js",
    "/label.css": _PAGE / "label.css",
    "/style.css": _SHARED / "style.css",
    "/icon.svg": _SHARED / "icon.svg",
    "/dom.js": _SHARED / "dom.js",
    "/api.js": _SHARED / "api.js",
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    row: int


class _Decision(_Body):
    labels: list[str]


def create_app(queue: LabelQueue, token: str) -> FastAPI:
    """The page for a queue. All but its files needs the token."""
    app = FastAPI(openapi_url=None)
    app.state.queue = queue
    app.state.failure = ""
    app.include_router(page_router(_FILES))
    app.include_router(_router)
    app.add_exception_handler(SidelightError, _refuse)
    app.add_middleware(_Guard, token=token)
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
    """Lets only the page itself ask: other sites, other names of the host and other users do not.

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
        own = f"{HOST}:{scope['server'][1]}"
        given = headers.get("authorization", "").encode()
        is_page = scope["path"] in _FILES
        refusal: JSONResponse | None = None
        if headers.getlist("host") != [own]:
            refusal = _error(421, f"This page is at http://{own} only.")
        elif any(origin != f"http://{own}" for origin in headers.getlist("origin")):
            refusal = _error(403, "Another site asked for this.")
        elif not is_page and not secrets.compare_digest(given, self._expected):
            refusal = _error(401, "Open the address that 'sidelight label' printed.")
        await (refusal or self._app)(scope, receive, send)


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    return _error(409 if isinstance(error, ConflictError) else 400, str(error))


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status, {"Cache-Control": "no-store"})


_router = APIRouter()


@_router.get("/api/state")
def get_state(request: Request) -> JSONResponse:
    return _state(request)


@_router.post("/api/label")
def label(request: Request, body: _Decision) -> JSONResponse:
    _queue(request).label(body.row, body.labels)
    return _state(request)


@_router.post("/api/skip")
def skip(request: Request, body: _Body) -> JSONResponse:
    _queue(request).skip(body.row)
    return _state(request)


@_router.post("/api/undo")
def undo(request: Request, body: _Body) -> JSONResponse:
    _queue(request).undo(body.row)
    return _state(request)


@_router.post("/api/train")
def train(request: Request) -> JSONResponse:
    """Begins a training; the state says when it has ended."""
    queue, state = _queue(request), request.app.state
    if queue.is_training:
        return _state(request)
    if obstacle := queue.obstacle:
        raise SidelightError(obstacle)

    def run() -> None:
        try:
            queue.train()
        except SidelightError as error:
            state.failure = str(error)
        except Exception as error:  # noqa: BLE001 - the page says so, and labelling goes on
            state.failure = f"The training failed: {type(error).__name__}."

    state.failure = ""
    state.training = threading.Thread(target=run, daemon=True)
    state.training.start()
    return _state(request)


def _queue(request: Request) -> LabelQueue:
    return request.app.state.queue


def _state(request: Request) -> JSONResponse:
    queue = _queue(request)
    state = {
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
            "failure": request.app.state.failure,
            "folder": str(queue.folder),
        },
        "figures": [asdict(one) for one in queue.figures],
        "text": _text(queue),
    }
    return JSONResponse(state, headers={"Cache-Control": "no-store"})


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
