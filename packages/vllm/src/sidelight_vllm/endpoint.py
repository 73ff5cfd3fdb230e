"""Verdicts, refusals and check routes in vLLM's own server (``vllm.endpoint_plugins``).

vLLM loads this if ``VLLM_PLUGINS`` names ``sidelight``. Enforcement is in ``guard``, below HTTP. An
ASGI middleware adds the HTTP parts: the status and body of a refusal, and verdicts in headers, JSON
and streams. It also serves Sidelight's routes for checks and administration, unless vLLM uses their
paths.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

from prometheus_client import REGISTRY
from pydantic import ValidationError
from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from sidelight.errors import SidelightError
from sidelight.models.invisible import visible
from sidelight.server import admin, checks, classify, detectors, guardrail, questions
from sidelight.server.app import LOOPBACK, application, status_router
from sidelight.server.chat import ChatCompletionFormat, CompletionFormat
from sidelight.server.errors import (
    RequestError,
    as_request_error,
    routed_path,
    wrong_field,
)
from sidelight.server.keys import Caller
from sidelight.server.middleware import REQUEST_ID, Gatekeeper
from sidelight.server.schemas import ReportRequest
from sidelight_vllm import KEY
from sidelight_vllm.answers import GuardedRequest
from sidelight_vllm.guard import EngineGuard, client_request
from sidelight_vllm.internals import wrap
from sidelight_vllm.settings import server_config

_DONE = b"data: [DONE]"
_DATA = b"data: "
_EVENT_END = b"\n\n"
# Routes with OpenAI's chunks, which may have no choices.
_CHUNKED = ("/v1/chat/completions", "/v1/completions", "/invocations")
_MESSAGES = "/v1/messages"
_FORMATS = {each.chunk_kind: each for each in (CompletionFormat, ChatCompletionFormat)}
# Total text length up to which a request body is stripped.
_MOST_CHARACTERS = 2**20
# Body fields that become part of a prompt on any vLLM route.
_PROMPTS = ("messages", "prompt", "input", "instructions", "system", "tools", "documents")
# Fields that vLLM would silently ignore although clients rely on them.
_NOT_OURS = ("explain", "policies")


class ProbeEndpoint:
    """vLLM's interface for endpoint plugins.

    Attributes:
        guard: Guard of the engine; None without probes.
    """

    name = KEY
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.guard: EngineGuard | None = None
        self._routes: list[BaseRoute] = []

    def attach_router(self, app: Any) -> None:
        """Add the middleware inside vLLM's own authentication, and a gate for keys of ours."""
        self._vllm = app
        app.add_middleware(self.around)
        args = app.state.args
        keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        self._config = config = server_config(**({"api_key": keys} if keys else {}))
        access = config.access
        if keys:
            # vLLM checks keys only on some routes; ours apply to all.
            access = replace(access, keys=(), foreign_keys=access.keys)
        is_local = args.host in LOOPBACK and not keys
        hosts = config.hosts if is_local or config.allowed_host else None
        app.add_middleware(
            Gatekeeper,
            access=access,
            hides_scores=self._hides_scores,
            defers=self._defers,
            hosts=hosts,
        )

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Find the guard of the engine, and mount our routes and metrics."""
        guard: EngineGuard | None = getattr(engine_client, "sidelight_guard", None)
        if guard is None:
            return
        from vllm.entrypoints.openai.responses.protocol import ResponsesResponse

        await guard.engine.start()
        renderer = state.online_renderer
        arguments = renderer.default_chat_template_kwargs or {}
        guard.recogniser.template = renderer.chat_template, arguments
        context = copy(guard.context)
        context.config = self._config
        doors = classify.router, detectors.router, guardrail.router
        check_routers = checks.router, questions.router, *doors
        routers = *check_routers, admin.admin_probes_router, status_router
        self._application = application(context, routers)
        self._routes = [route for router in routers for route in router.routes]
        REGISTRY.register(context.observer.metrics)
        wrap(ResponsesResponse, "from_request", _truncated_response)
        self.guard = guard

    def _hides_scores(self) -> bool:
        return self.guard is not None and self.guard.context.registry.hides_scores

    def _defers(self) -> bool:
        return self.guard is not None and self.guard.context.registry.defers

    def application(self, scope: Scope) -> ASGIApp | None:
        """Our application if it serves this path, else None."""
        if all(route.matches(scope)[0] == Match.NONE for route in self._routes):
            return None
        is_theirs = any(route.matches(scope)[0] == Match.FULL for route in self._vllm.routes)
        return None if is_theirs else self._application

    def around(self, app: ASGIApp) -> ASGIApp:
        """The middleware: serves our routes, and extends vLLM's responses to POST requests."""
        return partial(self._answer, app)

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, partial(self._closing, send))
        elif self.guard is None or scope["type"] != "http":
            await app(scope, receive, send)
        elif (ours := self.application(scope)) is not None:
            # As if it were the outermost application.
            fields = {"app": ours, "root_path": "", "path": routed_path(scope)}
            await ours({**scope, **fields}, receive, send)
        elif scope["method"] != "POST":
            await app(scope, receive, send)
        else:
            await self._guarded(self.guard, app, scope, receive, send)

    async def _closing(self, send: Send, event: Event) -> None:
        """Close the judges' connections before the server may end."""
        if self.guard is not None and event["type"].startswith("lifespan.shutdown."):
            await self.guard.context.registry.judges.close()
        await send(event)

    async def _guarded(
        self, guard: EngineGuard, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        caller: Caller = scope["state"]["caller"]
        observer = guard.context.observer.of(f"req_{uuid.uuid4().hex}", key_id=caller.key_id)
        fields, receive = await _read(receive)
        async with AsyncExitStack() as stack:
            try:
                probes = _report_request(fields).probes
                served = await stack.enter_async_context(guard.engine.serving())
                context = guard.context.request_context(
                    observer, probes, for_text=True, is_admin=caller.is_admin
                )
                request = GuardedRequest(context, served)
                if context.policy.invisible_characters == "strip":
                    body = await asyncio.to_thread(_strip_body, fields, request.sent)
                    receive = _giving(body, receive) if request.sent else receive
            except SidelightError as error:
                refusal = as_request_error(error, is_admin=caller.is_admin).answer(scope)
                await refusal(scope, receive, send)
                return
            answer = _Answer(
                scope, receive, observer.annotating(send), request, observer.request_id
            )
            client_request.set(request)
            try:
                await app(scope, receive, answer)
            # vLLM may raise anything after a refusal.
            except Exception:
                if not await answer.fail():
                    raise


class _Answer:
    """Forwards a response once each prompt is classified, with the verdicts added."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, request: GuardedRequest, request_id: str
    ):
        self._scope, self._receive, self._send = scope, receive, send
        self._request = request
        # As the audit log has it.
        self._id = {REQUEST_ID: request_id}
        self._start: Event = {}
        self._is_stream = self._has_begun = self._is_over = False
        self._body = b""
        self._sent: dict[str, Any] | None = None
        self._chunk_fields: dict[str, Any] = {}

    async def __call__(self, event: Event) -> None:
        if self._is_over:
            return
        if event["type"] == "http.response.start":
            self._start = event
            kind = dict(event["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            return
        self._body += event.get("body", b"")
        is_end = not event.get("more_body")
        if not self._has_begun:
            # Routes may send data before the engine has read the prompt.
            if not is_end and not (self._is_stream and self._request.is_decided):
                return
            if self._request.refusal is not None:
                await self._refuse()
                return
        body, self._body, self._is_over = self._body, b"", is_end
        if not self._is_stream:
            body = await self._with_fields(body)
            if self._request.refusal is not None:
                await self._refuse()
                return
        elif self._request.is_decided:
            body = self._with_chunks(body)
        if not self._has_begun:
            self._has_begun = True
            await self._send(self._with_headers(len(body)))
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_end})

    async def fail(self) -> bool:
        """End the response after an exception; return whether the request was refused."""
        if self._request.refusal is None:
            return False
        if not self._has_begun:
            await self._refuse()
        elif not self._is_over:
            body = _DATA + json.dumps(self._refusal().body).encode() + _EVENT_END
            await self._send({"type": "http.response.body", "body": body})
        return True

    def _refusal(self) -> RequestError:
        assert self._request.refusal is not None
        return as_request_error(self._request.refusal, is_admin=self._request.context.is_admin)

    async def _refuse(self) -> None:
        self._is_over = True
        answer = self._refusal().answer(self._scope)
        answer.headers.update(self._id)
        await answer(self._scope, self._receive, self._send)

    def _with_headers(self, length: int) -> Event:
        start = {**self._start, "headers": [*self._start["headers"]]}
        headers = MutableHeaders(scope=start)
        if self._request.texts:
            verdicts = self._request.headers(is_stream=self._is_stream)
            headers.update({**self._id, **verdicts})
        if not self._is_stream:
            headers["content-length"] = str(length)
        return start

    async def _with_fields(self, body: bytes) -> bytes:
        """Add the verdicts to the body of a non-streamed response."""
        answer = json.loads(body) if self._request.texts and self._start["status"] == 200 else None
        if not isinstance(answer, dict):
            return body
        if answer.get("status") == "queued":
            # It is generated in the background, where vLLM cannot report a refusal.
            await self._request.decided.wait()
        _report_truncation(answer, self._request.cut)
        return json.dumps({**answer, **self._fields()}).encode()

    def _with_chunks(self, body: bytes) -> bytes:
        """Add a chunk with the verdicts at the start, and one at the end if they have changed."""
        # Compared as whole events, because a model may generate the text of the last one.
        events = body.split(_EVENT_END)
        if self._scope["path"] == _MESSAGES and any(self._request.cut):
            return _EVENT_END.join(map(_as_refusal, events))
        is_end = _DONE in events
        if self._scope["path"] not in _CHUNKED or not (self._sent is None or is_end) or not body:
            return body
        self._chunk_fields = self._chunk_fields or _chunk_fields_of(events[0])
        fields, added = self._fields(), self._tokenless_ends() if is_end else []
        if fields != self._sent:
            added.append({"choices": [], **fields})
        self._sent = fields
        place = events.index(_DONE) if is_end else 0
        chunks = [json.dumps({**self._chunk_fields, **chunk}).encode() for chunk in added]
        events[place:place] = [_DATA + chunk for chunk in chunks]
        return _EVENT_END.join(events)

    def _tokenless_ends(self) -> list[dict[str, Any]]:
        """The final chunks of texts without a sent token, which vLLM omits."""
        tokenless = {
            index: text.ended.reason
            for index, text in enumerate(self._request.choices)
            if text in self._request.tokenless and text.ended
        }
        if tokenless and not self._chunk_fields:
            name = f"cmpl-{self._id[REQUEST_ID]}"
            self._chunk_fields = {
                "id": name,
                "object": CompletionFormat.chunk_kind,
                "created": int(time.time()),
            }
        answer = _FORMATS.get(self._chunk_fields.get("object", ""), CompletionFormat)
        return [
            {"choices": [answer.choice(index, None, reason=reason)]}
            for index, reason in tokenless.items()
        ]

    def _fields(self) -> dict[str, Any]:
        """The fields as in our own server's responses."""
        fields: dict[str, Any] = {KEY: self._request.extension()}
        moderation = self._request.moderation()
        if self._scope["path"] in _CHUNKED and moderation is not None:
            fields["moderation"] = moderation
        return fields


async def _read(receive: Receive) -> tuple[dict[str, Any], Receive]:
    """Read the fields of the body, and return a replay of it. vLLM reports errors in invalid
    bodies.
    """
    events: list[Event] = []
    while not events or events[-1].get("more_body"):
        events.append(await receive())
    try:
        fields = json.loads(b"".join(event.get("body", b"") for event in events))
    except (ValueError, RecursionError):
        fields = None
    return fields if isinstance(fields, dict) else {}, _giving(events, receive)


def _giving(events: Iterable[Event], receive: Receive) -> Receive:
    """A receive channel that replays these events first."""
    left = iter(events)

    async def give() -> Event:
        return next(left, None) or await receive()

    return give


def _strip_body(fields: Mapping[str, Any], sent: dict[str, str | None]) -> list[Event]:
    """Strip invisible characters from the fields that become prompts.

    ``EngineGuard`` refuses what remains in bodies above ``_MOST_CHARACTERS``.

    Args:
        fields: The request body.
        sent: Receives the original of each text.

    Returns:
        The new body; empty if nothing was stripped.
    """
    left, is_changed = _MOST_CHARACTERS, False

    def read(value: Any) -> Any:
        nonlocal left, is_changed
        if isinstance(value, dict):
            return {name: read_field(name, each) for name, each in value.items()}
        if isinstance(value, list):
            return [*map(read, value)]
        if not isinstance(value, str):
            return value
        left -= len(value)
        text = visible(value) if left >= 0 else value
        is_changed |= text != value
        sent[text] = value if sent.get(text, value) == value else None
        return text

    def read_field(name: str, value: Any) -> Any:
        if name == "arguments" and isinstance(value, str) and "\\u" in value:
            # Tool-call arguments are JSON strings, where the characters are escaped.
            with suppress(ValueError, RecursionError):
                return read(json.dumps(json.loads(value), ensure_ascii=False))
        return read(value)

    with suppress(RecursionError):
        read_fields = {n: read(value) if n in _PROMPTS else value for n, value in fields.items()}
        body = json.dumps(read_fields).encode()
        if is_changed:
            return [{"type": "http.request", "body": body, "more_body": False}]
    sent.clear()
    return []


def _report_request(fields: Mapping[str, Any]) -> ReportRequest:
    """The fields of a body that select the contents of the report."""
    names = [*ReportRequest.model_fields, *_NOT_OURS]
    try:
        return ReportRequest.model_validate({n: fields[n] for n in names if n in fields})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise wrong_field(first, first["loc"]) from error


def _chunk_fields_of(event: bytes) -> dict[str, Any]:
    """The fields that identify the response of a chunk."""
    try:
        first = json.loads(event.removeprefix(_DATA))
    except ValueError:
        return {}
    return {name: first[name] for name in ("id", "object", "created", "model") if name in first}


def _report_truncation(answer: dict[str, Any], cut: Sequence[bool]) -> None:
    """Report which texts were ended by a rule, where vLLM has no such finish reason or uses
    another.
    """
    for choice in answer.get("choices") or ():
        if cut[choice["index"]]:
            # A text ended by a rule may contain a complete tool call.
            choice["finish_reason"] = "content_filter"
    if answer.get("type") == "message" and any(cut):
        answer["stop_reason"] = "refusal"


def _as_refusal(event: bytes) -> bytes:
    """Anthropic's stream event for the end of a text, for one ended by a rule."""
    head, separator, data = event.partition(_DATA)
    if b"message_delta" not in head:
        return event
    end = json.loads(data)
    end["delta"]["stop_reason"] = "refusal"
    return head + separator + json.dumps(end).encode()


def _truncated_response(original: Callable[..., Any], kind: Any, *args: Any, **kwargs: Any) -> Any:
    """A ``ResponsesResponse`` that reports texts ended by a rule, including streams and stored
    responses.
    """
    from openai.types.responses.response import IncompleteDetails

    response = original(kind, *args, **kwargs)
    request = client_request.get()
    if request is not None and any(request.cut):
        response.status = "incomplete"
        response.incomplete_details = IncompleteDetails(reason="content_filter")
    return response
