"""What is told of each request to a tracing system. Knows none: ``otel.py`` does.

Numbers and the operator's own names only: never a text, a key, or a word that a client chose.
"""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.engines.events import Event, PromptJudged, written_by
from sidelight.server.access_log import route_of
from sidelight.server.policy.decisions import Decision

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Asked every few seconds by machines.
_UNTRACED = frozenset({"/health", "/ready", "/metrics"})


@dataclass
class Trace:
    """One request, as it goes on.

    Attributes:
        start_ns: Unix time of its begin.
        traceparent: The caller's span, as W3C's header names it; None: none.
        method: ``_OTHER`` for one that HTTP does not define.
        route: The route's template.
        status: Of the answer; 500 where there was none.
        request_id: The server's.
        model: The served model; None where the request did not come to it.
        prompt_tokens: Of its texts, each once.
        completion_tokens: Written.
        decisions: What followed from each verdict.
    """

    start_ns: int = 0
    traceparent: str | None = None
    method: str = "_OTHER"
    route: str = ""
    status: int = 500
    request_id: str = ""
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    decisions: list[Decision] = field(default_factory=list[Decision])

    @classmethod
    def of(cls, request: Request) -> "Trace":
        """The request's; where nobody traces, one that nobody reads."""
        return getattr(request.state, "trace", None) or cls()

    def add(self, decisions: Sequence[Decision]) -> None:
        """Takes note of what was decided."""
        self.decisions += decisions

    async def followed(
        self, events: AsyncGenerator[Event, None], *, is_prompt_known: bool
    ) -> AsyncGenerator[Event, None]:
        """The same events of one text, with its tokens counted.

        Args:
            events: As the engine gives them.
            is_prompt_known: Whether another text has counted the prompt.
        """
        written = 0
        try:
            async with aclosing(events):
                async for event in events:
                    written = max(written, written_by(event))
                    if isinstance(event, PromptJudged) and not is_prompt_known:
                        self.prompt_tokens += event.tokens
                    yield event
        finally:
            self.completion_tokens += written


# Takes a request that is over.
Sink = Callable[[Trace], None]


class TraceRequests:
    """Follows each request to its end, and hands over what there is to tell of it.

    Args:
        app: What answers.
        sink: Takes it.
    """

    def __init__(self, app: ASGIApp, *, sink: Sink):
        self._app = app
        self._sink = sink

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["trace"] = trace = Trace(
            start_ns=time.time_ns(),
            traceparent=Headers(scope=scope).get("traceparent"),
            method=scope["method"] if scope["method"] in _METHODS else "_OTHER",
            request_id=state.get("request_id", ""),
        )

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            trace.route = route_of(scope)
            self._sink(trace)
