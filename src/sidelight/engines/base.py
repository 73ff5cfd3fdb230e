"""What an inference engine gives the server: verdicts and text, as events of one forward pass.

The HTTP layer knows this interface and no engine; an engine knows messages, and nothing of HTTP.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from sidelight.errors import SidelightError, VerdictError
from sidelight.prompts import Message, Reads
from sidelight.types import Task, Verdict

FinishReason = Literal["stop", "length"]


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
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class PromptJudged:
    """The prompt has been read; nothing is written yet.

    Attributes:
        verdicts: Of every probe that reads the prompt only.
        failed: Names of such probes that gave no verdict; never to be read as a harmless one.
    """

    verdicts: tuple[Verdict, ...]
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More text: whole characters, and nothing that a stop string may still take back."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The text is complete.

    Attributes:
        reason: ``stop`` (end of turn or stop string) or ``length``.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens sampled, with the end-of-turn token.
        verdicts: Of every probe that reads the response. The last sampled token has not been run
            through the model, so they do not cover it: an end-of-turn token, or at ``length`` or a
            stop string the last token of the text.
        failed: Names of such probes that gave no verdict; never to be read as a harmless one.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    verdicts: tuple[Verdict, ...] = ()
    failed: tuple[str, ...] = ()


Event = PromptJudged | TextDelta | Finished


@dataclass(frozen=True)
class Load:
    """How busy an engine is, in requests."""

    running: int
    waiting: int


@runtime_checkable
class LoadedProbe(Protocol):
    """What the server has to know of a probe."""

    @property
    def name(self) -> str:
        """Unique among the loaded probes."""
        ...

    @property
    def task(self) -> Task:
        """What it decides."""
        ...

    @property
    def reads(self) -> Reads:
        """Which side of the conversation it reads."""
        ...


class Engine(ABC):
    """One served model with its probes."""

    @property
    @abstractmethod
    def model(self) -> str:
        """The name that requests give as ``model``."""

    @property
    @abstractmethod
    def probes(self) -> Sequence[LoadedProbe]:
        """Every loaded probe."""

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
    def generate(
        self, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncGenerator[Event, None]:
        """``PromptJudged``, any number of ``TextDelta``, ``Finished``; closing it cancels.

        Raises:
            ContextLengthError: The prompt leaves no room for a token.
            EngineBusyError: The line is full.
            EngineUnavailableError: Loading or stopped.
            GenerationError: A step failed.
        """

    @abstractmethod
    async def judge(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[Verdict, ...]]:
        """The verdicts on each conversation, from one pass each; writes nothing.

        A conversation that ends with the assistant's turn is judged by every probe, that turn being
        the response; any other only by the probes that read the prompt alone.

        Raises:
            VerdictError: A probe gave no verdict on some conversation.
            ContextLengthError: A conversation is too long; nothing is cut.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """


def verdict_failure(probes: Iterable[str]) -> VerdictError:
    """The error that stands in for the verdicts of these probes."""
    return VerdictError(
        f"No verdict from {', '.join(probes)}: the output was not a finite number, or the text has "
        "no token that the probe reads. Treat the text as not judged."
    )
