"""The served probes under a lock: requests read them, and a change of probes writes them."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from time import monotonic

from sidelight.engines.base import EngineUnavailableError
from sidelight_vllm.settings import ProbeSet

_LOOKS_EVERY_S = 0.02
# Once vLLM has been idle for this long, the remaining requests are waiting for slow clients.
_SLOW_AFTER_S = 5.0
_PATIENCE_S = 300.0
INCONSISTENT = (
    "Replacing the probes failed on some workers, so their probes may differ now. Restart the "
    "server."
)


class ProbeLock:
    """A reader-writer lock: any number of requests read the served probes, or a change writes them.

    A waiting change admits no new requests, so requests cannot block it forever. Further parts of
    an admitted request enter immediately, because the change waits for it. A failed change leaves
    the probes unchanged.

    Attributes:
        served: The latest probes.
        is_consistent: Whether all workers have them.
    """

    def __init__(self, served: ProbeSet):
        self.served = served
        self.is_consistent = True
        self._readers = 0
        self._is_written = False
        self._is_open = asyncio.Event()
        self._is_open.set()

    @asynccontextmanager
    async def shared(self, begun: ProbeSet | None = None) -> AsyncGenerator[ProbeSet]:
        """The served probes, which do not change while a request is inside.

        Args:
            begun: Probes that the enclosing request read; None for a new request.

        Raises:
            EngineUnavailableError: These probes are being replaced or have been replaced, or the
                workers' probes are unknown.
        """
        if begun is None:
            await self._opened()
        elif self._is_written or begun is not self.served:
            raise EngineUnavailableError("The probes have just been replaced. Try again.")
        if not self.is_consistent:
            raise EngineUnavailableError(INCONSISTENT)
        self._readers += 1
        try:
            yield self.served
        finally:
            self._readers -= 1

    @asynccontextmanager
    async def writing(self, *, is_busy: Callable[[], bool]) -> AsyncGenerator[None]:
        """Exclusive access, once the requests inside are done.

        If the engine is not ``is_busy`` for long, the remaining requests are waiting for slow
        clients, and are no longer waited for. They can only send what the old probes have
        classified, because no part of them can enter anymore.

        Raises:
            EngineUnavailableError: The requests take too long.
        """
        await self._opened()
        self._is_open.clear()
        try:
            start = busy = monotonic()
            while self._readers and monotonic() - busy < _SLOW_AFTER_S:
                if is_busy():
                    busy = monotonic()
                if busy - start > _PATIENCE_S:
                    raise EngineUnavailableError(
                        f"Responses are still being generated after {_PATIENCE_S:.0f} s, so the "
                        "old probes stay loaded. Try again when the server is less busy."
                    )
                await asyncio.sleep(_LOOKS_EVERY_S)
            self._is_written = True
            yield
        finally:
            self._is_written = False
            self._is_open.set()

    async def _opened(self) -> None:
        while not self._is_open.is_set():
            await self._is_open.wait()
