"""An engine whose model loads in the background, so that the server can answer meanwhile."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from typing import Any

from sidelight.engines.base import (
    Admission,
    Engine,
    EngineUnavailableError,
    Event,
    Load,
    PromptJudged,
    Sampling,
    Tokens,
    admit_all,
)
from sidelight.probe import Probe
from sidelight.prompts import Conversation, Message


class LoadingEngine(Engine):
    """Refuses with ``EngineUnavailableError`` until the loaded engine takes over.

    Args:
        load: Makes the engine; runs once, in a thread of its own.
        on_failure: Called in the event loop when ``load`` has raised.

    Attributes:
        failure: What ``load`` raised.
    """

    def __init__(
        self, load: Callable[[], Engine], *, on_failure: Callable[[], None] = lambda: None
    ):
        self._load = load
        self._on_failure = on_failure
        self._engine: Engine | None = None
        self._loading: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None

    @property
    def model(self) -> str:
        return self._loaded().model

    @property
    def probes(self) -> Sequence[Probe]:
        return self._loaded().probes

    @property
    def max_tokens(self) -> int:
        return self._loaded().max_tokens

    @property
    def load(self) -> Load:
        return Load(running=0, waiting=0) if self._engine is None else self._engine.load

    @property
    def is_ready(self) -> bool:
        return self._engine is not None and self._engine.is_ready

    async def start(self) -> None:
        """Begins to load, and returns at once."""
        self._loading = asyncio.create_task(self._take_over())
        self._loading.add_done_callback(self._note_outcome)

    async def close(self) -> None:
        """Closes the loaded engine; the outcome of a load in progress is dropped."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait({self._loading})
        if self._engine is not None:
            await self._engine.close()

    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        await self._loaded().replace_probes(probes)

    async def settled(self) -> None:
        await self._loaded().settled()

    async def tokenize(self, text: Conversation) -> Tokens:
        return await self._loaded().tokenize(text)

    def generate(
        self,
        messages: Conversation,
        sampling: Sampling,
        *,
        watch: Collection[str] = (),
        admits: Admission = admit_all,
    ) -> AsyncGenerator[Event, None]:
        return self._loaded().generate(messages, sampling, watch=watch, admits=admits)

    def judge(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        explain: Collection[str] | None = None,
    ) -> Coroutine[Any, Any, list[PromptJudged]]:
        return self._loaded().judge(conversations, explain=explain)

    async def _take_over(self) -> None:
        engine = await asyncio.to_thread(self._load)
        await engine.start()
        self._engine = engine

    def _note_outcome(self, loading: asyncio.Task[None]) -> None:
        self.failure = None if loading.cancelled() else loading.exception()
        if self.failure is not None:
            self._on_failure()

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise EngineUnavailableError(
                "The model is still loading. Retry when /ready answers 200."
            )
        return self._engine
