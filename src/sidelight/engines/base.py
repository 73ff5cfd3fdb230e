"""The contract of inference engines: verdicts and text, as events of one forward pass.

The server uses this interface, not particular engines; an engine works on messages, not HTTP.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sidelight.errors import SidelightError, VerdictError, did_you_mean
from sidelight.models.conversation import Conversation, EncodedPrompt, Message
from sidelight.models.fingerprint import Fingerprint, accepted_copy
from sidelight.probes.artifact import gives_verdicts
from sidelight.probes.explanation import Explanation
from sidelight.probes.probe import Probe, common_format
from sidelight.types import Verdicts

# Engines report "stop" or "length"; `policy/` reports "content_filter" where it ended the text.
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class PromptClassified:
    """The prompt has been read; nothing has been generated yet.

    Attributes:
        verdicts: Verdicts of every probe that reads only the prompt.
        prompt: The prompt; probes of chats fail for plain text.
        explanations: Explanations of the requested probes that gave a verdict.
        classification_s: Seconds that the probes added to the pass over the prompt. Every request
            in a pass waits for the whole time, so it is not divided among them.
    """

    verdicts: Verdicts
    prompt: EncodedPrompt
    explanations: tuple[Explanation, ...] = field(default=(), compare=False)
    classification_s: float = field(default=0.0, compare=False)

    @property
    def tokens(self) -> int:
        """Length of the prompt in tokens."""
        return len(self.prompt)


@dataclass(frozen=True)
class TextDelta:
    """More text: complete characters that no stop string can still remove.

    Attributes:
        text: The new text.
        tokens: Number of tokens sampled; no later token contributes to the text.
    """

    text: str
    tokens: int = field(kw_only=True)


@dataclass(frozen=True)
class ResponseScored:
    """The monitored probes have read one more token of the response.

    Attributes:
        tokens: Number of sampled tokens that they have read. A ``TextDelta`` is classified once
            this reaches its ``tokens``.
        verdicts: Verdicts of the monitored probes on the response so far, as if it ended here.
        final_characters: Number of leading characters whose spans are final; None if no probe
            labels spans.
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
        verdicts: Verdicts of every probe that reads the response. An end-of-turn token is never
            read. If no probe is monitored, the last sampled token is not run through the model
            either, so at ``length`` or a stop string the verdicts do not cover the last token of
            the text.
        classification_s: Seconds that the probes added to all steps after the prompt.
        is_stopped: Whether the request, not the model, ended the text, possibly within a word.
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
    """A step of the engine failed. The requests in that step are lost; the engine continues."""


class NotExplainedError(SidelightError):
    """The engine does not keep the data that explanations need."""

    def __init__(self) -> None:
        super().__init__(
            "This engine cannot explain verdicts, because it discards the hidden states once the "
            "probes have read them. Leave 'explain' out, or use the transformers engine "
            "(sidelight serve --engine transformers, sidelight predict --explain)."
        )


@dataclass(frozen=True)
class Sampling:
    """The settings of a text to generate.

    Attributes:
        max_tokens: Maximum number of tokens to generate. None fills the context.
        temperature: 0 always chooses the most probable token.
        top_p: Sample from the most probable tokens whose total probability reaches this value, in
            (0, 1].
        stop: Strings that end the text and are not part of it.
        seed: The same seed produces the same text. None uses a random one.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


Admission = Callable[[PromptClassified], bool]
"""Decides whether a classified prompt is answered.

