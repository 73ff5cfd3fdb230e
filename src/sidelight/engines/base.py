"""The contract of inference engines: verdicts and text, as events of one forward pass.

The server knows this interface and no engine; an engine knows messages, and nothing of HTTP.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sidelight.errors import SidelightError, VerdictError, did_you_mean
from sidelight.models.conversation import Conversation, Message
from sidelight.models.fingerprint import Fingerprint, accepted_copy
from sidelight.probes.artifact import gives_verdicts
from sidelight.probes.explanation import Explanation
from sidelight.probes.probe import Probe, common_format
from sidelight.types import Verdicts

# Engines report "stop" or "length"; `policy/` reports "content_filter" where it cut the text.
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class PromptClassified:
    """The prompt has been read; nothing is written yet.

    Attributes:
        verdicts: By every probe that reads the prompt alone.
        is_plain: Whether the prompt is plain text, so that probes of chats have failed.
        tokens: Length of the prompt.
        explanations: Of the probes that the request names and that gave a verdict.
        classification_s: Seconds that the probes added to the pass over the prompt. Every request
            in a pass waits for all of it, so it is not divided among them.
    """

    verdicts: Verdicts
    is_plain: bool = field(default=False, kw_only=True)
    tokens: int = field(kw_only=True)
    explanations: tuple[Explanation, ...] = field(default=(), compare=False)
    classification_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class TextDelta:
    """More text: whole characters, and nothing that a stop string can still take back.

    Attributes:
        text: What follows the text so far.
        tokens: How many tokens have been sampled; no later token contributes to the text.
    """

    text: str
    tokens: int = field(kw_only=True)


@dataclass(frozen=True)
class ResponseScored:
    """The watched probes have read one more token of the response.

    Attributes:
        tokens: How many sampled tokens they have read. A ``TextDelta`` is judged once this reaches
            its own ``tokens``.
        verdicts: By the watched probes, on the response so far, as if it ended here.
        final_characters: How many characters of the text have spans that no later token changes;
            None: no probe labels spans.
        classification_s: As in ``Finished``, so far.
    """

    tokens: int
    verdicts: Verdicts
    final_characters: int | None = None
    classification_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Finished:
    """The text is complete.

    Attributes:
        reason: ``stop`` (end of turn or stop string) or ``length``.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens sampled, including the end-of-turn token.
        verdicts: By every probe that reads the response. An end-of-turn token is never read.
            If no probe is watched, the last sampled token is not run through the model either, so
            at ``length`` or a stop string the verdicts do not cover the last token of the text.
        classification_s: Seconds that the probes added to all steps after the prompt.
        is_stopped: Whether the request ended the text, perhaps within a word, and not the model.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    verdicts: Verdicts = field(default_factory=Verdicts)
    classification_s: float = field(default=0.0, compare=False)
    is_stopped: bool = False


Event = PromptClassified | TextDelta | ResponseScored | Finished


class EngineBusyError(SidelightError):
    """The queue is full; try again in a moment."""

    def __init__(self, *, waiting: int, limit: int):
        super().__init__(
            f"The queue is full ({waiting} waiting, the limit is {limit}). Try again in a moment."
        )


class EngineUnavailableError(SidelightError):
    """The engine is loading or has stopped."""

    def __init__(
        self, message: str = "The engine is not running. Try again when /ready returns 200."
    ):
        super().__init__(message)


class GenerationError(SidelightError):
    """A step of the engine failed. The requests in that step are lost; the engine goes on."""


class NotExplainedError(SidelightError):
    """The engine does not keep what an explanation is made from."""

    def __init__(self) -> None:
        super().__init__(
            "This engine cannot explain verdicts, because it discards the hidden states once the "
            "probes have read them. Leave 'explain' out, or use the transformers engine "
            "(sidelight serve --engine transformers, sidelight predict --explain)."
        )


@dataclass(frozen=True)
class Sampling:
    """The settings of a text to write.

    Attributes:
        max_tokens: Most tokens to write. None fills the context.
        temperature: 0 takes the most probable token every time.
        top_p: Draws from the most probable tokens that together reach this probability, in (0, 1].
        stop: Strings that end the text and are not part of it.
        seed: The same seed draws the same text. None takes a fresh one.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


Admission = Callable[[PromptClassified], bool]
"""Decides whether a judged prompt is answered.

