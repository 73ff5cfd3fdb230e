"""Slots for questions that are asked at once, shared out among API keys in turn."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager


class FairSlots:
    """A semaphore that serves keys in turn, so that the long queue of one delays no other.

    It belongs to the event loop in which it is first waited for.

    Args:
        slots: How many may be held at once.
    """

    def __init__(self, slots: int):
        self._free = slots
        # By key, the one whose turn is next first. No queue is empty; turns that were given up stay
        # until they come.
        self._queues: OrderedDict[str | None, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def slot(self, key_id: str | None) -> AsyncGenerator[None]:
        """Holds a slot.

        Args:
            key_id: Id of the API key that waits; None: without one.
        """
        if self._free:
            self._free -= 1
        else:
            await self._turn(key_id)
        try:
            yield
        finally:
            self._release()

    async def _turn(self, key_id: str | None) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key_id, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # It may have come to its turn in the same moment.
            if turn.done() and not turn.cancelled():
                self._release()
            raise

    def _release(self) -> None:
        while self._queues:
            key_id, queue = self._queues.popitem(last=False)
            # A turn that was given up is skipped, and its key keeps its place.
            turn = next((turn for turn in _emptied(queue) if not turn.done()), None)
            if queue:
                self._queues[key_id] = queue
            if turn is not None:
                turn.set_result(None)
                return
        self._free += 1


def _emptied(queue: deque[asyncio.Future[None]]) -> Iterator[asyncio.Future[None]]:
    while queue:
        yield queue.popleft()