The engine may call it in any thread, or in the event loop. It must decide from the event alone,
without waiting, and must not raise.
"""


def admit_all(_event: PromptClassified) -> bool:
    """Admit every prompt."""
    return True


@dataclass(frozen=True)
class Load:
    """The load of an engine, in requests."""

    running: int
    waiting: int


class Engine(ABC):
    """One served model with its probes.

    Attributes:
        model: Name that requests give as ``model``.
        max_tokens: Context length in tokens.
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
        """The requests that are currently in the engine."""

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
        """Replace the served probes, once each new one has given a verdict (``require_verdicts``).

        A request in the engine keeps the probes that were loaded when it was created, or it fails;
        it is never silently classified by others. After an error, nothing has changed.

        Raises:
            FingerprintMismatchError: A probe belongs to another backbone.
            VerdictError: A probe gives no verdict.
            SidelightError: Two probes share a name, or the engine cannot replace probes.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """

    def serving(self) -> AbstractAsyncContextManager[Any]:
        """Context that a request enters before it looks up the probes, and leaves at its end.

        It waits while probes are being replaced, so that later calls use the new ones.
        """
        return nullcontext()

    @abstractmethod
    async def tokenize(self, text: Conversation) -> tuple[int, ...]:
        """The token ids that ``generate``, or ``classify`` for a text with a response, would read.

        Raises:
            ContextLengthError: The text is too long; it is never truncated.
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

        Closing the generator cancels the request. The probes are those loaded when this is called,
        not when the first event is requested. Probes trained only on chats give no verdict on plain
        text and are among the ``failed``.

        Args:
            messages: The conversation, or a text to continue.
            sampling: Sampling settings.
            monitored: Names of loaded probes that read the response. After each token of the
                response, including the last one, a ``ResponseScored`` has their verdicts. This has
                a cost only if probes are named.
            admits: Called before the first token is sampled. If it refuses, ``PromptClassified`` is
                the only event, nothing is generated, and the request has already left the engine.

        Raises:
            ContextLengthError: The prompt leaves no room for a token.
            EngineBusyError: The queue is full.
            EngineUnavailableError: The engine is loading or has stopped.
            GenerationError: A step failed.
            SidelightError: A monitored probe is not loaded, or does not read the response.
        """

    @abstractmethod
    def classify(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        explain: Collection[str] | None = None,
    ) -> Coroutine[Any, Any, list[PromptClassified]]:
        """Classify each conversation in one pass, without generating text.

        If the last turn is the assistant's, it is the response, and every probe classifies the
        conversation. Otherwise only the probes that read only the prompt do. The probes are those
        loaded when this is called.

        Args:
            conversations: Conversations to classify.
            explain: Names of probes whose verdicts to explain; None if not requested.

        Raises:
            ContextLengthError: A conversation is too long; it is never truncated.
            NotExplainedError: This engine cannot explain.
            EngineBusyError, EngineUnavailableError, GenerationError: As for ``generate``.
        """


def require_monitored(monitored: Collection[str], probes: Sequence[Probe]) -> frozenset[str]:
    """Check that each name belongs to a probe that reads the response, for ``generate``."""
    watchable = [probe.name for probe in probes if probe.reads.includes_response]
    for name in monitored:
        if name not in watchable:
            raise SidelightError(
                f"Probe '{name}' cannot be monitored: no probe of this name reads the "
                f"response.{did_you_mean(name, watchable)}"
            )
    return frozenset(monitored)


def verdict_failure(probes: Iterable[str]) -> VerdictError:
    """The error that replaces the verdicts of these probes."""
    return VerdictError(
        f"No verdict from {', '.join(probes)}: the output was not a finite number, the text has "
        "no token that the probe reads, the text is plain and the probe was trained only on "
        "chats, or a judge gave no answer. Treat the text as unclassified."
    )


def require_verdicts(probes: Iterable[Probe], *, device: torch.device | str = "cpu") -> None:
    """Check that probes can classify a text; see ``gives_verdicts``.

    Raises:
        VerdictError: A probe cannot.
    """
    if failed := [probe.name for probe in probes if not gives_verdicts(probe, device=device)]:
        raise verdict_failure(failed)


def require_same_model(probes: Sequence[Probe], fingerprint: Fingerprint) -> None:
    """Check that the probes were trained on this model, or are accepted on this copy of it.

    Raises:
        SidelightError: Some read chats and others raw texts, which have different fingerprints.
        FingerprintMismatchError: A probe was trained on another model.
    """
    common_format(probes)
    for probe in probes:
        probe.card.backbone.require(fingerprint, probe=probe.name, accepted=accepted_copy())
