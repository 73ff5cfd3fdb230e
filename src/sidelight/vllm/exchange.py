"""The probes that vLLM's workers serve, and how others take their place.

vLLM pauses for other weights, and so it does for other probes. It would refuse requests meanwhile,
or queue them behind the change, so they wait here, before they have any probes. One that has begun
is judged to its end by the probes that it began with: whatever others say counts as no verdict.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from sidelight.artifact import save_probe
from sidelight.engines.base import EngineUnavailableError, verdict_failure
from sidelight.errors import SidelightError
from sidelight.manifest import read_manifest
from sidelight.probe import Probe
from sidelight.types import Judgement
from sidelight.vllm.patches import guesses_responses
from sidelight.vllm.settings import identity_of

# vLLM shows what is logged under its own name.
_log = logging.getLogger("vllm.sidelight")
_LOOKS_EVERY_S = 0.02
# Nothing runs in vLLM, so whoever is inside waits for its client.
_SLOW_AFTER_S = 5.0
_PATIENCE_S = 300.0

# Has a short text judged by the probes of this identity, in the engine of this data-parallel rank.
TryOut = Callable[[str, int | None], Awaitable[Judgement]]


@dataclass(frozen=True)
class Saved:
    """Probes on disk, where vLLM's processes find them, with their identity."""

    folders: list[str]
    identity: str


@contextmanager
def saved(*sets: Sequence[Probe]) -> Generator[list[Saved]]:
    """Saves each set of probes for as long as they take to load."""
    with TemporaryDirectory(prefix="sidelight-probes-") as home:
        found: list[Saved] = []
        for number, probes in enumerate(sets):
            places = [Path(home) / f"{number}-{i}" for i in range(len(probes))]
            folders = [str(save_probe(*each)) for each in zip(probes, places, strict=True)]
            identity = identity_of(read_manifest(folder).version for folder in folders)
            found.append(Saved(folders, identity))
        yield found


class Exchange:
    """The served probes. Requests pass while these stay.

    Args:
        llm: vLLM's ``AsyncLLM``.
        probes: Those that it was started with.
        identity: Theirs.

    Attributes:
        probes: Those that are served.
        identity: What reports of their verdicts carry.
        is_whole: Whether it is known which probes each worker has.
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

        Args:
            probes: Those that were served when the request was made.

        Raises:
            EngineUnavailableError: They are being replaced, or have been.
        """
        if not self.is_whole:
            raise EngineUnavailableError(
                "Nobody knows which probes vLLM's workers have. Start it again."
            )
        if self._is_changing or probes is not self.probes:
            raise EngineUnavailableError("The probes have just been replaced. Retry.")
        self._inside += 1
        try:
            yield self.identity
        finally:
            self._inside -= 1

    async def replace(self, probes: Sequence[Probe], try_out: TryOut) -> None:
        """Serves these from now on, once the requests inside are done and each gives a verdict.

        Raises:
            SidelightError: As ``VllmEngine.replace_probes``; the old probes stay.
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
        async with self._turn:
            with ExitStack() as stack:
                # The folders that the old ones came from may hold others by now.
                sets = saved(probes, self.probes)
                new, old = await asyncio.to_thread(stack.enter_context, sets)
                self._open.clear()
                try:
                    await self._drained()
                    self._is_changing = True
                    try:
                        await self._load(new, try_out)
                    except BaseException:
                        await asyncio.shield(self._put_back(old, try_out))
                        raise
                    self.probes, self.identity = tuple(probes), new.identity
                finally:
                    self._is_changing = False
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

    async def _load(self, probes: Saved, try_out: TryOut) -> None:
        """Has every worker take these probes, and judge with them."""
        try:
            # Cached blocks hold what the old probes read.
            await self._llm.pause_generation(mode="wait", clear_cache=True)
            failures = await self._llm.collective_rpc("sidelight_load", args=(probes.folders,))
        finally:
            await self._llm.resume_generation()
        if any(failures):
            raise SidelightError(next(filter(None, failures)))
        # vLLM tells what the first engine answers; of another one, its verdicts say what it has.
        for rank in self._ranks():
            judged = await try_out(probes.identity, rank)
            if judged.failed:
                raise verdict_failure(judged.failed)

    def _ranks(self) -> Sequence[int | None]:
        parallel = self._llm.vllm_config.parallel_config
        is_local = parallel.local_engines_only
        count = parallel.data_parallel_size_local if is_local else parallel.data_parallel_size
        return range(count) if count > 1 else [None]

    async def _put_back(self, probes: Saved, try_out: TryOut) -> None:
        try:
            await self._load(probes, try_out)
            self.identity = probes.identity
        except BaseException:
            self.is_whole = False
            _log.critical(
                "The old probes cannot be put back, so nothing is served any more. Restart vLLM."
            )
            raise
