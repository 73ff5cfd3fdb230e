"""What an engine tells of one request, in the order in which it happens."""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from sidelight.engines.logprobs import TokenLogprobs
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
