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
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from sidelight.backbone import TransformersBackbone
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
    admit_all,
    can_judge,
    require_same_model,
    require_watchable,
    unjudged_admission,
    verdict_failure,
    without_verdicts,
)
from sidelight.engines.batch import Batch, Emission, Failed
from sidelight.engines.judging import Panel
from sidelight.engines.queue import Limits, Request, RequestQueue
from sidelight.engines.text import WARM_UP, TextReader, has_response
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
        self._encoder = backbone.encoder
        self._panel = self._seat(probes)
        self._batch = Batch(backbone)
        self._reader = TextReader(
            backbone.encoder, backbone.tokenizer, max_tokens=backbone.encoder.max_tokens
        )
        self._line = RequestQueue(limits or Limits())
        self._outboxes: dict[Request, Outbox] = {}
        self._cancelled: set[Request] = set()
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sidelight-model")
        self._loop: asyncio.Task[None] | None = None

    @property
    def model(self) -> str:
        """The name that requests give as ``model``."""
        return self._model

    @property
    def probes(self) -> Sequence[Probe]:
        """Every loaded probe."""
        return self._panel.probes

    @property
    def max_tokens(self) -> int:
        """The longest input that the model reads."""
        return self._reader.max_tokens

    @property
    def load(self) -> Load:
        """The requests in it now."""
        return Load(running=len(self._batch.requests), waiting=len(self._line))

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._loop is not None and not self._loop.done()

    async def start(self) -> None:
        """Begins to work, in the running event loop."""
        self._loop = asyncio.create_task(self._run())
        self._loop.add_done_callback(lambda _: self._fail(list(self._outboxes), _stopped()))

    async def close(self) -> None:
        """Ends the work after the step in progress; requests still in it fail."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait({self._loop})
        await asyncio.to_thread(self._thread.shutdown)

    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        """Serves these probes from now on, once each has given a verdict on a short text."""
        panel = await asyncio.to_thread(self._seat, probes)
        (judged,) = await self._judge([WARM_UP], panel)
        if judged.failed:
            raise verdict_failure(judged.failed)
        self._panel = panel

    async def tokenize(self, text: Conversation) -> Tokens:
        """The tokens that ``generate``, or for a text with a response ``judge``, would read."""
        return await asyncio.to_thread(self._reader.tokens, text)

    def generate(
        self,
        messages: Conversation,
        sampling: Sampling,
        *,
        watch: Collection[str] = (),
        admits: Admission = admit_all,
    ) -> AsyncGenerator[Event, None]:
        """``PromptJudged``, any number of ``TextDelta``, ``Finished``; closing it cancels."""
        # Not in the generator: that begins later, and other probes may be loaded until then.
        panel = self._panel
        require_watchable(watch, panel.probes)

        is_judged = can_judge(panel.probes, messages)
        admission = admits if is_judged else unjudged_admission(admits)

        def request() -> Request:
            prompt = self._encoder.encode(messages)
            room = self._reader.room(prompt, sampling.max_tokens)
            return Request(prompt, sampling, room, panel, watch=frozenset(watch), admits=admission)

        events = self._written(request)
        return events if is_judged else without_verdicts(events)

    async def _written(self, read: Callable[[], Request]) -> AsyncGenerator[Event, None]:
        request = await asyncio.to_thread(read)
        with self._submitted([request]) as (outbox,):
            is_last = False
            while not is_last:
                emission = await outbox.get()
                is_last = emission.is_last
                yield _event(emission)

    def judge(
        self, conversations: Sequence[Sequence[Message]]
    ) -> Coroutine[Any, Any, list[PromptJudged]]:
        """The verdicts on each conversation, from one pass each; writes nothing."""
        return self._judge(conversations, self._panel)

    async def _judge(
        self, conversations: Sequence[Sequence[Message]], panel: Panel
    ) -> list[PromptJudged]:
        requests = await asyncio.to_thread(lambda: [self._check(c, panel) for c in conversations])
        with self._submitted(requests) as outboxes:
            return [_judged(await outbox.get()) for outbox in outboxes]

    def _seat(self, probes: Sequence[Probe]) -> Panel:
        require_same_model(probes, self._backbone.fingerprint)
        return Panel.of(probes, device=self._backbone.device)

    def _check(self, messages: Sequence[Message], panel: Panel) -> Request:
        prompt = self._reader.read(messages)
        return Request(prompt, Sampling(), 0, panel, has_response=has_response(messages))

    @contextmanager
    def _submitted(self, requests: Sequence[Request]) -> Generator[list[Outbox]]:
        """Lines the requests up; when the caller leaves, what is unfinished is cancelled."""
        if not self.is_ready:
            raise _stopped()
        self._line.join(requests)
        outboxes = [Outbox() for _ in requests]
        self._outboxes.update(zip(requests, outboxes, strict=True))
        self._work.set()
        try:
            yield outboxes
        finally:
            unfinished = self._outboxes.keys() & set(requests)
            self._forget(unfinished)
            self._line.leave(unfinished)
            self._cancelled |= unfinished

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            await self._turn()
            if not self._line and not self._batch.requests:
                self._work.clear()

    async def _turn(self) -> None:
        if self._cancelled:
            gone, self._cancelled = self._cancelled, set[Request]()
            await self._step_running(partial(self._batch.drop, gone))
        admitted = self._line.admit(self._batch.requests)
        for together in _by_panel(admitted):
            await self._step(partial(self._batch.prefill, together), together)
        if self._batch.requests:
            await self._step_running(self._batch.decode)

    async def _step_running(self, step: Callable[[], list[Emission]]) -> None:
        if not await self._step(step, self._batch.requests):
            self._batch.clear()

    async def _step(self, step: Callable[[], list[Emission]], concerned: Sequence[Request]) -> bool:
        """Runs one step in the model's thread; its failure is that of the requests concerned."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, step)
        await asyncio.wait({future})
        error = future.exception()
        if error is not None:
            _log.error("A step failed: %s at\n%s", type(error).__name__, _places(error))
            self._fail(concerned, _lost(error))
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
            self._deliver(Emission(request, Failed(error), is_last=True))

    def _forget(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._outboxes.pop(request, None)
            self._cancelled.discard(request)


def _event(emission: Emission) -> Event:
    match emission.event:
        case Failed(error):
            raise error
        case event:
            return event


def _judged(emission: Emission) -> PromptJudged:
    event = _event(emission)
    assert isinstance(event, PromptJudged)
    return event


def _by_panel(requests: Sequence[Request]) -> list[list[Request]]:
    panels = dict.fromkeys(request.panel for request in requests)
    return [[request for request in requests if request.panel is panel] for panel in panels]


def _stopped() -> EngineUnavailableError:
    return EngineUnavailableError("The engine is not running. Try again when /ready is 200.")


def _lost(error: BaseException) -> GenerationError:
    return GenerationError(
        f"The engine failed while it worked on this request ({type(error).__name__}); its log says "
        "where. Other requests go on."
    )


def _places(error: BaseException) -> str:
    """Where it happened, without its message: that may quote a prompt."""
    return "".join(traceback.format_tb(error.__traceback__))
