"""Gives a request up when it takes too long, or when the server ends."""

import asyncio
import json

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.server.draining import Drain
from sidelight.server.errors import error_body


class Deadline:
    """Cancels a request after ``seconds``, which frees its place in the engine.

    An answer that has not begun becomes a 504, or a 503 where the server ends. A stream of events
    ends with an error event and no ``[DONE]``; any other answer that has begun is cut off.

    Args:
        app: What answers.
        seconds: From the end of the request's head to the last byte of the answer.
        drain: Its end is everybody's deadline.
    """

    def __init__(self, app: ASGIApp, *, seconds: float, drain: Drain):
        self._app = app
        self._seconds = seconds
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on for as long as it may take."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        content_type: str | None = None

        async def noted(message: Message) -> None:
            nonlocal content_type
            if message["type"] == "http.response.start":
                content_type = Headers(raw=message["headers"]).get("content-type", "")
            await send(message)

        timeout = asyncio.timeout(self._seconds)
        try:
            async with timeout:
                with self._drain.ending(timeout):
                    await self._app(scope, receive, noted)
        except TimeoutError:
            if not timeout.expired():
                raise
            status, body = self._refusal()
            if content_type is None:
                await JSONResponse(body, status_code=status)(scope, receive, send)
            elif content_type.startswith("text/event-stream"):
                event = f"data: {json.dumps(body)}\n\n".encode()
                await send({"type": "http.response.body", "body": event})
            else:
                raise

    def _refusal(self) -> tuple[int, dict[str, object]]:
        if self._drain.is_over:
            return 503, error_body(
                "The server stops and gave the request up. Send it again, to another server or "
                "once this one is back.",
                type="server_error",
                code="shutting_down",
            )
        return 504, error_body(
            f"The request took longer than {self._seconds:g} seconds and was given up. Ask for "
            "less at a time, or try again when the server is less busy.",
            type="server_error",
            code="deadline_exceeded",
        )
