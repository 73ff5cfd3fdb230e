"""The labelling page and its API, only for this machine and with a required token."""

from collections.abc import Callable, Mapping
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
# A fixed file for each path, to prevent path traversal.
FILES: Mapping[str, Path] = {
    "/": _PAGE / "index.html",
    **{f"/{name}": _PAGE / name for name in ("label.js", "label.css")},
    **{f"/{name}": _SHARED / name for name in ("style.css", "icon.svg", "dom.js", "api.js")},
}


class _Criterion(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    seen: str


class _Decision(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    row: int
    labels: list[str] = []


def create_app(queue: LabelQueue, token: str) -> FastAPI:
    """Create the page for a queue. Everything except its files needs the token."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.include_router(page_router(FILES))
    add_error_handlers(app)
    access = Access((Key.of("page", token),))
    app.add_middleware(
        Gatekeeper,
        access=access,
        hides_scores=lambda: False,
        open_paths=FILES,
        hosts=("127.0.0.1",),
    )
    training: Future[None] | None = None
    asking: Future[None] | None = None

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        return _state(queue, training, asking)

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

    def begin(work: Callable[[], None]) -> Future[None]:
        begun = Future[None]()

        def run() -> None:
            try:
                begun.set_result(work())
            except Exception as error:  # noqa: BLE001 - the page says so, and labelling goes on
                begun.set_exception(error)

        # Ctrl-C does not wait for it.
        Thread(target=run, daemon=True).start()
        return begun

    @app.post("/api/criterion")
    def criterion(body: _Criterion) -> dict[str, Any]:
        queue.change_criterion(body.text, seen=body.seen)
        return state()

    @app.post("/api/ask")
    async def ask() -> dict[str, Any]:
        """Start asking the judge; the state reports its completion."""
        nonlocal asking
        if asking is None or asking.done():
            asking = begin(queue.ask)
        return state()

    @app.post("/api/train")
    async def train() -> dict[str, Any]:
        """Start training; the state reports its completion."""
        nonlocal training
        # Two tabs start only one, because the event loop does not interrupt this.
        if training is None or training.done():
            if obstacle := queue.obstacle:
                raise SidelightError(obstacle)
            training = begin(queue.train)
        return state()

    return app


def _state(
    queue: LabelQueue, training: Future[None] | None, asking: Future[None] | None
) -> dict[str, Any]:
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
            "failure": _failure(training, "The training failed"),
            "folder": str(queue.folder),
        },
        "criterion": _criterion(queue),
        "judge": _judge_state(queue, asking),
        "comparisons": queue.comparisons,
        "text": _text(queue),
    }


def _criterion(queue: LabelQueue) -> dict[str, Any] | None:
    if queue.criterion is None:
        return None
    return {
        "text": queue.criterion.text,
        "file": queue.criterion.path.name,
        "label": queue.pool.task.labels[1] if queue.pool.task.kind == "binary" else None,
    }


def _judge_state(queue: LabelQueue, asking: Future[None] | None) -> dict[str, Any] | None:
    if queue.review is None:
        return None
    return {
        **queue.review.summarise(queue.people),
        "is_asked": asking is not None and not asking.done(),
        "failure": _failure(asking, "The judge could not be asked"),
    }


def _failure(work: Future[None] | None, what: str) -> str:
    error = work.exception() if work is not None and work.done() else None
    if error is None or isinstance(error, SidelightError):
        return str(error or "")
    return f"{what}: {type(error).__name__}."


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
