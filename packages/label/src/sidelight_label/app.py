"""The labelling page and its API: this machine only, and the token is required."""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from sidelight import server
from sidelight.errors import SidelightError
from sidelight.server.errors import add_error_handlers
from sidelight.server.keys import Access, Key
from sidelight.server.middleware import Gatekeeper
from sidelight.server.playground import page_router
from sidelight_label.queue import LabelQueue

_PAGE = Path(__file__).parent / "page"
_SHARED = Path(server.__file__).parent / "playground"
# Each path with its file, so no path leads elsewhere.
FILES: Mapping[str, Path] = {
    "/": _PAGE / "index.html",
    **{f"/{name}": _PAGE / name for name in ("label.js", "label.css")},
    **{f"/{name}": _SHARED / name for name in ("style.css", "icon.svg", "dom.js", "api.js")},
}


class _Decision(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    row: int
    labels: list[str] = []


def create_app(queue: LabelQueue, token: str) -> FastAPI:
    """The page for a queue. All but its files needs the token."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.include_router(page_router(FILES))
    add_error_handlers(app)
    access = Access((Key.of("page", token),))
    app.add_middleware(
        Gatekeeper,
        access=access,
        withholds=lambda: False,
        open_paths=FILES,
        hosts=("127.0.0.1",),
    )
    training: Future[None] | None = None

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        return _state(queue, training)

    @app.post("/api/label")
    def label(body: _Decision) -> dict[str, Any]:
        queue.label(body.row, body.labels)
        return state()

    @app.post("/api/skip")
    def skip(body: _Decision) -> dict[str, Any]:
        queue.skip(body.row)
        return state()

    @app.post("/api/undo")
    def undo(body: _Decision) -> dict[str, Any]:
        queue.undo(body.row)
        return state()

    def run(begun: Future[None]) -> None:
        try:
            begun.set_result(queue.train())
        except Exception as error:  # noqa: BLE001 - the page says so, and labelling goes on
            begun.set_exception(error)

    @app.post("/api/train")
    async def train() -> dict[str, Any]:
        """Begins a training; the state says when it has ended."""
        nonlocal training
        # Two tabs begin one: the loop runs this as a whole.
        if training is None or training.done():
            if obstacle := queue.obstacle:
                raise SidelightError(obstacle)
            training = Future()
            # Ctrl-C does not wait for it.
            Thread(target=run, args=(training,), daemon=True).start()
        return state()

    return app


def _state(queue: LabelQueue, training: Future[None] | None) -> dict[str, Any]:
    return {
        "kind": queue.pool.task.kind,
        "labels": list(queue.pool.task.labels),
        "counts": queue.counts,
        "done": len(queue.decided),
        "skipped": len(queue.skipped),
        "total": len(queue.pool.examples),
        "order": queue.order,
        "last": queue.last,
        "training": {
            "is_running": training is not None and not training.done(),
            "obstacle": queue.obstacle,
            "failure": _failure(training),
            "folder": str(queue.folder),
        },
        "figures": queue.figures,
        "text": _text(queue),
    }


def _failure(training: Future[None] | None) -> str:
    error = training.exception() if training is not None and training.done() else None
    if error is None or isinstance(error, SidelightError):
        return str(error or "")
    return f"The training failed: {type(error).__name__}."


def _text(queue: LabelQueue) -> dict[str, Any] | None:
    row = queue.next()
    if row is None:
        return None
    item, prompt = queue.pool.examples.items[row], queue.pool.prompts[row]
    return {
        "row": row,
        "messages": item.messages,
        "response": item.response,
        "tokens": len(prompt) + prompt.dropped,
        "dropped": prompt.dropped,
        "opinions": queue.opinions(row),
    }
