"""Conversations, and the tokens and segments that a probe reads."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, Protocol, overload, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from sidelight.errors import ContextLengthError, SidelightError
from sidelight.models.invisible import Invisible, reject_disguises, visible, visible_places

if TYPE_CHECKING:
    from torch import Tensor

PromptFormat = Literal["chat", "raw", "both"]
Side = Literal["prompt", "response", "both"]
Scope = Literal["conversation", "each_turn", "last_turn"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``invisible`` is how an engine handles invisible characters."""

    role: str
    content: str
    invisible: Invisible = field(default="off", compare=False)

    @staticmethod
    def of_lines(
        role: str, texts: Iterable[str], calls: Iterable[tuple[str, str]] = ()
    ) -> "Message":
        """Build a turn whose texts and tool calls are lines of its content.

        A call is a line of JSON regardless of the chat template, so the model reads the same line
        in training, evaluation and serving.

        Args:
            role: Role of the speaker.
            texts: The text of each content part.
            calls: Name and arguments (JSON) of each called function.
        """
        lines = (f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
        return Message(role, "\n".join([*texts, *lines]))


@dataclass(frozen=True)
class PlainText(Sequence[Message]):
    """A text without a chat template around it, such as a prompt to complete.

    Its only turn is the user's; only an encoder needs to know that it is no chat. ``invisible`` is
    as for ``Message``.
    """

    content: str
    invisible: Invisible = field(default="off", compare=False)

    def __len__(self) -> int:
        return 1

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Message, ...]: ...
    def __getitem__(self, index: int | slice) -> Message | tuple[Message, ...]:
        return (Message("user", self.content, self.invisible),)[index]


Conversation = Sequence[Message]
"""A chat, or a ``PlainText``."""


def has_response(turns: Sequence[Message]) -> bool:
    """Whether the last turn is the assistant's; if so, it is the response to classify."""
    return bool(turns) and turns[-1].role == "assistant"


def characters(messages: Conversation, response: str | None = None) -> int:
    """Length of a conversation in characters, with its response but without the template."""
    return sum(map(len, contents(messages, response)))


def contents(messages: Conversation, response: str | None) -> list[str]:
    """The contents of a conversation, including the response."""
    return [*(turn.content for turn in messages), response or ""]


def with_invisible(text: Conversation, invisible: Invisible) -> Conversation:
    """The text with this handling of its invisible characters."""
    return _changed(text, lambda turn: replace(turn, invisible=invisible))


def as_read(text: Conversation) -> Conversation:
    """The text to encode, without invisible characters if the policy strips them.

    Raises:
        DisguisedTextError: The policy refuses the text.
    """

    def read(turn: Message) -> Message:
        reject_disguises(turn.content, turn.invisible)
        return replace(turn, content=visible(turn.content)) if turn.invisible == "strip" else turn

    return _changed(text, read)


def _changed(text: Conversation, change: Callable[[Message], Message]) -> Conversation:
    """The text with each turn changed; plain text stays plain."""
    turns = [change(turn) for turn in text]
    if isinstance(text, PlainText):
        return PlainText(turns[0].content, turns[0].invisible)
    return turns


class TokenRole(IntEnum):
    """The part of a prompt that a token belongs to."""

    UNREAD = 0
    """The system's turn, what precedes the prompt or follows the response, and what the template
    writes after a turn without text."""
    PROMPT = 1
    """A user's message, and plain text."""
    TEMPLATE = 2
    """Written by the chat template after the beginning of the prompt: turn markers, generation
    prompt.
    """
    RESPONSE = 3
    REPLY = 4
    """A turn of the assistant in the prompt. A client may have written it."""
    SYSTEM = 5
    """A system turn after other turns. A client may have written it instead of a user turn."""
    TOOL = 6
    """The result of a tool. A client may have written it."""


