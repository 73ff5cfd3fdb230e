"""Lets requests through, and lets everything stand still while probes are exchanged."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sidelight.engines.base import EngineUnavailableError


class Gate:
    """Open until somebody needs it closed; that one waits until nobody is inside."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_open = True
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def passing(self) -> AsyncGenerator[None]:
        """Inside the gate.

        Raises:
            EngineUnavailableError: It is closed. To wait here could be to wait for oneself: another
                text of the same request may be inside, and not go on before this one does.
        """
        if not self._is_open:
            raise EngineUnavailableError("The probes are being replaced. Ask again in a moment.")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            # Shielded from a cancelled caller: whoever waits for the last one must hear of it.
            await asyncio.shield(self._announce())

    async def opened(self) -> None:
        """Waits while it is closed; it may be closed again at once."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_open)

    @asynccontextmanager
    async def closed(self) -> AsyncGenerator[None]:
        """Nobody is inside, and nobody enters; one at a time."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_open)
            self._is_open = False
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._inside == 0)
            yield
        finally:
            self._is_open = True
            await asyncio.shield(self._announce())

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()
