"""Gives a request up when it takes too long."""

import asyncio
import json

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.server.errors import error_body


class Deadline:
    """Cancels a request after ``seconds``, which frees its place in the engine.

    An answer that has not begun becomes a 504. A stream of events ends with an error event and no
    ``[DONE]``; any other answer that has begun is cut off.

    Args:
        app: What answers.
        seconds: From the end of the request's head to the last byte of the answer.
    """

    def __init__(self, app: ASGIApp, *, seconds: float):
        self._app = app
        self._seconds = seconds

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
                await self._app(scope, receive, noted)
        except TimeoutError:
            if not timeout.expired():
                raise
            if content_type is None:
                await JSONResponse(self._body(), status_code=504)(scope, receive, send)
            elif content_type.startswith("text/event-stream"):
                event = f"data: {json.dumps(self._body())}\n\n".encode()
                await send({"type": "http.response.body", "body": event})
            else:
                raise

    def _body(self) -> dict[str, object]:
        return error_body(
            f"The request took longer than {self._seconds:g} seconds and was given up. Ask for "
            "less at a time, or try again when the server is less busy.",
            type="server_error",
            code="deadline_exceeded",
        )
