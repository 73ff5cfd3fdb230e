"""The embedded engine: continuous batching over plain ``transformers`` forward calls.

``transformers`` has a batching loop of its own, ContinuousBatchingManager. It takes no seed per
request, tells which rows belong to which request in private attributes only, and reached 586
tokens/s on two CPU cores where plain forward calls reached 1,596. So the loop is ours: each turn
drops what was cancelled, reads the waiting prompts in one pass, and writes one token of each
running request. The prompt is read once, and its verdicts leave before the first token does.
"""

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from sidelight.backbone import TransformersBackbone
from sidelight.bank import Panel
from sidelight.engines.base import (
    Admission,
    Engine,
    EngineUnavailableError,
    Event,
    GenerationError,
    Load,
    PromptJudged,
    Sampling,
    Tokens,
    require_same_model,
    verdict_failure,
)
from sidelight.engines.batch import Batch, Emission
from sidelight.engines.queue import Limits, Request, RequestQueue
from sidelight.engines.text import WARM_UP, TextCodec, has_response
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.prompts import Conversation, Message

_log = logging.getLogger(__name__)

Outbox = asyncio.Queue[Emission]


class TransformersEngine(Engine):
    """Serves one backbone with its probes.

    All bookkeeping happens in the event loop; one thread of the engine's own runs the model.

    Args:
        backbone: The model. Nothing else may run it meanwhile.
        probes: Probes trained on this backbone; their names are distinct.
        limits: How much is held at once.
        model: The name that requests use; None: the backbone's.
    """

    def __init__(
        self,
        backbone: TransformersBackbone,
        probes: Sequence[Probe],
        *,
        limits: Limits | None = None,
        model: str | None = None,
    ):
        self._model = model or backbone.name
        self._backbone = backbone
        self._panel = self._load_panel(probes)
        self._codec = TextCodec(
            backbone.encoder, backbone.tokenizer, max_tokens=backbone.encoder.max_tokens
        )
        self._batch = Batch(backbone, self._codec)
        self._queue = RequestQueue(limits or Limits())
        self._outboxes: dict[Request, Outbox] = {}
        self._cancelled: set[Request] = set()
        self._has_work = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sidelight-model")
        self._loop: asyncio.Task[None] | None = None

    @property
    def model(self) -> str:
        return self._model

    @property
    def probes(self) -> Sequence[Probe]:
        return self._panel.probes

    @property
    def max_tokens(self) -> int:
        return self._codec.max_tokens

    @property
    def load(self) -> Load:
        return Load(running=len(self._batch.requests), waiting=len(self._queue))

    @property
    def is_ready(self) -> bool:
        return self._loop is not None and not self._loop.done()

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._run())
        self._loop.add_done_callback(
            lambda _: self._fail(list(self._outboxes), EngineUnavailableError())
        )

    async def close(self) -> None:
        """Ends the work after the step in progress."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait({self._loop})
        await asyncio.to_thread(self._thread.shutdown)

    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        panel = await asyncio.to_thread(self._load_panel, probes)
        (judged,) = await self._judge([WARM_UP], panel)
        if judged.failed:
            raise verdict_failure(judged.failed)
        self._panel = panel

    async def tokenize(self, text: Conversation) -> Tokens:
        return await asyncio.to_thread(self._codec.tokens, text)

    def _write(
        self, messages: Conversation, sampling: Sampling, watch: frozenset[str], admits: Admission
    ) -> AsyncGenerator[Event, None]:
        # Not in the generator: that begins later, and other probes may be loaded until then.
        panel = self._panel

        def encode() -> Request:
            prompt, room = self._codec.encode_to_continue(messages, sampling.max_tokens)
            return Request(prompt, sampling, room, panel, watch=watch, admits=admits)

        async def events() -> AsyncGenerator[Event, None]:
            request = await asyncio.to_thread(encode)
            with self._submitted([request]) as (outbox,):
                is_last = False
                while not is_last:
                    emission = await outbox.get()
                    is_last = emission.is_last
                    yield _event(emission)

        return events()

    def judge(
        self, conversations: Sequence[Sequence[Message]]
    ) -> Coroutine[Any, Any, list[PromptJudged]]:
        return self._judge(conversations, self._panel)

    async def _judge(
        self, conversations: Sequence[Sequence[Message]], panel: Panel
    ) -> list[PromptJudged]:
        def encode() -> list[Request]:
            return [
                Request(
                    self._codec.encode(turns),
                    Sampling(),
                    max_tokens=0,
                    panel=panel,
                    has_response=has_response(turns),
                )
                for turns in conversations
            ]

        judged: list[PromptJudged] = []
        with self._submitted(await asyncio.to_thread(encode)) as outboxes:
            for outbox in outboxes:
                event = _event(await outbox.get())
                assert isinstance(event, PromptJudged)
                judged.append(event)
        return judged

    def _load_panel(self, probes: Sequence[Probe]) -> Panel:
        require_same_model(probes, self._backbone.fingerprint)
        return Panel(probes, device=self._backbone.device)

    @contextmanager
    def _submitted(self, requests: Sequence[Request]) -> Generator[list[Outbox]]:
        """Queues the requests; when the caller leaves, what is unfinished is cancelled."""
        if not self.is_ready:
            raise EngineUnavailableError()
        self._queue.join(requests)
        outboxes = [Outbox() for _ in requests]
        self._outboxes.update(zip(requests, outboxes, strict=True))
        self._has_work.set()
        try:
            yield outboxes
        finally:
            unfinished = self._outboxes.keys() & set(requests)
            self._forget(unfinished)
            self._queue.leave(unfinished)
            self._cancelled |= unfinished

    async def _run(self) -> None:
        while True:
            await self._has_work.wait()
            await self._turn()
            if not self._queue and not self._batch.requests:
                self._has_work.clear()

    async def _turn(self) -> None:
        if self._cancelled:
            gone, self._cancelled = self._cancelled, set[Request]()
            await self._step_running(partial(self._batch.drop, gone))
        admitted = self._queue.admit(self._batch.requests)
        for panel in dict.fromkeys(request.panel for request in admitted):
            together = [request for request in admitted if request.panel is panel]
            await self._step(partial(self._batch.prefill, together), together)
        if self._batch.requests:
            await self._step_running(self._batch.decode)

    async def _step_running(self, step: Callable[[], list[Emission]]) -> None:
        if not await self._step(step, self._batch.requests):
            self._batch.clear()

    async def _step(self, step: Callable[[], list[Emission]], concerned: Sequence[Request]) -> bool:
        """Runs one step in the model's thread; if it fails, the requests concerned fail."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, step)
        await asyncio.wait({future})
        error = future.exception()
        if error is not None:
            name = type(error).__name__
            # Without the error's message, which may quote a prompt.
            places = "".join(traceback.format_tb(error.__traceback__))
            _log.error("A step failed: %s at\n%s", name, places)
            message = (
                f"The engine failed while it worked on this request ({name}); its log says where. "
                "Other requests go on."
            )
            self._fail(concerned, GenerationError(message))
            return False
        for emission in future.result():
            self._deliver(emission)
        return True

    def _deliver(self, emission: Emission) -> None:
        outbox = self._outboxes.get(emission.request)
        if outbox is not None:
            outbox.put_nowait(emission)
        if emission.is_last:
            self._forget([emission.request])

    def _fail(self, requests: Sequence[Request], error: SidelightError) -> None:
        for request in requests:
            self._deliver(Emission(request, error, is_last=True))

    def _forget(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._outboxes.pop(request, None)
            self._cancelled.discard(request)


def _event(emission: Emission) -> Event:
    if isinstance(emission.event, SidelightError):
        raise emission.event
    return emission.event
