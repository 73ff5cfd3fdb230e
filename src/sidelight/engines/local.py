"""An in-process engine: continuous batching over any decoder.

The loop is ``LocalEngine._step``. A prompt is read once, and its verdicts are emitted with its
first token.
"""

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from typing import Any, TypeVar

from sidelight.engines.annotation import labels_spans
from sidelight.engines.base import (
    Admission,
    Engine,
    EngineBusyError,
    EngineUnavailableError,
    Event,
    GenerationError,
    Load,
    PromptClassified,
    Sampling,
    admit_all,
    require_monitored,
    require_same_model,
    require_verdicts,
)
from sidelight.engines.batch import Batch, Decoder
from sidelight.engines.queue import Emission, Limits, Request, RequestQueue
from sidelight.engines.text import TextCodec
from sidelight.errors import SidelightError
from sidelight.models.conversation import Conversation, Message, has_response
from sidelight.probes.bank import ProbeBanks
from sidelight.probes.probe import Probe
from sidelight.states.reader import Backbone

T = TypeVar("T")

_log = logging.getLogger(__name__)
# All other requests wait while a pass runs. On a CPU, the default would take seconds.
_PREFILL_TOKENS_ON_CPU = 256


class LocalEngine(Engine):
    """Serves one backbone with its probes.

    Requests are queued, started and answered in the event loop; a single thread of the engine runs
    the model and the probes.

    Args:
        backbone: The model: its name, its encoder, and the fingerprint that probes must match.
        decoder: Decoder that runs the model. Nothing else may run it at the same time.
        probes: Probes trained on this backbone, with distinct names.
        limits: Limits of concurrent work; None uses the defaults for the device.
        model: Name that requests use; None uses the backbone's.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: Decoder,
        probes: Sequence[Probe],
        *,
        limits: Limits | None = None,
        model: str | None = None,
    ):
        self.model = model or backbone.name
        if warning := backbone.encoder.warning:
            _log.warning(warning)
        self.max_tokens = backbone.encoder.max_tokens
        self._backbone = backbone
        self._banks = self._load_banks(probes)
        self._codec = TextCodec(backbone.encoder)
        if limits is None:
            is_slow = backbone.device.type == "cpu"
            limits = Limits(prefill_tokens=_PREFILL_TOKENS_ON_CPU) if is_slow else Limits()
        self._batch = Batch(decoder, self._codec, prefill_tokens=limits.prefill_tokens)
        self._queue = RequestQueue(limits)
        self._limits, self._encoding = limits, 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sidelight-model")
        self._loop: asyncio.Task[None] | None = None

    @property
    def probes(self) -> Sequence[Probe]:
        return self._banks.probes

    @property
    def load(self) -> Load:
        return Load(running=len(self._batch.requests), waiting=len(self._queue))

    @property
    def is_ready(self) -> bool:
        return self._loop is not None and not self._loop.done()

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._run())
        self._loop.add_done_callback(
            lambda _: self._deliver(_failures(self._queue.awaited, EngineUnavailableError()))
        )

    async def close(self) -> None:
        """Stop the engine after the pass in progress."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait({self._loop})
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self._codec.close)

    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        self._require_ready()
        banks = await asyncio.to_thread(self._load_banks, probes)
        await asyncio.to_thread(require_verdicts, probes, device=self._backbone.device)
        self._banks = banks

    async def tokenize(self, text: Conversation) -> tuple[int, ...]:
        return (await self._codec.in_thread([text], partial(self._codec.encode, text))).token_ids

    def generate(
        self,
        messages: Conversation,
        sampling: Sampling,
        *,
        monitored: Collection[str] = (),
        admits: Admission = admit_all,
    ) -> AsyncGenerator[Event, None]:
        # Not in the generator, which starts later, when other probes may have been loaded.
        banks = self._banks
        monitored_names = require_monitored(monitored, banks.probes)

        async def events() -> AsyncGenerator[Event, None]:
            def encode() -> Request:
                prompt, room = self._codec.encode_to_continue(
                    messages, sampling.max_tokens, with_places=labels_spans(banks.probes)
                )
                return Request(
                    prompt, sampling, room, banks, monitored=monitored_names, admits=admits
                )

            request = await self._encoded([messages], encode)
            self._require_ready()
            self._queue.join([request])
            try:
                is_last = False
                while not is_last:
                    emission = await request.outbox.get()
                    is_last = emission.is_last
                    yield _event(emission)
            finally:
                self._queue.leave([request])

        return events()

    def classify(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        explain: Collection[str] | None = None,
    ) -> Coroutine[Any, Any, list[PromptClassified]]:
        banks = self._banks
        with_places = bool(explain) or labels_spans(banks.probes)

        def encode(turns: Sequence[Message]) -> Request:
            return Request(
                self._codec.encode(turns, with_places=with_places),
                Sampling(),
                max_tokens=0,
                banks=banks,
                has_response=has_response(turns),
                explain=frozenset(explain or ()),
            )

        async def events() -> list[PromptClassified]:
            requests = await self._encoded(
                conversations, lambda: [encode(turns) for turns in conversations]
            )
            events: list[PromptClassified] = []
            self._require_ready()
            self._queue.join(requests)
            try:
                for request in requests:
                    event = _event(await request.outbox.get())
                    assert isinstance(event, PromptClassified)
                    events.append(event)
            finally:
                self._queue.leave(requests)
            return events

        return events()

    async def _encoded(self, texts: Sequence[Conversation], encode: Callable[[], T]) -> T:
        """The encoded texts of a request.

        Raises:
            EngineBusyError: The maximum number of running and waiting requests is being encoded.
        """
        limit = self._limits.running + self._limits.waiting
        if self._encoding >= limit:
            raise EngineBusyError(waiting=self._encoding, limit=limit)
        self._encoding += 1
        try:
            return await self._codec.in_thread(texts, encode)
        finally:
            self._encoding -= 1

    def _load_banks(self, probes: Sequence[Probe]) -> ProbeBanks:
        require_same_model(probes, self._backbone.fingerprint)
        return ProbeBanks(probes, device=self._backbone.device)

    def _require_ready(self) -> None:
        if not self.is_ready:
            raise EngineUnavailableError()

    async def _run(self) -> None:
        while True:
            await self._queue.has_work.wait()
            await self._step()
            if not self._queue and not self._batch.requests:
                self._queue.has_work.clear()

    async def _step(self) -> None:
        """Run a pass over the prompts whose turn it is, then sample a token for every running text.

        A running text waits for at most one pass over prompts.
        """
        batch, queue, turn = self._batch, self._queue, self._queue.latest_turn
        abandoned = {request for request in batch.requests if request not in queue.awaited}
        if abandoned:
            await self._pass(partial(batch.drop, abandoned), batch.requests)

        waiting = queue.find_next(batch.requests)
        if waiting and turn(waiting) <= min(map(turn, batch.prefills), default=inf):
            queue.take(waiting)
            batch.begin(waiting)
        # Listed before that pass, in which newly admitted texts get their first token.
        writing = [*batch.rows]
        if batch.prefills:
            prefill = min(batch.prefills, key=turn)
            queue.serve(prefill)
            await self._pass(partial(batch.read_on, prefill), prefill)
        for group in writing:
            await self._pass(partial(batch.decode, group), batch.rows[group].requests)

    async def _pass(
        self, work: Callable[[], list[Emission] | None], requests: Sequence[Request]
    ) -> None:
        """Run work in the model's thread; if it fails, these requests fail and leave the batch."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        await asyncio.wait({future})
        error = future.exception()
        if error is None:
            self._deliver(future.result() or [])
            return
        name = type(error).__name__
        # Without the error's message, which may quote a prompt.
        places = "".join(traceback.format_tb(error.__traceback__))
        _log.error("A pass of the engine failed: %s at\n%s", name, places)
        self._batch.drop(requests)
        message = (
            f"The engine failed on this request ({name}). Check its log for the cause. Other "
            "requests are not affected."
        )
        self._deliver(_failures(requests, GenerationError(message)))

    def _deliver(self, emissions: Iterable[Emission]) -> None:
        for emission in emissions:
            emission.request.outbox.put_nowait(emission)


def _failures(requests: Iterable[Request], error: SidelightError) -> list[Emission]:
    return [Emission(request, error, is_last=True) for request in requests]


def _event(emission: Emission) -> Event:
    if isinstance(emission.event, SidelightError):
        raise emission.event
    return emission.event
