"""The request queue of an engine: which requests wait, and which run next."""

import asyncio
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sidelight.engines.base import Admission, EngineBusyError, Event, Sampling, admit_all
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt
from sidelight.probes.bank import ProbeBanks


@dataclass(frozen=True)
class Limits:
    """The limits of concurrent work in an engine.

    Attributes:
        running: Maximum number of running requests.
        waiting: Maximum number of queued requests, each possibly with several texts; more are
            refused.
        prefill_tokens: Prompt tokens per pass, including padding. A longer prompt is read alone, in
            several passes.
        prefill_texts: Number of prompts that are read together.
        cache_tokens: Positions of keys and values, including padding and tokens yet to be
            generated. A longer request runs alone.
    """

    running: int = 16
    waiting: int = 128
    prefill_tokens: int = 4096
    prefill_texts: int = sys.maxsize
    cache_tokens: int = 131_072


@dataclass(frozen=True, eq=False)
class Request:
    """A text to read, and possibly to continue.

    Attributes:
        max_tokens: Maximum number of tokens to generate, within the context; 0 only classifies the
            text.
        banks: Banks of the probes that classify it.
        has_response: Whether the prompt ends with the response to classify, which may be empty.
        monitored: Names of probes to evaluate after each token of the response.
        admits: Decides whether to generate, once the prompt has been classified.
        explain: Names of probes whose verdicts on the prompt to explain.
        outbox: Emissions for the waiting caller.
    """

    prompt: EncodedPrompt
    sampling: Sampling
    max_tokens: int
    banks: ProbeBanks
    has_response: bool = False
    monitored: frozenset[str] = frozenset()
    admits: Admission = admit_all
    explain: frozenset[str] = frozenset()
    outbox: "asyncio.Queue[Emission]" = field(default_factory=lambda: asyncio.Queue())

    @property
    def is_check(self) -> bool:
        """Whether nothing is to be generated."""
        return self.max_tokens == 0

    @property
    def cache_tokens(self) -> int:
        """Maximum number of positions of keys and values that the request can fill."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Emission:
    """An event or error of a request. ``is_last`` is True for the final one."""

    request: Request
    event: Event | SidelightError
    is_last: bool = False


@dataclass(eq=False)
class QueuePosition:
    """The place in the queue of requests that joined together.

    Attributes:
        latest: Number of the latest pass that served any of these requests, or of their arrival.
    """

    latest: int


class RequestQueue:
    """Schedules requests round-robin, one pass per turn.

    Requests are served in order of arrival; after a turn, a request moves behind all others. Texts
    that join together share a turn. Checks may overtake, because they need no running row.

    Attributes:
        awaited: Every request whose caller is still waiting, whether or not the request has
            started.
        has_work: Set when requests join.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._waiting: list[Request] = []
        self._turn = 0
        self.awaited: dict[Request, QueuePosition] = {}
        self.has_work = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, requests: Sequence[Request]) -> None:
        """Add requests that share one position in the queue.

        Raises:
            EngineBusyError: The queue is full.
        """
        waiting = len({self.awaited[request] for request in self._waiting})
        if waiting >= self._limits.waiting:
            raise EngineBusyError(waiting=waiting, limit=self._limits.waiting)
        self._turn += 1
        self._waiting.extend(requests)
        self.awaited.update(dict.fromkeys(requests, QueuePosition(self._turn)))
        self.has_work.set()

    def leave(self, requests: Iterable[Request]) -> None:
        """Remove requests whose callers have gone."""
        for request in requests:
            self.awaited.pop(request, None)
        self._waiting = [request for request in self._waiting if request in self.awaited]

    def serve(self, requests: Iterable[Request]) -> None:
        """Record a turn of these requests, which moves them behind all others."""
        self._turn += 1
        for request in requests:
            if request in self.awaited:
                self.awaited[request].latest = self._turn

    def latest_turn(self, requests: Iterable[Request]) -> int:
        """The latest pass of the longest-waiting request among these; the lowest goes next."""
        return min((self.awaited[r].latest for r in requests if r in self.awaited), default=0)

    def find_next(self, running: Sequence[Request]) -> list[Request]:
        """The requests for the next prefill, given those ``running``; they stay queued until
        ``take``.
        """
        batch: list[Request] = []
        is_blocked = False
        for request in sorted(self._waiting, key=lambda request: self.awaited[request].latest):
            if not self._fits_prefill([*batch, request]):
                break
            if self._needs_room(request) and not is_blocked:
                is_blocked = not self._fits_running(request, [*running, *batch])
            if not is_blocked or not self._needs_room(request):
                batch.append(request)
        return batch

    def take(self, requests: Sequence[Request]) -> None:
        """Remove requests from the queue."""
        taken = {*requests}
        self._waiting = [request for request in self._waiting if request not in taken]

    def _fits_prefill(self, batch: Sequence[Request]) -> bool:
        longest = max(len(request.prompt) for request in batch)
        limits, texts = self._limits, len(batch)
        is_small = texts <= limits.prefill_texts and texts * longest <= limits.prefill_tokens
        return texts == 1 or is_small

    def _needs_room(self, request: Request) -> bool:
        """Whether the request's keys and values are kept beyond one pass."""
        return not request.is_check or len(request.prompt) > self._limits.prefill_tokens

    def _fits_running(self, request: Request, running: Sequence[Request]) -> bool:
        cached = [
            running_request for running_request in running if self._needs_room(running_request)
        ]
        longest = max(running_request.cache_tokens for running_request in (*cached, request))
        fits_cache = not cached or (len(cached) + 1) * longest <= self._limits.cache_tokens
        return len(cached) < self._limits.running and fits_cache
