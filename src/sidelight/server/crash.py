"""The answer to an exception that nothing else takes."""

import logging

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.server.errors import error_body

_log = logging.getLogger(__name__)


class AnswerCrashes:
    """Answers 500, and logs where the exception happened, by the request's id.

    Starlette's own handler stands outside of all middleware: its answer would have no id, and the
    log would not say whose request it was. An answer that has begun is cut off.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            request_id = scope["state"]["request_id"]
            _log.exception("Request %s failed.", request_id, extra={"request_id": request_id})
            if has_begun:
                raise
            await _answer(request_id)(scope, receive, send)


def _answer(request_id: str) -> JSONResponse:
    body = error_body(
        f"The server failed. Its log says where: look for {request_id}.", type="server_error"
    )
    return JSONResponse(body, status_code=500)
