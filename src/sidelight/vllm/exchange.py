"""The probes that vLLM's workers serve, and how others take their place.

All workers check the new probes while the old ones serve. Then vLLM pauses, as for other weights,
and loads them. It would refuse requests meanwhile, or queue them behind the change, so they wait
here, before they have any probes. A running request keeps the probes that it started with; verdicts
of other versions are ignored.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from sidelight.artifact import save_probe
from sidelight.engines.base import EngineUnavailableError
from sidelight.errors import SidelightError
from sidelight.manifest import read_manifest
from sidelight.probe import Probe
from sidelight.vllm.internals import guesses_responses
from sidelight.vllm.settings import identity_of
from sidelight.vllm.worker import require_verdicts

# vLLM shows what is logged under its own name.
_log = logging.getLogger("vllm.sidelight")
_LOOKS_EVERY_S = 0.02
# Nothing runs in vLLM, so whoever is inside waits for its client.
_SLOW_AFTER_S = 5.0
_PATIENCE_S = 300.0

_NOT_WHOLE = (
    "Replacing the probes failed on some workers, so they may differ now. Restart the server."
)


@dataclass(frozen=True)
class Saved:
    """Probes on disk, where vLLM's processes find them, with their identity."""

    folders: list[str]
    identity: str


@contextmanager
def saved(probes: Sequence[Probe]) -> Generator[Saved]:
    """Saves probes for as long as they take to load."""
    with TemporaryDirectory(prefix="sidelight-probes-") as home:
        folders = [str(save_probe(probe, Path(home) / str(i))) for i, probe in enumerate(probes)]
        yield Saved(folders, identity_of(read_manifest(folder).version for folder in folders))


class Exchange:
    """The served probes of an ``AsyncLLM``. Requests pass while these stay.

    Attributes:
        probes: Those that are served.
        identity: What reports of their verdicts carry.
        is_whole: Whether all workers have these probes.
    """

    def __init__(self, llm: Any, probes: Sequence[Probe], identity: str):
        self._llm = llm
        self._inside = 0
        self._open = asyncio.Event()
        self._open.set()
        self._is_changing = False
        self._turn = asyncio.Lock()
        self.probes = tuple(probes)
        self.identity = identity
        self.is_whole = True

    async def settled(self) -> None:
        """Waits while probes are being replaced; then the caller takes those that are served."""
        while not self._open.is_set():
            await self._open.wait()

    @asynccontextmanager
    async def passing(self, probes: tuple[Probe, ...]) -> AsyncGenerator[str]:
        """These probes stay while somebody is inside; yields their identity.

        It does not wait: the request may have another text inside that goes on after this one does.

        Raises:
            EngineUnavailableError: They are being replaced, or have been, since the request began.
        """
        if not self.is_whole:
            raise EngineUnavailableError(_NOT_WHOLE)
        if self._is_changing or probes is not self.probes:
            raise EngineUnavailableError("The probes have just been replaced. Retry.")
        self._inside += 1
        try:
            yield self.identity
        finally:
            self._inside -= 1

    async def replace(self, probes: Sequence[Probe]) -> None:
        """Serves these from now on, once the requests inside are done.

        A caller that gives up before vLLM pauses changes nothing; after that, the change ends.

        Raises:
            SidelightError: As ``VllmEngine.replace_probes``; the old probes stay, or
                ``is_whole`` is false.
        """
        config = self._llm.vllm_config
        if guesses_responses(config, probes):
            raise SidelightError(
                "Probes of the response are not supported under speculative decoding. Start vLLM "
                "without it, or load probes of the prompt."
            )
        servers = config.parallel_config._api_process_count
        if servers > 1:
            raise SidelightError(
                f"Probes cannot be replaced while {servers} API servers share an engine, since the "
                "others would keep their policies' old ones. Start vLLM with --api-server-count 1."
            )
        await asyncio.to_thread(require_verdicts, probes)
        async with self._turn:
            with saved(probes) as new:
                try:
                    await self._llm.collective_rpc("sidelight_check", args=(new.folders,))
                except Exception as error:
                    raise SidelightError(f"vLLM cannot serve these probes. {error}") from error
                self._open.clear()
                try:
                    await self._drained()
                    loading = asyncio.create_task(self._load(tuple(probes), new.identity))
                    try:
                        await asyncio.shield(loading)
                    except asyncio.CancelledError:
                        await loading
                finally:
                    self._open.set()

    async def _drained(self) -> None:
        """Waits until nobody is inside but those whose clients read slowly.

        Raises:
            EngineUnavailableError: Some texts take too long.
        """
        start = busy = monotonic()
        # Whoever found it open has a moment to come in.
        await asyncio.sleep(_LOOKS_EVERY_S)
        while self._inside and monotonic() - busy < _SLOW_AFTER_S:
            if self._llm.output_processor.has_unfinished_requests():
                busy = monotonic()
            if busy - start > _PATIENCE_S:
                raise EngineUnavailableError(
                    f"Answers are still being written after {_PATIENCE_S:.0f} s, so the old probes "
                    "stay. Retry when fewer or shorter ones are."
                )
            await asyncio.sleep(_LOOKS_EVERY_S)

    async def _load(self, probes: tuple[Probe, ...], identity: str) -> None:
        """Has every worker take the probes that it has checked."""
        self._is_changing = True
        try:
            # Cached blocks hold what the old probes read.
            await self._llm.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._llm.collective_rpc("sidelight_load", args=(identity,))
            finally:
                await self._llm.resume_generation()
            self.probes, self.identity = probes, identity
        except Exception as error:
            self.is_whole = False
            _log.critical("%s", _NOT_WHOLE)
            raise EngineUnavailableError(_NOT_WHOLE) from error
        finally:
            self._is_changing = False
