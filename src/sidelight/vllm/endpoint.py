"""Verdicts in the chat answers of vLLM's own server (``vllm.endpoint_plugins``).

vLLM loads this if ``VLLM_PLUGINS`` names ``sidelight``. An ASGI middleware puts the verdicts into
the answers to chat requests; it adds no route and changes no request. Bodies are rewritten as JSON;
a stream gets extra chunks with ``choices: []``. The answer to a post to any other route has a
header that says that it has no verdicts, since not all of those answers have a place for them.
"""

# pyright: reportMissingImports=false

import json
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from sidelight.vllm.patches import served_by
from sidelight.vllm.requests import OutputListener, StepReport
from sidelight.vllm.settings import KEY

_PATH = "/v1/chat/completions"
_DONE = b"data: [DONE]"
_EVENT_END = b"\n\n"
_NOT_JUDGED = {"error": "The request was not judged."}
_NO_VERDICTS = (b"x-sidelight-error", b"no verdicts: only " + _PATH.encode() + b" has them")


@dataclass
class Report:
    """What the engine reports on the texts of one HTTP request.

    Attributes:
        texts: How many texts are written.
        newest: The newest report on each text, by its index.
    """

    texts: int = 1
    newest: dict[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])

    def take(self, step: StepReport) -> None:
        if step.params and KEY in step.params:
            self.newest[step.text] = step.params[KEY]

    def extension(self) -> dict[str, Any]:
        """As in our own server's answers. Of several texts, each entry names its ``choice``.

        A text without a report is an entry with ``error``.
        """
        reports = [self.newest.get(index, _NOT_JUDGED) for index in range(self.texts)]
        if self.texts > 1:
            numbered = enumerate(map(_entries, reports))
            return {"verdicts": [{"choice": i, **entry} for i, own in numbered for entry in own]}
        (report,) = reports
        return {"verdicts": _entries(report)} if "verdicts" in report else dict(report)


_report: ContextVar[Report | None] = ContextVar("sidelight_report", default=None)


def current_report() -> Report | None:
    """The report on the current HTTP request."""
    return _report.get()


class ProbeMiddleware:
    """Wraps vLLM's application."""

    def __init__(self, app: ASGIApp, *, is_served: Callable[[], bool]):
        self._app = app
        self._is_served = is_served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Adds to the answers to chat requests, and marks the answers to other posts."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if not is_post or not self._is_served():
            await self._app(scope, receive, send)
            return
        if scope["path"] != _PATH:
            await self._app(scope, receive, _marked(send))
            return
        report = Report()
        token = _report.set(report)
        try:
            await self._app(scope, receive, _Answer(send, report))
        finally:
            _report.reset(token)


class _Answer:
    """Passes an answer on with the verdicts in it."""

    def __init__(self, send: Send, report: Report):
        self._send = send
        self._report = report
        self._start: Event = {}
        self._is_stream = False
        self._body = b""
        self._sent: dict[str, Any] | None = None

    async def __call__(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self._start = event
            kind = dict(event["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            if self._is_stream:
                await self._send(event)
        elif self._is_stream:
            await self._send({**event, "body": self._with_chunks(event.get("body", b""))})
        else:
            self._body += event.get("body", b"")
            if not event.get("more_body"):
                await self._finish()

    def _with_chunks(self, body: bytes) -> bytes:
        """Adds a chunk with the verdicts at the start, and one at the end if they have changed."""
        extension = {KEY: self._report.extension()}
        # Compared as whole events, since a model may write the words of the last one.
        events = body.split(_EVENT_END)
        is_due = self._sent is None or _DONE in events
        if not body or not is_due or extension == self._sent:
            return body
        self._sent = extension
        chunk = {"object": "chat.completion.chunk", "choices": [], **extension}
        place = events.index(_DONE) if _DONE in events else 0
        events.insert(place, b"data: " + json.dumps(chunk).encode())
        return _EVENT_END.join(events)

    async def _finish(self) -> None:
        body = self._body
        if self._start["status"] == 200:
            body = json.dumps({**json.loads(body), KEY: self._report.extension()}).encode()
        headers = _with_length(self._start["headers"], len(body))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _marked(send: Send) -> Send:
    """Sends an answer on with the header that says that it has no verdicts."""

    async def marked(event: Event) -> None:
        if event["type"] == "http.response.start":
            event = {**event, "headers": [*event["headers"], _NO_VERDICTS]}
        await send(event)

    return marked


def _entries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each probe, or one that says why there is none."""
    if "verdicts" not in report:
        return [dict(report)]
    return [{"probe": name, **fields} for name, fields in report["verdicts"].items()]


def _with_length(headers: Sequence[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*others, (b"content-length", str(length).encode())]


class ProbeEndpoint:
    """vLLM's interface for endpoint plugins."""

    name = KEY
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._is_served = False

    def attach_router(self, app: Any) -> None:
        """Adds the middleware inside vLLM's own authentication."""
        app.add_middleware(ProbeMiddleware, is_served=lambda: self._is_served)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Listens to the engine's reports, if it has probes."""
        if engine_client is None or served_by(engine_client.vllm_config) is None:
            return
        self._is_served = True
        listener = OutputListener(engine_client.output_processor)
        engine_client.generate = _listened(engine_client.generate, listener)


def _listened(
    generate: Callable[..., AsyncGenerator[Any, None]], listener: OutputListener
) -> Callable[..., AsyncGenerator[Any, None]]:
    """The engine's outputs; its reports go to the HTTP request that they belong to."""

    async def outputs(
        prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        report = current_report() or Report()
        report.texts = params.n
        # Clients may name their requests, and two may choose the same name.
        own_id = f"{request_id}-{uuid.uuid4().hex}"
        with listener.to(own_id, report.take):
            async with aclosing(generate(prompt, params, own_id, **options)) as written:
                async for output in written:
                    yield output

    return outputs
