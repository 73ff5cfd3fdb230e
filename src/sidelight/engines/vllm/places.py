"""How many requests are in the engine, and which it refuses. Knows counts, not requests."""

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from sidelight.engines.base import EngineBusyError, Load

Output = TypeVar("Output")


@dataclass(eq=False)
class Place:
    """That of one request.

    Attributes:
        is_running: Whether vLLM has read its prompt.
    """

    is_running: bool = False


class Places:
    """The places of all requests; vLLM itself bounds those that run (``max_num_seqs``).

    Args:
        waiting: Requests that may wait; further ones are refused.
    """

    def __init__(self, waiting: int):
        self._most = waiting
        self._taken: set[Place] = set()

    @property
    def load(self) -> Load:
        """The requests that have a place."""
        running = sum(place.is_running for place in self._taken)
        return Load(running=running, waiting=len(self._taken) - running)

    @contextmanager
    def taken(self, count: int) -> Generator[list[Place]]:
        """Places for all of these requests, or for none; those not ``followed`` are given back.

        Raises:
            EngineBusyError: Too many wait. A list longer than may wait is taken where nobody does.
        """
        waiting = self.load.waiting
        if waiting and waiting + count > self._most:
            raise EngineBusyError(
                f"{waiting} requests are waiting and {self._most} may. Try again in a moment.",
                retry_after_s=1,
            )
        places = [Place() for _ in range(count)]
        self._taken.update(places)
        try:
            yield places
        finally:
            self._taken.difference_update(places)

    async def followed(
        self, place: Place, outputs: AsyncGenerator[Output, None]
    ) -> AsyncGenerator[Output, None]:
        """The outputs of the request whose place it is, given back when these end."""
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    place.is_running = True
                    yield output
        finally:
            self._taken.discard(place)