@dataclass(frozen=True)
class Reads:
    """The tokens that a probe reads.

    Attributes:
        side: The prompt, the response, or both.
        template: Whether the chat template's tokens count as part of the prompt. The hidden states
            of the markers after a prompt carry much of the model's assessment of it.
        scope: How a prompt of several turns is classified: as one text; or as the whole and each
            turn with the template text after it, where the highest score counts; or only by the
            user's last turn, which the model has read after all others.

    Raises:
        SidelightError: ``last_turn`` is combined with a response.
    """

    side: Side = "prompt"
    template: bool = True
    scope: Scope = "conversation"

    def __post_init__(self) -> None:
        if self.scope == "last_turn" and self.includes_response:
            raise SidelightError("scope='last_turn' applies only to prompts. Set side='prompt'.")

    @property
    def includes_response(self) -> bool:
        """Whether the response is read, so that there is no verdict before it is generated."""
        return self.side != "prompt"

    @property
    def token_roles(self) -> frozenset[TokenRole]:
        """The roles of the tokens that are read."""
        template = {TokenRole.TEMPLATE} if self.template else set[TokenRole]()
        prompt = {*_TEXT, *template}
        sides = {
            "prompt": prompt,
            "response": {TokenRole.RESPONSE},
            "both": {*prompt, TokenRole.RESPONSE},
        }
        return frozenset(sides[self.side])


def require_valid_unicode(text: str, *, place: str) -> None:
    """Check that a text can be encoded as UTF-8, that is, contains no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SidelightError(
            f"{place} contains half a character (a lone surrogate) at position {error.start}. "
            "Remove it, or decode the text again from valid UTF-8 or UTF-16."
        ) from error


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a token in the texts of a conversation.

    Attributes:
        message: Index of the message, from 0. System turns count; a response follows the last
            message.
        start: Index of its first character in that message, in Unicode code points.
        end: Index after its last character.
    """

    message: int
    start: int
    end: int


