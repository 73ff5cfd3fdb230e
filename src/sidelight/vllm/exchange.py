"""The probes that vLLM's workers serve, and how they are replaced while no request runs."""

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sidelight.artifact import save_probe
from sidelight.engines.base import EngineUnavailableError, verdict_failure
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.types import Judgement


class Gate:
    """Requests pass while it is open. Whoever closes it waits until nobody is inside."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_open = True
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def passing(self) -> AsyncGenerator[None]:
        """Is inside the gate.

        Raises:
            EngineUnavailableError: It is closed. Waiting here could be a deadlock: another text of
                the same request may be inside, and not go on before this one does.
        """
        if not self._is_open:
            raise EngineUnavailableError("The probes are being replaced. Retry in a moment.")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            # Shielded from a cancelled caller: whoever waits for the last one must be woken.
            await asyncio.shield(self._announce())

    async def opened(self) -> None:
        """Waits while it is closed; it may be closed again at once."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_open)

    @asynccontextmanager
    async def closed(self) -> AsyncGenerator[None]:
        """Keeps everybody out; only one caller at a time."""
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


class ProbeFolder(tempfile.TemporaryDirectory[str]):
    """Probes on disk, where vLLM's processes find them. Deleted when this process ends."""

    def __init__(self) -> None:
        super().__init__(prefix="sidelight-probes-")

    def put(self, probes: Sequence[Probe]) -> list[str]:
        """Saves these probes; returns their folders."""
        root = Path(tempfile.mkdtemp(dir=self.name))
        return [str(save_probe(probe, root / str(i))) for i, probe in enumerate(probes)]


# An idle vLLM frees the blocks of a request within a step or two after its last output.
_RESETS = 50
_RESET_AFTER_S = 0.1


class Exchange:
    """The served probes, and a gate that requests pass while these stay.

    Args:
        llm: vLLM's engine.
        folder: Where its workers find probes; None: they keep those that they have.
        probes: Those that it was started with.

    Attributes:
        probes: Those that are served.
        is_whole: Whether it is known which probes each worker has.
    """

    def __init__(self, llm: Any, folder: ProbeFolder | None, probes: Sequence[Probe]):
        self._llm = llm
        self._folder = folder
        self._gate = Gate()
        self.probes = tuple(probes)
        self.is_whole = True

    @asynccontextmanager
    async def passing(self, probes: tuple[Probe, ...]) -> AsyncGenerator[None]:
        """These probes stay while somebody is inside.

        Args:
            probes: Those that were served when the request was made.

        Raises:
            EngineUnavailableError: They are being replaced, or have been.
        """
        async with self._gate.passing():
            if probes is not self.probes:
                raise EngineUnavailableError("The probes have just been replaced. Retry.")
            yield

    async def settled(self) -> None:
        """Waits while probes are being replaced."""
        await self._gate.opened()

    async def replace(
        self, probes: Sequence[Probe], *, try_out: Callable[[], Awaitable[Judgement]]
    ) -> None:
        """Serves these from now on, once nobody is inside and each has given a verdict.

        Args:
            probes: The new ones.
            try_out: Has the workers' probes judge a short text.

        Raises:
            SidelightError: As ``VllmEngine.replace_probes``; the old probes stay.
        """
        if self._folder is None:
            raise SidelightError("vLLM's own server keeps its probes. Restart it with others.")
        _require_exchangeable(self._llm.vllm_config)
        async with self._gate.closed():
            try:
                await self._put(probes)
                judged = await try_out()
                if judged.failed:
                    raise verdict_failure(judged.failed)
            except BaseException:
                await asyncio.shield(self._put_back())
                raise
            self.probes = tuple(probes)

    async def _put(self, probes: Sequence[Probe]) -> None:
        assert self._folder is not None
        folders = await asyncio.to_thread(self._folder.put, probes)
        failures = await self._llm.collective_rpc("sidelight_load", args=(folders,))
        if any(failures):
            raise SidelightError(next(filter(None, failures)))
        # Cached blocks hold what the old probes read. The last requests may still use theirs.
        for _ in range(_RESETS):
            if await self._llm.reset_prefix_cache():
                return
            await asyncio.sleep(_RESET_AFTER_S)
        raise SidelightError(
            "vLLM's prefix cache is still in use, so the probes cannot be replaced. Retry."
        )

    async def _put_back(self) -> None:
        try:
            await self._put(self.probes)
        except BaseException:
            self.is_whole = False
            raise


def _require_exchangeable(config: Any) -> None:
    """Checks this before anything is touched: a half exchange cannot be undone."""
    hindrances = {
        # Verdicts are made in the scheduler, which keeps its probes.
        "pipeline parallel": config.parallel_config.pipeline_parallel_size > 1,
        # vLLM returns only the first rank's answer: another could keep its old probes unnoticed.
        "data parallel": config.parallel_config.data_parallel_size > 1,
        "a GPU": config.device_config.device_type != "cpu",
    }
    found = [name for name, is_there in hindrances.items() if is_there]
    if found:
        raise SidelightError(
            f"Probes cannot be replaced under {', '.join(found)}. Restart the engine with the new "
            "ones."
        )
