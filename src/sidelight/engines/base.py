"""What an engine tells of one request, in the order in which it happens.

What an inference engine gives the server: verdicts and text, as events of one forward pass.

The HTTP layer knows this interface and no engine; an engine knows messages, and nothing of HTTP.

How long probes take within the steps of an engine.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Sequence,
)
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch

from sidelight.backbone import Fingerprint
from sidelight.engines.logprobs import TokenLogprobs
from sidelight.errors import SidelightError, VerdictError, did_you_mean
from sidelight.probe import Probe, common_format
from sidelight.prompts import Conversation, Message, PlainText
from sidelight.types import Verdict

# "content_filter" is the server's, where a policy cut the text; no engine says it.
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class PromptJudged:
    """The prompt has been read; nothing is written yet.

    Attributes:
        verdicts: Of every probe that reads the prompt only.
        failed: Names of such probes that gave no verdict; never to be read as a harmless one.
        too_long: Those of the failed that a policy lets judge no text of this length; the server's,
            no engine says it.
        is_unfamiliar: Whether the probes have failed since the prompt is plain text, and they were
            trained on chats.
        tokens: Of the prompt.
        judging_s: Seconds by which the probes made the pass over the prompt longer. All requests of
            one pass wait for all of it, so it is not divided among them.
    """

    verdicts: tuple[Verdict, ...]
    failed: tuple[str, ...] = ()
    too_long: tuple[str, ...] = field(default=(), kw_only=True)
    is_unfamiliar: bool = field(default=False, kw_only=True)
    tokens: int = field(kw_only=True)
    judging_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class TextDelta:
    """More text: whole characters, and nothing that a stop string may still take back.

    Attributes:
        text: What follows the text so far.
        tokens: How many tokens have been sampled: no token after these has a part in the text.
        logprobs: Of the tokens that the text comes from, where they were asked for. Whoever holds
            the text back holds back these.
    """

    text: str
    tokens: int = field(kw_only=True)
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class ResponseScored:
    """The watched probes have read one more token of the response.

    Attributes:
        tokens: How many tokens they have read, the ones that were sampled first. A ``TextDelta``
            is judged once this reaches its own ``tokens``.
        verdicts: On the response so far, as if it ended here.
        failed: Names of watched probes that gave no verdict; never to be read as a harmless one.
        judging_s: As ``Finished`` has it, so far.
    """

    tokens: int
    verdicts: tuple[Verdict, ...]
    failed: tuple[str, ...] = ()
    judging_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Finished:
    """The text is complete.

    Attributes:
        reason: ``stop`` (end of turn or stop string) or ``length``.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens sampled, with the end-of-turn token.
        verdicts: Of every probe that reads the response. An end-of-turn token is never read. Where
            no probe is watched, the last sampled token is not run through the model either, so at
            ``length`` or a stop string they do not cover the last token of the text.
        failed: Names of such probes that gave no verdict; never to be read as a harmless one.
        too_long: As ``PromptJudged`` has it.
        logprobs: Of the last tokens, where they were asked for and are only a part of a character:
            no text comes from these.
        judging_s: Seconds by which the probes made the steps after the prompt longer, in all.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    verdicts: tuple[Verdict, ...] = ()
    failed: tuple[str, ...] = ()
    too_long: tuple[str, ...] = field(default=(), kw_only=True)
    logprobs: tuple[TokenLogprobs, ...] = ()
    judging_s: float = field(default=0.0, compare=False)


Event = PromptJudged | TextDelta | ResponseScored | Finished
E = TypeVar("E", bound=Event)


def unjudged(event: E) -> E:
    """The event of a plain text whose probes were trained on chats: each has failed."""
    if isinstance(event, TextDelta):
        return event
    failed = (*(verdict.probe for verdict in event.verdicts), *event.failed)
    if isinstance(event, PromptJudged):
        return replace(event, verdicts=(), failed=failed, is_unfamiliar=True)
    return replace(event, verdicts=(), failed=failed)


def written_by(event: Event) -> int:
    """How many tokens the event says have been sampled; 0 where it says nothing of it."""
    match event:
        case TextDelta() | ResponseScored():
            return event.tokens
        case Finished():
            return event.completion_tokens
        case PromptJudged():
            return 0


class EngineBusyError(SidelightError):
    """The line is full; ask again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailableError(SidelightError):
    """The engine is still loading, or has stopped."""


class GenerationError(SidelightError):
    """A step of the engine failed; the requests of that step are lost, the engine goes on."""


@dataclass(frozen=True)
class Sampling:
    """How to write.

    Attributes:
        max_tokens: Most tokens to write; None: as many as the context has room for.
        temperature: 0 takes the most probable token every time.
        top_p: Draws from the most probable tokens that together reach this probability, in (0, 1].
        stop: Strings that end the text; none of them is part of it.
        seed: The same seed draws the same text; None: a fresh one.
        logprobs: How many of the likeliest tokens are told with each token's log-probability;
            None: not even that is.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None


# Whether a prompt that has been judged may be answered. Called in a thread of the engine's: it
# decides by the event alone, at once, and raises nothing.
Admission = Callable[[PromptJudged], bool]


def admit_all(_judged: PromptJudged) -> bool:
    """Every prompt is answered."""
    return True