@runtime_checkable
class PromptTokens(Protocol):
    """What probes need to know about a prompt."""

    @property
    def token_roles(self) -> Sequence[int]:
        """The ``TokenRole`` of each token."""
        ...

    @property
    def is_plain(self) -> bool:
        """Whether the text has no chat template around it."""
        ...


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids, and the role of each token.

    Attributes:
        token_ids: One id per token.
        token_roles: One ``TokenRole`` per token.
        is_plain: Whether the text has no chat template around it.
        is_attributed: Whether each turn is known to have the role of its message.
        dropped: Tokens of text that were removed to fit a training limit; 0 outside training.
        texts: Text of each message, and the response; empty if positions are unknown.
        places: Position of each token in these texts; None for a token of the template or
            tokenizer.
        origins: For each text, the index of each character in the original text; None if nothing
            was stripped from it. Empty if nothing was stripped from any text.
    """

    token_ids: tuple[int, ...]
    token_roles: tuple[TokenRole, ...]
    is_plain: bool = field(default=False, kw_only=True)
    is_attributed: bool = field(default=False, kw_only=True, compare=False)
    dropped: int = field(default=0, kw_only=True)
    texts: tuple[str, ...] = field(default=(), kw_only=True, compare=False, repr=False)
    places: tuple[Place | None, ...] = field(default=(), kw_only=True, compare=False, repr=False)
    origins: tuple[Sequence[int] | None, ...] = field(
        default=(), kw_only=True, compare=False, repr=False
    )

    def __len__(self) -> int:
        return len(self.token_ids)

    def as_sent(self, message: int, start: int, end: int) -> tuple[int, int]:
        """Map a character range of a stripped text to the original text.

        Args:
            message: Index of the text.
            start: First character.
            end: End of the range, exclusive; greater than ``start``.
        """
        origins = self.origins[message] if self.origins else None
        return (start, end) if origins is None else (origins[start], origins[end - 1] + 1)

    def read_from(self, text: Conversation) -> "EncodedPrompt":
        """Add ``origins`` to the prompt, if its texts are ``as_read`` of this text."""
        sent = contents(text, None)
        if not self.places or all(map(str.__eq__, sent, self.texts)):
            return self
        pairs = zip(sent, self.texts, strict=False)
        origins = (None if written == read else visible_places(written) for written, read in pairs)
        return replace(self, origins=tuple(origins))

    def mask(self, reads: Reads) -> "Bool[Tensor, ' token']":
        """True for the tokens that a probe reads."""
        # Imported here, so that reading a file of texts does not load torch.
        import torch

        return torch.from_numpy(read_tokens(bytes(self.token_roles), reads))

    def only(self, tokens: Int[np.ndarray, " _"]) -> "EncodedPrompt":
        """A copy of the prompt in which only these tokens are read."""
        readable = {*tokens.tolist()}
        token_roles = (
            role if i in readable else TokenRole.UNREAD for i, role in enumerate(self.token_roles)
        )
        return replace(self, token_roles=tuple(token_roles))

    @property
    def fixed(self) -> int:
        """Number of tokens that ``shortened`` never removes: those of the template and system
        prompt.
        """
        return sum(role not in (*_TEXT, TokenRole.RESPONSE) for role in self.token_roles)

    def shortened(self, limit: int, reads: Reads | None = None) -> "EncodedPrompt":
        """Remove tokens of the text, but not of the template, until ``limit`` remain.

        For training only, where the caller counts and reports what was dropped. A probe of the
        prompt loses the text's last tokens. A probe of the response loses the prompt's first
        tokens and, if that is not enough, the response's last ones. For a probe of both, prompt and
        response each keep at least half of the room if they need it.

        Args:
            limit: Maximum number of tokens.
            reads: What the probe reads; None means the prompt.

        Raises:
            ContextLengthError: The template and the system prompt alone exceed ``limit``.
        """
        excess = len(self) - limit
        if excess <= 0:
            return self
        prompt = [i for i, role in enumerate(self.token_roles) if role in _TEXT]
        response = [i for i, role in enumerate(self.token_roles) if role == TokenRole.RESPONSE]
        room = limit - self.fixed
        if room <= 0:
            raise ContextLengthError(
                f"A limit of {limit} tokens leaves no room for the text next to the chat "
                f"template and the system prompt ({self.fixed} tokens). Raise max_tokens, or "
                "shorten the system prompt."
            )
        side = (reads or Reads()).side
        least = {"prompt": room, "both": room // 2, "response": 0}[side]
        prompt_tokens = min(len(prompt), max(least, room - len(response)))
        gone = {
            *(prompt[prompt_tokens:] if side == "prompt" else prompt[: len(prompt) - prompt_tokens])
        }
        gone |= {*response[room - prompt_tokens :]}
        remaining = [i for i in range(len(self)) if i not in gone]
        return replace(
            self,
            token_ids=tuple(self.token_ids[i] for i in remaining),
            token_roles=tuple(self.token_roles[i] for i in remaining),
            places=tuple(self.places[i] for i in remaining) if self.places else (),
            dropped=excess,
        )


def lengths_of_turns(token_roles: bytes) -> list[int]:
    """Number of tokens of each turn of a prompt, including the template text around it.

    Args:
        token_roles: The ``TokenRole`` of each token; one or more.
    """
    of_tokens = np.frombuffer(token_roles, np.uint8)
    is_text = np.isin(of_tokens, _TEXT)
    is_first = is_text & ~np.append(False, is_text[:-1])
    begins = np.flatnonzero(is_first)
    return np.diff([0, *begins[1:], len(token_roles)]).tolist()


def read_tokens(token_roles: bytes, reads: Reads) -> Bool[np.ndarray, " token"]:
    """True for the tokens of a prompt that a probe reads.

    Args:
        token_roles: The ``TokenRole`` of each token.
        reads: What the probe reads.
    """
    kinds = np.frombuffer(token_roles, np.uint8)
    is_read = np.isin(kinds, [*reads.token_roles])
    if reads.scope == "last_turn" and TokenRole.PROMPT in kinds:
        last = int(np.flatnonzero(kinds == TokenRole.PROMPT)[-1])
        ends = np.cumsum(lengths_of_turns(token_roles))
        turn = int(np.searchsorted(ends, last, side="right"))
        # Without a user turn, the whole prompt is read.
        is_read[: ends[turn - 1] if turn else 0] = False
        is_read[ends[turn] :] = False
    return is_read


# Written by a user, a tool or the model, not by the template.
_TEXT = (TokenRole.PROMPT, TokenRole.REPLY, TokenRole.SYSTEM, TokenRole.TOOL)
_NO_REPLY = (TokenRole.PROMPT, TokenRole.SYSTEM)
# A turn of fewer tokens is too short to classify individually.
_LEAST_TOKENS = 8
_MOST_TOKENS = 64
_NEAREST_TOKENS = 128


@dataclass(frozen=True)
class Segment:
    """A part of a prompt that is classified separately, in addition to the whole.

    Attributes:
        tokens: Indices of its tokens, ascending.
        turn: Index of its first turn among the turns with text.
    """

    tokens: Int[np.ndarray, " _"]
    turn: int


def split_segments(token_roles: bytes) -> list[Segment]:
    """The parts of a prompt to classify separately, so that other turns cannot outweigh them.

    Each turn with a text is classified by itself, a short one together with the turns after it, or
    else before it; also by itself if those outweigh it, since a client could have written them. The
    user's turns are also classified together, without what stands between them.

    Args:
        token_roles: The ``TokenRole`` of each token.
    """
    lengths = lengths_of_turns(token_roles)
    count, ends = len(lengths), np.cumsum(lengths)
    starts = ends - lengths
    kinds = np.frombuffer(token_roles, np.uint8)
    texts = [
        int(np.isin(kinds[start:end], _TEXT).sum()) for start, end in zip(starts, ends, strict=True)
    ]
    spans: dict[tuple[int, ...], list[np.ndarray]] = {}
    for first in filter(texts.__getitem__, range(count)):
        start, stop = first, first + 1
        while sum(texts[start:stop]) < _LEAST_TOKENS and (start, stop) != (0, count):
            start, stop = (start, stop + 1) if stop < count else (start - 1, stop)
        tokens = [np.arange(starts[i], ends[i]) for i in range(start, stop)]
        if stop - start > 1:
            # Of a long neighbour what is next to it, or many short turns would copy it.
            before, after = slice(-_NEAREST_TOKENS, None), slice(_NEAREST_TOKENS)
            tokens = [
                turn_tokens if i == first else turn_tokens[before if i < first else after]
                for i, turn_tokens in zip(range(start, stop), tokens, strict=True)
            ]
        spans.setdefault(tuple(range(start, stop)), tokens)
        if stop - start > 1 and sum(texts[start:stop]) > _MOST_TOKENS:
            spans.setdefault((first,), [np.arange(starts[first], ends[first])])
    is_users = np.isin(kinds, _NO_REPLY)
    users = tuple(i for i in range(count) if is_users[starts[i] : ends[i]].any())
    spans[users] = [np.arange(starts[i], ends[i]) for i in users]
    return [
        Segment(np.concatenate(tokens), turns[0])
        for turns, tokens in spans.items()
        if 0 < len(turns) < count
    ]


def tool_rows(token_roles: bytes) -> tuple[Int[np.ndarray, " _"], Int[np.ndarray, " turn"]]:
    """The tokens of all turns of tools, as those of a ``Segment``, and which turns these are."""
    lengths = lengths_of_turns(token_roles)
    turn_of = np.repeat(np.arange(len(lengths)), lengths)
    turns = np.unique(turn_of[np.frombuffer(token_roles, np.uint8) == TokenRole.TOOL])
    return np.flatnonzero(np.isin(turn_of, turns)), turns


def shared_length(texts: Sequence[Sequence[int]]) -> int:
    """The length of the longest beginning that all texts share."""
    positions = zip(*texts, strict=False)
    return len(list(takewhile(lambda tokens: len(set(tokens)) == 1, positions)))


def shared_unread(prompts: Sequence[EncodedPrompt], reads: Reads) -> int:
    """The length of the unread beginning that all prompts share, such as a system prompt.

    Each prompt must have a token that is read.
    """
    unread = min(int(prompt.mask(reads).int().argmax()) for prompt in prompts)
    return shared_length([prompt.token_ids[:unread] for prompt in prompts])
