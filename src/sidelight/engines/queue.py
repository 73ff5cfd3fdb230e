"""The requests of an engine: which of them wait, which go next, and what happens to them."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sidelight.bank import Panel
from sidelight.engines.base import Admission, EngineBusyError, Event, Sampling, admit_all
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Place


@dataclass(frozen=True)
class Limits:
    """How much the engine may hold at once.

    Attributes:
        running: Requests that are being read or written, and one more of each key that has none.
        waiting: Requests of one key in the queue; more are refused.
        prefill_tokens: Tokens of prompts that one pass reads, padding included. A longer prompt is
            read alone, in several passes.
        cache_tokens: Positions of keys and values, including padding and the tokens still to be
            written. A longer request is written alone.
    """

    running: int = 16
    waiting: int = 128
    prefill_tokens: int = 4096
    cache_tokens: int = 131_072


@dataclass(frozen=True, eq=False)
class Request:
    """A text to read, and perhaps to continue.

    Attributes:
        max_tokens: Most tokens to write, within the context; 0: the text is only judged.
        panel: The probes that judge it.
        has_response: Whether the prompt ends with the response to judge, which may be empty.
        watch: Names of probes that are judged after each token of the response.
        admits: Whether to write at all, once the prompt has been judged.
        explain: Names of probes whose verdicts on the prompt are explained.
        places: Where each of its tokens stands, if there are any such probes.
        key: Whose it is; None: nobody's, which counts as one more key.
        outbox: What happens to it, for whoever waits.
    """

    prompt: EncodedPrompt
    sampling: Sampling
    max_tokens: int
    panel: Panel
    has_response: bool = False
    watch: frozenset[str] = frozenset()
    admits: Admission = admit_all
    explain: frozenset[str] = frozenset()
    places: Sequence[Place | None] = ()
    key: str | None = None
    outbox: "asyncio.Queue[Emission]" = field(default_factory=lambda: asyncio.Queue())

    @property
    def is_check(self) -> bool:
        """Whether nothing is to be written."""
        return self.max_tokens == 0

    @property
    def cache_tokens(self) -> int:
        """Positions of keys and values that it can come to fill."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Emission:
    """Something that happened to a request. ``is_last`` marks its last event or error."""

    request: Request
    event: Event | SidelightError
    is_last: bool = False


class RequestQueue:
    """Shares the model's time equally among keys, and that of a key among its requests.

    Whose key has had the least time goes next, as in fair queueing; of one key, first come first
    served. A key that comes anew, or again, has had as much as the one that has had the least.
    Checks may overtake, since they need no running row. So may whatever one pass can read, while a
    longer prompt of the same key is being read.

    Attributes:
        awaited: Every request that somebody still waits for, whether or not it was taken, and the
            seconds that it has had.
        has_work: Set when requests join.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._waiting: list[Request] = []
        self._seconds: dict[str | None, float] = {}
        self.awaited: dict[Request, float] = {}
        self.has_work = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, requests: Sequence[Request]) -> None:
        """Adds all of them, which have one key, or none.

        Raises:
            EngineBusyError: The key's requests fill the queue. A list longer than the limit can
                only join where none of them waits.
        """
        key = requests[0].key if requests else None
        waiting = sum(request.key == key for request in self._waiting)
        if waiting and waiting + len(requests) > self._limits.waiting:
            raise EngineBusyError(waiting=waiting, limit=self._limits.waiting)
        present = {request.key for request in self.awaited}
        if key not in present:
            least = min((self._had(other) for other in present), default=0.0)
            # A key that has gone is forgotten once all others have had as much.
            known = {k: had for k, had in self._seconds.items() if k in present or had > least}
            self._seconds = {key: least} | (known if present else {})
        had = min((had for r, had in self.awaited.items() if r.key == key), default=0.0)
        self._waiting.extend(requests)
        self.awaited.update(dict.fromkeys(requests, had))
        self.has_work.set()

    def leave(self, requests: Iterable[Request]) -> None:
        """Nobody waits for these requests any more."""
        for request in requests:
            self.awaited.pop(request, None)
        self._waiting = [request for request in self._waiting if request in self.awaited]

    def charge(self, requests: Sequence[Request], seconds: float) -> None:
        """Notes that the model has worked for so long for all of these together."""
        for request in requests:
            self._seconds[request.key] = self._had(request.key) + seconds / len(requests)
            if request in self.awaited:
                self.awaited[request] += seconds / len(requests)

    def rank(self, requests: Iterable[Request]) -> tuple[float, float]:
        """What has had the least time goes next: the seconds of the key, then of the request."""
        return min((self._had(r.key), self.awaited.get(r, 0.0)) for r in requests)

    def find_next(self, running: Sequence[Request], reading: Iterable[Request]) -> list[Request]:
        """Those that go into the next prefill; they wait until ``take``.

        Args:
            running: Those that have been taken and are not complete.
            reading: Those of them whose prompts have been read in part.
        """
        found: list[Request] = []
        keys = {request.key for request in reading}
        is_blocked = False
        for request in sorted(self._waiting, key=lambda request: self._had(request.key)):
            if self._is_long(request) and request.key in keys:
                continue
            if not self._fits_prefill([*found, request]):
                break
            if self._needs_room(request) and not is_blocked:
                is_blocked = not self._fits_running(request, [*running, *found])
            if not is_blocked or not self._needs_room(request):
                found.append(request)
        return found

    def take(self, requests: Sequence[Request]) -> None:
        """Removes those that no longer wait."""
        taken = {*requests}
        self._waiting = [request for request in self._waiting if request not in taken]

    def _had(self, key: str | None) -> float:
        return self._seconds.get(key, 0.0)

    def _fits_prefill(self, batch: Sequence[Request]) -> bool:
        longest = max(len(request.prompt) for request in batch)
        return len(batch) == 1 or len(batch) * longest <= self._limits.prefill_tokens

    def _is_long(self, request: Request) -> bool:
        return len(request.prompt) > self._limits.prefill_tokens

    def _needs_room(self, request: Request) -> bool:
        """Whether its keys and values are kept beyond one pass."""
        return not request.is_check or self._is_long(request)

    def _fits_running(self, request: Request, running: Sequence[Request]) -> bool:
        kept = [other for other in running if self._needs_room(other)]
        is_first = all(other.key != request.key for other in kept)
        longest = max(other.cache_tokens for other in (*kept, request))
        fits_cache = not kept or (len(kept) + 1) * longest <= self._limits.cache_tokens
        return (len(kept) < self._limits.running or is_first) and fits_cache
