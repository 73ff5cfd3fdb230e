"""Requests to a route: the body, the shared server context, and limits."""

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import jiter
from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from sidelight.engines.base import Engine
from sidelight.errors import did_you_mean
from sidelight.models.conversation import Conversation
from sidelight.policy.enforcement import require_trusted_turns
from sidelight.policy.request import RequestContext
from sidelight.policy.rules import require_policy_applies
from sidelight.server.config import ServerConfig
from sidelight.server.errors import RequestError
from sidelight.server.metrics import Metrics
from sidelight.server.observe import RequestObserver, RequestTextObserver, audit_of
from sidelight.server.probes import ProbeRegistry

_log = logging.getLogger("sidelight.server")
T = TypeVar("T")
# Maximum tokens of all texts of a request, unless a single text may have more.
_REQUEST_TOKENS = 2**16


class ServerContext:
    """The state of one server that its requests share; ``started_at`` is Unix time.

    Raises:
        SidelightError: A file that ``config`` names cannot be read or written, or the policy does
            not fit the probes.
    """

    def __init__(self, engine: Engine, config: ServerConfig):
        require_policy_applies(config.loaded_policy, engine.probes)
        self.engine, self.config = engine, config
        self.registry = registry = ProbeRegistry(engine, config)
        metrics = Metrics(engine, lambda: registry.rules)
        self.observer = RequestObserver(metrics, audit_of(config), trace_events=config.trace_events)
        self.started_at = int(time.time())
        access = config.access
        is_closed = not (access.metrics_keys or access.admin_keys or config.audit_log)
        if is_closed and any(bound.is_shadow for bound in registry.rules):
            _log.warning(
                "The verdicts of the policy's shadow rules are not visible anywhere: no key "
                "opens /metrics, and there is no audit log. Set SIDELIGHT_METRICS_KEY to a "
                "secret."
            )

    def request_context(
        self,
        observer: RequestObserver,
        probes: Sequence[str] | None = None,
        *,
        for_text: bool = False,
        is_admin: bool = False,
    ) -> RequestContext:
        """Create the context of a request.

        Args:
            observer: Observer of the request.
            probes: Names of the probes to report; see ``RequestContext.choose``.
            for_text: Whether text will be generated.
            is_admin: Whether the client sees what rules do not disclose.

        Raises:
            PolicyError: A probe does not exist.
        """
        policy, rules = self.registry.policy, self.registry.rules
        observe = partial(RequestTextObserver, observer)
        judges = self.registry.judges.of(policy, observer.key_id)
        context = RequestContext(
            self.engine.model, policy, rules, (), observe, is_admin=is_admin, judges=judges
        )
        return context.choose(probes, for_text=for_text)