The engine may call it in any thread, or in the event loop. It must decide from the event alone,
without waiting, and must not raise.
"""


def admit_all(_event: PromptClassified) -> bool:
    """Answers every prompt."""
    return True


@dataclass(frozen=True)
class Load:
    """The load of an engine, in requests."""

    running: int
    waiting: int


class Engine(ABC):
    """One served model with its probes.

    Attributes:
        model: The name that requests give as ``model``.
        max_tokens: The longest input that the model reads, in tokens.
    """

    model: str
    max_tokens: int

    @property
    @abstractmethod
    def probes(self) -> Sequence[Probe]:
        """Every loaded probe."""

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
        """Start the engine in the running event loop."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine; requests still in it fail with ``EngineUnavailableError``."""

    @abstractmethod
    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        """Serve these probes from now on, once each has given a verdict (``require_verdicts``).

        A request in the engine keeps the probes that were loaded when it was made, or it fails; it
        is never silently judged by other ones. After an error nothing has changed.

        Raises:
            FingerprintMismatchError: A probe belongs to another backbone.
            VerdictError: A probe gives no verdict.
            SidelightError: Two probes share a name, or the engine cannot replace probes.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """

    def serving(self) -> AbstractAsyncContextManager[Any]:
        """Entered by a request before it is told which probes there are, and left at its end.

        It waits while probes are being replaced, so that later calls are judged by the new ones.
        """
        return nullcontext()

    @abstractmethod
    async def tokenize(self, text: Conversation) -> tuple[int, ...]:
        """The token ids that ``generate``, or ``classify`` for a text with a response, would read.

        Raises:
            ContextLengthError: The text is too long; it is never cut.
            EngineUnavailableError: The model is loading.
        """

    @abstractmethod
    def generate(
        self,
        messages: Conversation,
        sampling: Sampling,
        *,
        monitored: Collection[str] = (),
        admits: Admission = admit_all,
    ) -> AsyncGenerator[Event, None]:
        """Yield ``PromptClassified``, any ``TextDelta`` and ``ResponseScored``, and ``Finished``.

        Closing the generator cancels the request. It is judged to its end by the probes that are
        loaded when this is called, not when the first event is requested. Probes that were trained
        on chats alone give no verdict on plain text: they are among the ``failed``.

        Args:
            messages: The conversation, or a text to continue.
            sampling: How to write.
            monitored: Names of loaded probes that read the response. After each token of the
                response, including the last one of the text, a ``ResponseScored`` carries their
                verdicts. That costs time, and none if no probe is named.
            admits: Asked before the first token is drawn. If it refuses, ``PromptClassified`` is
                the only event, nothing is written, and the request has already left the engine.

        Raises:
            ContextLengthError: The prompt leaves no room for a token.
            EngineBusyError: The queue is full.
            EngineUnavailableError: The engine is loading or has stopped.
            GenerationError: A step failed.
            SidelightError: A watched probe is not loaded, or does not read the response.
        """

    @abstractmethod
    def classify(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        explain: Collection[str] | None = None,
    ) -> Coroutine[Any, Any, list[PromptClassified]]:
        """The verdicts on each conversation, from one pass over it; writes nothing.

        If the last turn is the assistant's, it is taken as the response, and every probe judges the
        conversation. Otherwise only the probes that read the prompt alone do. The probes are those
        loaded when this is called.

        Args:
            conversations: To judge.
            explain: Names of probes whose verdicts are explained; None: not requested.

        Raises:
            ContextLengthError: A conversation is too long; it is never cut.
            NotExplainedError: This engine cannot explain.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """


def require_monitored(monitored: Collection[str], probes: Sequence[Probe]) -> frozenset[str]:
    """The names in ``monitored``, each of a probe that reads the response; for ``generate``."""
    watchable = [probe.name for probe in probes if probe.reads.includes_response]
    for name in monitored:
        if name not in watchable:
            raise SidelightError(
                f"Probe '{name}' cannot be monitored: no probe of this name reads the "
                f"response.{did_you_mean(name, watchable)}"
            )
    return frozenset(monitored)


def verdict_failure(probes: Iterable[str]) -> VerdictError:
    """The error that stands in for the verdicts of these probes."""
    return VerdictError(
        f"No verdict from {', '.join(probes)}: the output was not a finite number, the text has "
        "no token that the probe reads, or the text is plain and the probe was trained only on "
        "chats. Treat the text as unclassified."
    )


def require_verdicts(probes: Iterable[Probe], *, device: torch.device | str = "cpu") -> None:
    """Check that probes can judge a text: see ``gives_verdicts``.

    Raises:
        VerdictError: Some cannot.
    """
    if failed := [probe.name for probe in probes if not gives_verdicts(probe, device=device)]:
        raise verdict_failure(failed)


def require_same_model(probes: Sequence[Probe], fingerprint: Fingerprint) -> None:
    """Check that the probes were trained on this model, or are accepted on this copy of it.

    Raises:
        SidelightError: Some read chats and others raw texts, which are two models to a fingerprint.
        FingerprintMismatchError: One was trained on another model.
    """
    common_format(probes)
    for probe in probes:
        probe.card.backbone.require(fingerprint, probe=probe.name, accepted=accepted_copy())
