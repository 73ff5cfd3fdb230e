"""Verdicts in the chat answers of vLLM's own server (``vllm.endpoint_plugins``).

vLLM loads this if ``VLLM_PLUGINS`` names ``sidelight``. An ASGI middleware describes chat requests
on their way in and puts the verdicts into the answers on their way out; it adds no route. A request
that cannot be described goes on without a description, even if the client gave one, and its answer
says that it was not judged. Bodies are rewritten as JSON; a stream gets extra chunks with
``choices: []``. The answer to a post to any other route has a header that says that it was not
judged, since not all of those answers have a place for it.
"""

# pyright: reportMissingImports=false

import json
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event
from transformers import AutoTokenizer

from sidelight.artifact import load_probe
from sidelight.errors import SidelightError
from sidelight.probe import common_format
from sidelight.prompts import Message, PromptEncoder
from sidelight.vllm.patches import served_by
from sidelight.vllm.requests import OutputListener, StepReport
from sidelight.vllm.settings import KEY, request_params

_PATH = "/v1/chat/completions"
_PARAMS = "kv_transfer_params"
_DONE = b"data: [DONE]"
_EVENT_END = b"\n\n"
_TOO_DEEP = {
    "error": {
        "message": "The body is nested too deep. Send plain messages.",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }
}
_NOT_JUDGED = {"error": "The request was not judged."}
_NOT_JUDGED_HEADER = (b"x-sidelight-error", b"not judged: only " + _PATH.encode() + b" is")


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


@dataclass
class RequestDescriber:
    """Describes what a chat request's tokens belong to, once it has an encoder."""

    encoder: PromptEncoder | None = None

    def describe(self, body: bytes) -> bytes:
        """The body with our description of its tokens, and without any of the client's.

        Raises:
            RecursionError: The body is nested too deep to be read.
        """
        assert self.encoder is not None
        try:
            request = json.loads(body)
        except ValueError:
            # vLLM itself reports what is wrong with it.
            return body
        if not isinstance(request, dict):
            return body
        described = cast(dict[str, Any], request)
        given = described.get(_PARAMS)
        if given is None or isinstance(given, dict):
            others = {k: v for k, v in (given or {}).items() if k != KEY}
            described = {**described, _PARAMS: {**others, **self._params(described)} or None}
        return json.dumps(described).encode()

    def _params(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The description of the tokens; nothing if they cannot be described."""
        assert self.encoder is not None
        try:
            prompt = self.encoder.encode([_message(turn) for turn in request["messages"]])
        except (ValueError, KeyError, TypeError, SidelightError):
            # vLLM refuses it, or answers without a verdict, which the answer says.
            return {}
        return request_params(prompt)


class ProbeMiddleware:
    """Wraps vLLM's application."""

    def __init__(self, app: ASGIApp, *, describer: RequestDescriber):
        self._app = app
        self._describer = describer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rewrites chat requests and their answers, and marks the answers to other posts."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if not is_post or self._describer.encoder is None:
            await self._app(scope, receive, send)
            return
        if scope["path"] != _PATH:
            await self._app(scope, receive, _marked(send))
            return
        try:
            body = self._describer.describe(await _whole_body(receive))
        except RecursionError:
            await JSONResponse(_TOO_DEEP, status_code=400)(scope, receive, send)
            return
        headers = _with_length(scope["headers"], len(body))
        report = Report()
        token = _report.set(report)
        try:
            inner = _replayed(body, receive)
            await self._app({**scope, "headers": headers}, inner, _Answer(send, report))
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
    """Sends an answer on with the header that says that it was not judged."""

    async def marked(event: Event) -> None:
        if event["type"] == "http.response.start":
            event = {**event, "headers": [*event["headers"], _NOT_JUDGED_HEADER]}
        await send(event)

    return marked


def _entries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each probe, or one that says why there is none."""
    if "verdicts" not in report:
        return [dict(report)]
    return [{"probe": name, **fields} for name, fields in report["verdicts"].items()]


def _message(turn: Mapping[str, Any]) -> Message:
    content = turn["content"]
    if isinstance(content, str):
        return Message(turn["role"], content)
    # Joined as vLLM joins parts for templates that take text.
    texts = [part["text"] for part in cast(Sequence[Mapping[str, Any]], content)]
    return Message(turn["role"], "\n".join(texts))


async def _whole_body(receive: Receive) -> bytes:
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body"):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what the client sends: that it has left."""
    waiting: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_event() -> Event:
        return waiting.pop() if waiting else await receive()

    return next_event


def _with_length(headers: Sequence[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*others, (b"content-length", str(length).encode())]


class ProbeEndpoint:
    """vLLM's interface for endpoint plugins."""

    name = KEY
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._describer = RequestDescriber()

    def attach_router(self, app: Any) -> None:
        """Adds the middleware inside vLLM's own authentication."""
        app.add_middleware(ProbeMiddleware, describer=self._describer)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Learns the model's chat template, and listens to the engine's reports."""
        if engine_client is None:
            return
        served = served_by(engine_client.vllm_config)
        if served is None:
            return
        model = engine_client.model_config
        self._describer.encoder = PromptEncoder(
            AutoTokenizer.from_pretrained(model.tokenizer),
            prompt_format=common_format(map(load_probe, served.folders)) or "chat",
            max_tokens=model.max_model_len,
        )
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