class ServerRequest(Request):
    """A request with access to the server context and its own observer.

    Attributes:
        until_answered: Context managers that the request has entered and leaves at its end.
    """

    def __init__(self, request: Request):
        super().__init__(request.scope, request.receive)
        self.context: ServerContext = request.app.state.context
        self.engine, self.registry = self.context.engine, self.context.registry
        self.observer: RequestObserver = request.state.observer
        self.until_answered = AsyncExitStack()
        self._received = b""
        self._value: Any = None

    async def read(self) -> None:
        """Read the body, which must be strict JSON within the server's size limit.

        Refused with 400: duplicate names in an object, which parsers resolve differently; ``NaN``,
        ``Infinity``, lone surrogates, invalid UTF-8, and excessive nesting. The standard library's
        parser accepts all but the last two. ``1e999`` becomes an infinity, which the field must
        refuse; ``StrictBody`` does so for numeric fields.
        """
        limit, received, size = self.context.config.max_body_bytes, bytearray(), 0
        async for chunk in self.stream():
            size += len(chunk)
            # The rest is read and discarded, because closing the connection while the client sends
            # would reset it, and the client might never see the reason.
            if size <= limit:
                received += chunk
        if size > limit:
            raise RequestError(
                f"The body is larger than {limit:,} bytes. Send a smaller request.",
                status=413,
                code="request_too_large",
            )
        self._received = bytes(received)
        try:
            with _without_collection():
                self._value = jiter.from_json(
                    self._received, allow_inf_nan=False, catch_duplicate_keys=True
                )
        except ValueError as error:
            raise RequestError(f"The body is not valid JSON: {error}.") from error

    async def body(self) -> bytes:
        return self._received

    async def json(self) -> Any:
        return self._value

    @property
    def is_admin(self) -> bool:
        """Whether the request has an admin key, which sees every verdict."""
        return self.state.caller.is_admin

    def require_model(self, name: str) -> None:
        """Refuse a request for a model other than the served one."""
        served = self.engine.model
        if name != served:
            raise RequestError(
                f"Unknown model '{name}'.{did_you_mean(name, [served])}",
                status=404,
                code="model_not_found",
                param="model",
            )

    async def begin(
        self,
        texts: Sequence[Conversation],
        probes: Sequence[str] | None = None,
        *,
        n: int = 1,
        max_tokens: int | None = 0,
    ) -> RequestContext:
        """Begin the request, and return its context.

        Args:
            texts: The texts to read.
            probes: Probes chosen by the client; None for the default.
            n: Number of times that each is read.
            max_tokens: Maximum tokens generated after each: 0 for no text, None for as many as fit.

        Raises:
            RequestError: The request exceeds the limits of texts or tokens.
            PolicyError: The policy refuses the leading turns of a text, or a probe does not exist.
        """
        await self._require_size(texts, n=n, max_tokens=max_tokens)
        await unless_left(self, self.until_answered.enter_async_context(self.engine.serving()))
        context = self.context.request_context(
            self.observer, probes, for_text=max_tokens != 0, is_admin=self.is_admin
        )
        require_trusted_turns(context.policy, texts)
        return context

    async def _require_size(
        self, texts: Sequence[Conversation], *, n: int, max_tokens: int | None
    ) -> None:
        count = n * len(texts)
        if count > self.context.config.max_batch_items:
            raise RequestError(
                f"Too many inputs: got {count}, the limit is {self.context.config.max_batch_items} "
                "(--max-batch-items). Split the request.",
                code="too_many_inputs",
            )
        longest, limit = self.engine.max_tokens, self.context.config.max_request_tokens
        if limit is None:
            limit = max(_REQUEST_TOKENS, n * longest)
            if count * longest <= limit:
                # The engine refuses a text that is longer than its context.
                return
        tokens = 0
        for number, text in enumerate(texts, 1):
            size = len(await self.engine.tokenize(text))
            tokens += n * (longest if max_tokens is None else min(longest, size + max_tokens))
            if tokens > limit:
                remedy = "" if max_tokens == 0 else ", or lower max_tokens"
                raise RequestError(
                    f"Too many tokens: text {number} of {len(texts)} brings the request to "
                    f"{tokens}; the limit is {limit} (--max-request-tokens). Send fewer or "
                    f"shorter texts per request{remedy}.",
                    code="request_too_large",
                )


@contextmanager
def _without_collection() -> Generator[None]:
    """Pause the garbage collector, which would rescan a growing tree of lists.

    Parsing blocks the event loop: a million empty lists take 0.1 s this way, 1.4 s otherwise.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Route(APIRoute):
    """A route whose requests are ``ServerRequest``, read before validation."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook for a custom request class."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            served = ServerRequest(request)
            async with served.until_answered:
                # Before FastAPI reads the body, which would turn every error into a plain 400.
                if self.body_field is not None:
                    await served.read()
                return await handle(served)

        return handle_strictly


def _require_admin(request: Request) -> None:
    if not request.state.caller.is_admin:
        raise RequestError(
            "This route needs an admin key. Start the server with --admin-key or "
            "--admin-keys-file, and send that key.",
            status=403,
            code="admin_key_required",
        )


# Dependency of routes that need an admin key.
AdminOnly = Depends(_require_admin)


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``, and cancel it as soon as the client disconnects.

    Raises:
        ClientDisconnect: The client disconnected.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        # Errors no longer matter, but asyncio would log them if they were not retrieved.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    # The body has been read, so the only message that can follow is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass
