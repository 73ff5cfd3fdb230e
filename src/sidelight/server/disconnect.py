"""Stops work for a client that has left."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

T = TypeVar("T")


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """The outcome of ``work``, which is cancelled as soon as the client leaves.

    Raises:
        ClientDisconnect: It left.
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
        # What fails now is of no interest, but has to be fetched: asyncio would log it.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    # The body has been read: the only message that can follow is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass
