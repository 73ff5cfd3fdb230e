"""What every inference engine offers: verdicts and text, as events of one forward pass.

The server knows this interface and no engine; an engine knows messages, and nothing of HTTP.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from sidelight.backbone import Fingerprint
from sidelight.engines.logprobs import TokenLogprobs
from sidelight.errors import SidelightError, VerdictError, did_you_mean
from sidelight.probe import Probe, common_format
from sidelight.prompts import Conversation, Message, PlainText
from sidelight.types import Verdict

# No engine reports "content_filter"; the server does, where a policy cut the text.
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class PromptJudged:
    """The prompt has been read; nothing is written yet.

    Attributes:
        verdicts: From every probe that reads the prompt alone.
        failed: Names of such probes without a verdict; never to be taken for a harmless one.
        is_unfamiliar: Whether the probes failed because the prompt is plain text and they were
            trained on chats.
        tokens: Length of the prompt.
        judging_s: Seconds that the probes added to the pass over the prompt. All requests of a pass
            wait for all of it, so it is not divided among them.
    """

    verdicts: tuple[Verdict, ...]
    failed: tuple[str, ...] = ()
    is_unfamiliar: bool = field(default=False, kw_only=True)
    tokens: int = field(kw_only=True)
    judging_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class TextDelta:
    """More text: whole characters, and nothing that a stop string may still take back.

    Attributes:
        text: What follows the text so far.
        tokens: How many tokens have been sampled: no later token has a part in the text.
        logprobs: For the tokens that the text comes from, where the request asked for them. Hold
            them back together with the text.
    """

    text: str
    tokens: int = field(kw_only=True)
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class ResponseScored:
    """The watched probes have read one more token of the response.

    Attributes:
        tokens: How many sampled tokens they have read. A ``TextDelta`` is judged once this reaches
            its own ``tokens``.
        verdicts: On the response so far, as if it ended here.
        failed: Names of watched probes without a verdict; never to be taken for a harmless one.
        judging_s: As in ``Finished``, so far.
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
        completion_tokens: Tokens sampled, including the end-of-turn token.
        verdicts: From every probe that reads the response. An end-of-turn token is never read.
            Where no probe is watched, the last sampled token is not run through the model either,
            so at ``length`` or a stop string they do not cover the last token of the text.
        failed: Names of such probes without a verdict; never to be taken for a harmless one.
        logprobs: For last tokens that are only a part of a character, so that no text comes from
            them.
        judging_s: Seconds that the probes added to all steps after the prompt.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    verdicts: tuple[Verdict, ...] = ()
    failed: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    judging_s: float = field(default=0.0, compare=False)


Event = PromptJudged | TextDelta | ResponseScored | Finished
E = TypeVar("E", bound=Event)


def written_by(event: Event) -> int:
    """How many tokens the event says have been sampled; 0 if it does not say."""
    match event:
        case TextDelta() | ResponseScored():
            return event.tokens
        case Finished():
            return event.completion_tokens
        case PromptJudged():
            return 0


class EngineBusyError(SidelightError):
    """The queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, *, waiting: int, limit: int, retry_after_s: int = 1):
        super().__init__(
            f"The queue is full ({waiting} waiting, the limit is {limit}). Retry in a moment."
        )
        self.retry_after_s = retry_after_s


class EngineUnavailableError(SidelightError):
    """The engine is still loading, or has stopped."""

    def __init__(self, message: str = "The engine is not running. Retry when /ready answers 200."):
        super().__init__(message)


class GenerationError(SidelightError):
    """A step of the engine failed; the requests of that step are lost, the engine goes on."""


@dataclass(frozen=True)
class Sampling:
    """How to write a text.

    Attributes:
        max_tokens: Most tokens to write; None: as many as the context has room for.
        temperature: 0 takes the most probable token every time.
        top_p: Draws from the most probable tokens that together reach this probability, in (0, 1].
        stop: Strings that end the text; none of them is part of it.
        seed: The same seed draws the same text; None: a fresh one.
        logprobs: How many of the likeliest tokens to report beside each token's log-probability;
            None: report no log-probability at all.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None


# Decides whether a judged prompt is answered. Called in a thread of the engine's, so it must decide
# from the event alone, at once, and raise nothing.
Admission = Callable[[PromptJudged], bool]


def admit_all(_judged: PromptJudged) -> bool:
    """Answers every prompt."""
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
        """The longest input that the model reads, in tokens."""

    @property
    @abstractmethod
    def load(self) -> Load:
        """The requests in the engine now."""

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether requests are accepted."""

    @abstractmethod
    async def start(self) -> None:
        """Begins to work, in the running event loop."""

    @abstractmethod
    async def close(self) -> None:
        """Ends the work; requests still in the engine fail with ``EngineUnavailableError``."""

    @abstractmethod
    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        """Serves these probes from now on, once each has given a verdict on a short text.

        A request that is in the engine keeps the probes that were loaded when it was called, or
        fails; none is silently judged by another set. After an error nothing has changed.

        Raises:
            FingerprintMismatchError: A probe belongs to another backbone.
            VerdictError: A probe gives no verdict.
            SidelightError: Two probes share a name, or the engine cannot replace probes.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """

    async def settled(self) -> None:
        """Waits while probes are being replaced: later calls are judged by the new ones.

        An engine that replaces them at once has nothing to wait for.
        """
        return

    @abstractmethod
    async def tokenize(self, text: Conversation) -> Tokens:
        """The tokens that ``generate``, or ``judge`` for a text with a response, would read.

        Raises:
            ContextLengthError: It is too long; nothing is cut.
            EngineUnavailableError: The model is loading.
        """

    def generate(
        self,
        messages: Conversation,
        sampling: Sampling,
        *,
        watch: Collection[str] = (),
        admits: Admission = admit_all,
    ) -> AsyncGenerator[Event, None]:
        """``PromptJudged``, any number of ``TextDelta``, ``Finished``; closing it cancels.

        The probes are those loaded when this is called, until the end. On plain text, probes that
        were trained on chats give no verdict: they are among the ``failed``.

        Args:
            messages: The conversation, or a text to continue.
            sampling: How to write.
            watch: Names of loaded probes that read the response. After each token of the response,
                including the last one of the text, there is a ``ResponseScored`` with their
                verdicts. That costs time; where no probe is named, none of it is spent.
            admits: Asked before the first token is drawn. If it refuses, ``PromptJudged`` is the
                only event, nothing is written, and the request has already left the engine.

        Raises:
            ContextLengthError: The prompt leaves no room for a token.
            EngineBusyError: The queue is full.
            EngineUnavailableError: The engine is loading or has stopped.
            GenerationError: A step failed.
            SidelightError: A watched probe is not loaded, or does not read the response.
        """
        probes = self.probes
        known = [probe.name for probe in probes if probe.reads.includes_response]
        for name in watch:
            if name not in known:
                raise SidelightError(
                    f"Probe '{name}' cannot be watched: no such probe reads the response."
                    f"{did_you_mean(name, known)}"
                )
        if not isinstance(messages, PlainText) or common_format(probes) != "chat":
            return self._write(messages, sampling, frozenset(watch), admits)
        return _without_verdicts(
            self._write(messages, sampling, frozenset(watch), lambda e: admits(_unjudged(e)))
        )

    @abstractmethod
    def _write(
        self, messages: Conversation, sampling: Sampling, watch: frozenset[str], admits: Admission
    ) -> AsyncGenerator[Event, None]:
        """As ``generate``, for a text that all probes can judge.

        Takes the loaded probes when it is called, not when its first event is asked for.
        """

    @abstractmethod
    def judge(
        self, conversations: Sequence[Sequence[Message]]
    ) -> Coroutine[Any, Any, list[PromptJudged]]:
        """The verdicts on each conversation, from one pass each; writes nothing.

        A conversation that ends with the assistant's turn is judged by every probe, that turn being
        the response; any other only by the probes that read the prompt alone. The probes are those
        loaded when this is called. A probe without a verdict is among the ``failed``.

        Raises:
            ContextLengthError: A conversation is too long; nothing is cut.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """


def _unjudged(event: E) -> E:
    """The event of a plain text whose probes were trained on chats: each of them has failed."""
    if isinstance(event, TextDelta):
        return event
    failed = (*(verdict.probe for verdict in event.verdicts), *event.failed)
    if isinstance(event, PromptJudged):
        return replace(event, verdicts=(), failed=failed, is_unfamiliar=True)
    return replace(event, verdicts=(), failed=failed)


async def _without_verdicts(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    async with aclosing(events):
        async for event in events:
            yield _unjudged(event)


def verdict_failure(probes: Iterable[str]) -> VerdictError:
    """The error that stands in for the verdicts of these probes."""
    return VerdictError(
        f"No verdict from {', '.join(probes)}: the output was not a finite number, the text has no "
        "token that the probe reads, or it is plain text and the probe was trained on chats. Treat "
        "the text as not judged."
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