@dataclass(frozen=True)
class Tokens:
    """A text as the model reads it.

    Attributes:
        ids: One per token.
        texts: Each token as the tokenizer writes it.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """How busy an engine is, in requests."""

    running: int
    waiting: int


class Engine(ABC):
    """One served model with its probes."""

    @property
    @abstractmethod
    def model(self) -> str:
        """The name that requests give as ``model``."""

    @property
    @abstractmethod
    def probes(self) -> Sequence[Probe]:
        """Every loaded probe."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """The longest input that the model reads."""

    @property
    @abstractmethod
    def load(self) -> Load:
        """The requests in it now."""

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether requests are accepted."""

    @abstractmethod
    async def start(self) -> None:
        """Begins to work, in the running event loop."""

    @abstractmethod
    async def close(self) -> None:
        """Ends the work; requests still in it fail with ``EngineUnavailableError``."""

    @abstractmethod
    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        """Serves these probes from now on, once each has given a verdict on a short text.

        A request that is in the engine keeps the probes that were loaded when it was called, or
        fails; none is judged by another set in silence. After an error nothing has changed.

        Raises:
            FingerprintMismatchError: A probe belongs to another backbone.
            VerdictError: A probe gives no verdict.
            SidelightError: Two probes share a name.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """

    async def settled(self) -> None:
        """Waits while probes are being replaced: who asks then is judged by the new ones.

        An engine that replaces them at once has nothing to wait for.
        """
        return

    @abstractmethod
    async def tokenize(self, text: Conversation) -> Tokens:
        """The tokens that ``generate``, or for a text with a response ``judge``, would read.

        Raises:
            ContextLengthError: It is too long; nothing is cut.
            EngineUnavailableError: Loading.
        """

    @abstractmethod
    def generate(
        self,
        messages: Conversation,
        sampling: Sampling,
        *,
        watch: Collection[str] = (),
        admits: Admission = admit_all,
    ) -> AsyncGenerator[Event, None]:
        """``PromptJudged``, any number of ``TextDelta``, ``Finished``; closing it cancels.

        The probes are those loaded when this is called, until the end. Of a plain text, probes that
        were trained on chats give no verdict: they are among the ``failed``.

        Args:
            messages: The conversation, or a text to go on with.
            sampling: How to write.
            watch: Names of loaded probes that read the response. After each token of the response,
                the text's last one included, there is a ``ResponseScored`` with their verdicts;
                that costs time, so nothing of it happens where no probe is named.
            admits: Asked before the first token is drawn. Where it says no, ``PromptJudged`` is the
                only event, nothing is written, and the request has left the engine by then.

        Raises:
            ContextLengthError: The prompt leaves no room for a token.
            EngineBusyError: The line is full.
            EngineUnavailableError: Loading or stopped.
            GenerationError: A step failed.
            SidelightError: A watched probe is not loaded, or does not read the response.
        """

    @abstractmethod
    def judge(
        self, conversations: Sequence[Sequence[Message]]
    ) -> Coroutine[Any, Any, list[PromptJudged]]:
        """The verdicts on each conversation, from one pass each; writes nothing.

        A conversation that ends with the assistant's turn is judged by every probe, that turn being
        the response; any other only by the probes that read the prompt alone. The probes are those
        loaded when this is called. A probe that gave no verdict is among the ``failed``.

        Raises:
            ContextLengthError: A conversation is too long; nothing is cut.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """


def verdict_failure(probes: Iterable[str]) -> VerdictError:
    """The error that stands in for the verdicts of these probes."""
    return VerdictError(
        f"No verdict from {', '.join(probes)}: the output was not a finite number, the text has no "
        "token that the probe reads, or it is plain text and the probe was trained on chats. Treat "
        "the text as not judged."
    )


def can_judge(probes: Iterable[Probe], text: Conversation) -> bool:
    """Whether the probes were trained on texts of this kind: chats teach nothing of plain text."""
    return not isinstance(text, PlainText) or common_format(probes) != "chat"


def unjudged_admission(admits: Admission) -> Admission:
    """Asks about the prompt as ``unjudged`` tells of it."""
    return lambda judged: admits(unjudged(judged))


async def without_verdicts(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The events with a failure in the place of each verdict."""
    async with aclosing(events):
        async for event in events:
            yield unjudged(event)


def require_watchable(watch: Iterable[str], probes: Sequence[Probe]) -> None:
    """Checks that each name is that of a probe that reads the response.

    Raises:
        SidelightError: One is not; it would never be scored while the text is written.
    """
    known = [probe.name for probe in probes if probe.reads.includes_response]
    for name in watch:
        if name not in known:
            raise SidelightError(
                f"Probe '{name}' cannot be watched: no such probe reads the response."
                f"{did_you_mean(name, known)}"
            )


def require_same_model(probes: Sequence[Probe], fingerprint: Fingerprint) -> None:
    """Checks that the probes were trained on this model.

    Raises:
        SidelightError: Some read chats and others raw texts, which are two models to a fingerprint.
        FingerprintMismatchError: One was trained on another model.
    """
    common_format(probes)
    for probe in probes:
        probe.fingerprint.require(fingerprint, probe=probe.name)


class Stopwatch:
    """Adds up the wall-clock time of some parts of one step.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self, *, after: torch.device | None = None) -> Generator[None]:
        """Counts what happens meanwhile.

        Args:
            after: Waits first until this device has done what it was told: a GPU works on while
                Python goes ahead, and what it still has to do must not count.
        """
        if after is not None and after.type == "cuda":
            torch.cuda.synchronize(after)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
