"""From a conversation to token ids, and to what probes read of them.

``PromptEncoder`` renders the model's chat template. Knows neither models nor probes.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int
from jinja2 import TemplateError

from sidelight.control_tokens import ContentTokenizer, Span, Tokenised, Tokenizer
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.turns import ChatFormat, Turn

if TYPE_CHECKING:
    from torch import Tensor

PromptFormat = Literal["chat", "raw", "both"]
Side = Literal["prompt", "response", "both"]
Scope = Literal["conversation", "each_turn"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class PlainText:
    """A text without a chat template around it, such as a prompt to complete."""

    content: str


Conversation = Sequence[Message] | PlainText


def has_response(turns: Sequence[Message]) -> bool:
    """Whether the last turn is the assistant's, which is then taken as the response to judge."""
    return bool(turns) and turns[-1].role == "assistant"


def characters(messages: Conversation, response: str | None = None) -> int:
    """How long a conversation is, with its response and without its template."""
    return sum(map(len, _contents(messages, response)))


class Part(IntEnum):
    """What a token belongs to."""

    UNREAD = 0
    """The system's turn, what precedes the prompt or follows the response, and what the template
    writes after a turn without text."""
    PROMPT = 1
    """What a user says, and plain text."""
    TEMPLATE = 2
    """Written by the chat template once the prompt has begun: turn markers, generation prompt."""
    RESPONSE = 3
    REPLY = 4
    """Another's turn in the prompt: the assistant's or a tool's. A client may have written it."""


@dataclass(frozen=True)
class Reads:
    """Which tokens a probe reads.

    Attributes:
        side: The prompt, the response, or both.
        template: Whether the chat template's tokens count as part of the prompt. The markers that
            follow a prompt carry much of what the model has concluded about it.
        scope: Whether a prompt of several turns is judged as one text, or each turn with what the
            template writes after it, and the whole; the highest score counts.
    """

    side: Side = "prompt"
    template: bool = True
    scope: Scope = "conversation"

    @property
    def includes_response(self) -> bool:
        """Whether the response is read, so that no verdict is possible before it is written."""
        return self.side != "prompt"

    @property
    def parts(self) -> frozenset[Part]:
        """The kinds of token that are read."""
        template = {Part.TEMPLATE} if self.template else set[Part]()
        prompt = {Part.PROMPT, Part.REPLY, *template}
        sides = {"prompt": prompt, "response": {Part.RESPONSE}, "both": {*prompt, Part.RESPONSE}}
        return frozenset(sides[self.side])


def require_whole_characters(text: str, *, place: str) -> None:
    """Checks that a text can be written as UTF-8: that it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SidelightError(
            f"{place} holds half a character (a lone surrogate) at position {error.start}. Remove "
            "it, or decode the text again from valid UTF-8 or UTF-16."
        ) from error


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids and what each token belongs to.

    Attributes:
        token_ids: One id per token.
        parts: One ``Part`` per token.
        is_plain: Whether it is plain text, without a chat template around it.
        dropped: Tokens of text that were removed to fit a training limit; 0 outside training.
    """

    token_ids: tuple[int, ...]
    parts: tuple[Part, ...]
    is_plain: bool = field(default=False, kw_only=True)
    dropped: int = field(default=0, kw_only=True)

    def __len__(self) -> int:
        return len(self.token_ids)

    def mask(self, reads: Reads) -> "Bool[Tensor, ' token']":
        """True for the tokens that a probe reads."""
        # Reading a file of texts must not wait for torch.
        import torch

        wanted = reads.parts
        return torch.tensor([part in wanted for part in self.parts], dtype=torch.bool)

    def only(self, tokens: Int[np.ndarray, " _"]) -> "EncodedPrompt":
        """The same prompt, of which no other tokens are read."""
        kept = {*tokens.tolist()}
        parts = (part if i in kept else Part.UNREAD for i, part in enumerate(self.parts))
        return replace(self, parts=tuple(parts))

    def shortened(self, limit: int, reads: Reads | None = None) -> "EncodedPrompt":
        """Removes tokens of the text, and none of the template, until ``limit`` remain.

        For training only, where the caller counts and reports what was dropped. A probe of the
        prompt loses the text's last tokens. A probe of the response loses the prompt's first
        tokens and, if that is not enough, the response's last ones. For a probe of both, prompt and
        response each keep at least half of the room if they need it.

        Args:
            limit: The largest length.
            reads: What the probe reads; None means the prompt.

        Raises:
            ContextLengthError: The template and the system prompt alone exceed ``limit``.
        """
        excess = len(self) - limit
        if excess <= 0:
            return self
        prompt = [i for i, part in enumerate(self.parts) if part in _TEXT]
        response = [i for i, part in enumerate(self.parts) if part == Part.RESPONSE]
        room = len(prompt) + len(response) - excess
        if room <= 0:
            raise ContextLengthError(
                f"A limit of {limit} tokens leaves no room for the text beside the chat template "
                f"and the system prompt ({limit - room} tokens). Raise --max-tokens, or shorten "
                "the system prompt."
            )
        side = (reads or Reads()).side
        least = {"prompt": room, "both": room // 2, "response": 0}[side]
        held = min(len(prompt), max(least, room - len(response)))
        gone = {*(prompt[held:] if side == "prompt" else prompt[: len(prompt) - held])}
        gone |= {*response[room - held :]}
        kept = [i for i in range(len(self)) if i not in gone]
        return replace(
            self,
            token_ids=tuple(self.token_ids[i] for i in kept),
            parts=tuple(self.parts[i] for i in kept),
            dropped=excess,
        )


def piece_lengths(parts: bytes) -> list[int]:
    """The tokens of each piece of a prompt: a turn's text, with what precedes the first or follows.

    Args:
        parts: The ``Part`` of each token; one or more.
    """
    of_tokens = np.frombuffer(parts, np.uint8)
    is_text = np.isin(of_tokens, _TEXT)
    is_first = is_text & ~np.append(False, is_text[:-1])
    begins = np.flatnonzero(is_first)
    return np.diff([0, *begins[1:], len(parts)]).tolist()


# The roles of those who answer a user; any other counts as a user.
_OTHERS = ("assistant", "tool")
# What somebody has written, rather than a template.
_TEXT = (Part.PROMPT, Part.REPLY)
# A turn of fewer tokens says too little by itself; beside more of them it is outweighed.
_LEAST_TOKENS = 8
_MOST_TOKENS = 64
_NEAREST_TOKENS = 128


@dataclass(frozen=True)
class Unit:
    """A part of a prompt that is judged by itself, beside the whole.

    Attributes:
        tokens: The tokens that it is made of, in their order.
        turn: The first turn that it holds, among those with text.
    """

    tokens: Int[np.ndarray, " _"]
    turn: int


def judged_units(parts: bytes) -> list[Unit]:
    """What of a prompt is judged beside the whole, so that other turns do not outweigh it.

    Each turn with a text is judged by itself, a short one with the turns after it, or else before
    it; also by itself if those outweigh it, which a client could write too. The user's turns are
    also judged together, without what stands between them.

    Args:
        parts: The ``Part`` of each token.
    """
    lengths = piece_lengths(parts)
    count, ends = len(lengths), np.cumsum(lengths)
    starts = ends - lengths
    kinds = np.frombuffer(parts, np.uint8)
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
                own if i == first else own[before if i < first else after]
                for i, own in zip(range(start, stop), tokens, strict=True)
            ]
        spans.setdefault(tuple(range(start, stop)), tokens)
        if stop - start > 1 and sum(texts[start:stop]) > _MOST_TOKENS:
            spans.setdefault((first,), [np.arange(starts[first], ends[first])])
    users = tuple(i for i in range(count) if Part.PROMPT in kinds[starts[i] : ends[i]])
    spans[users] = [np.arange(starts[i], ends[i]) for i in users]
    return [
        Unit(np.concatenate(tokens), unit[0])
        for unit, tokens in spans.items()
        if 0 < len(unit) < count
    ]


def shared_length(texts: Sequence[Sequence[int]]) -> int:
    """The length of the longest beginning that all texts share."""
    columns = zip(*texts, strict=False)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def shared_unread(prompts: Sequence[EncodedPrompt], reads: Reads) -> int:
    """The length of the unread beginning that all prompts share, such as a system prompt.

    Each prompt must have a token that is read.
    """
    unread = min(int(prompt.mask(reads).int().argmax()) for prompt in prompts)
    return shared_length([prompt.token_ids[:unread] for prompt in prompts])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token stands in the texts of a conversation.

    Attributes:
        message: The message, from 0. System turns count; a response follows the last message.
        start: The first character of that message that it stands for, in Unicode code points.
        end: The one after the last.
    """

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class _Written:
    """Turns as the model reads them.

    Attributes:
        tokens: The tokens of all, with their characters in the text that was tokenised.
        spans: What of that text is each turn's content.
        skipped: How many first characters of each content the template has left out; -1: it has
            written the content in another way.
    """

    tokens: Tokenised
    spans: Sequence[Span]
    skipped: Sequence[int]

    def places(self) -> list[Place | None]:
        """The place of each token; None: no part of a content."""
        ends = [end for _, end in self.spans]
        found: list[Place | None] = []
        for first, last in map(_whole, self.tokens.offsets):
            message = bisect_right(ends, first)
            if (
                message == len(ends)
                or last <= (begin := self.spans[message][0])
                or self.skipped[message] < 0
            ):
                found.append(None)
                continue
            moved = self.skipped[message] - begin
            start, end = max(first, begin) + moved, min(last, ends[message]) + moved
            found.append(Place(message, start, end))
        return found


# What a template writes around longer conversations is not cached.
_CACHED_TURNS = 200


@dataclass(frozen=True)
class _Frame:
    """What the template writes around turns of some roles, whatever they say.

    Attributes:
        literals: What stands before, between and after their texts.
        markers: As ``ChatFormat.markers`` gives them.
    """

    literals: tuple[str, ...]
    markers: tuple[str, ...]


class PromptEncoder:
    """Encodes conversations for one backbone.

    No content becomes a control token, whatever it says. Where no content contains the name of
    one, the ids are those of the tokenizer's ``apply_chat_template``.

    Args:
        tokenizer: A fast tokenizer (its offsets tell what each token belongs to).
        prompt_format: ``chat`` renders the model's chat template, and so does ``both``; ``raw``
            joins the turns by line breaks and adds the tokenizer's own special tokens. A
            ``PlainText`` is always encoded as with ``raw``.
        max_tokens: The longest input that the backbone accepts.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt_format: PromptFormat, max_tokens: int):
        self._tokenizer = tokenizer
        self._contents = ContentTokenizer(tokenizer)
        self.prompt_format: PromptFormat = prompt_format
        self.max_tokens = max_tokens
        # Clients choose the sequences of roles, so both their number and length are bounded.
        self._cached_frame = lru_cache(maxsize=256)(self._render_frame)

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How the model's chat template marks turns."""
        return ChatFormat(self._tokenizer)

    def recognise(self, token_ids: Sequence[int]) -> EncodedPrompt:
        """The prompt that has these ids, whoever has encoded it.

        Ids that are not a conversation are plain text, and all are if the format is ``raw``.
        """
        ids = tuple(token_ids)
        found = () if self.prompt_format == "raw" else self.chat_format.turns(ids)
        if found:
            return EncodedPrompt(ids, token_parts(found, len(ids), has_response=False))
        # What the tokenizer itself writes around a text. Within it, the same ids are a client's.
        around = set(self._tokenizer("")["input_ids"])
        text = [i for i, token_id in enumerate(ids) if token_id not in around] or [len(ids)]
        parts = (
            Part.PROMPT if text[0] <= i <= text[-1] else Part.TEMPLATE for i in range(len(ids))
        )
        return EncodedPrompt(ids, tuple(parts), is_plain=True)

    def encode(self, messages: Conversation, response: str | None = None) -> EncodedPrompt:
        """Token ids of the conversation, ready for generation or followed by ``response``.

        Raises:
            ContextLengthError: It is longer than ``max_tokens``; nothing is cut.
            SidelightError: It has no message or no token, or the template cannot be followed.
        """
        self.require_few_characters(messages, response)
        # A text that is far too long is only counted. Beside the template, a turn can have a token
        # less than by itself, but not half of them.
        if characters(messages, response) > self.max_tokens:
            whole = "\n".join(filter(None, _contents(messages, response)))
            require_whole_characters(whole, place="The text")
            tokens = self._contents.count(whole)
            if tokens > 2 * self.max_tokens:
                raise self._excess(f"{tokens} tokens without its template")
        encoded = self.encode_any_length(messages, response)
        if not len(encoded):
            raise SidelightError("The text is empty: there is no token to read. Send some text.")
        if len(encoded) > self.max_tokens:
            raise self._excess(f"{len(encoded)} tokens with its template")
        return encoded

    def require_few_characters(self, messages: Conversation, response: str | None = None) -> None:
        """Refuses by its length alone what is longer than the longest tokens could make it.

        Raises:
            ContextLengthError: It is.
        """
        length, longest = characters(messages, response), self._contents.longest_token
        if length > self.max_tokens * longest:
            raise self._excess(f"{length} characters, of which a token has at most {longest}")

    def _excess(self, size: str) -> ContextLengthError:
        return ContextLengthError(
            f"The text has {size}, but the model reads at most {self.max_tokens} tokens. Shorten "
            "it, or judge it in parts."
        )

    def encode_any_length(
        self, messages: Conversation, response: str | None = None
    ) -> EncodedPrompt:
        """As ``encode``, without a limit: for training, which cuts by itself and reports it."""
        is_plain = isinstance(messages, PlainText)
        turns = [Message("user", messages.content)] if is_plain else [*messages]
        if not turns:
            raise SidelightError("A conversation needs at least one message.")
        for text in _contents(messages, response):
            require_whole_characters(text, place="The text")
        if is_plain or self.prompt_format == "raw":
            return self._encode_raw(turns, response)
        return self._encode_chat(turns, response)

    def _encode_raw(self, messages: Sequence[Message], response: str | None) -> EncodedPrompt:
        written = self._write_raw(messages, response)
        _, stop = written.spans[len(messages) - 1]
        parts = [
            # The tokenizer's own special tokens cover no text: their offsets are (0, 0).
            Part.TEMPLATE if end == 0 else Part.PROMPT if start < stop else Part.RESPONSE
            for start, end in map(_whole, written.tokens.offsets)
        ]
        return EncodedPrompt(tuple(written.tokens.token_ids), tuple(parts), is_plain=True)

    def _encode_chat(self, messages: Sequence[Message], response: str | None) -> EncodedPrompt:
        written, markers = self._write_chat(messages, response)
        token_ids = tuple(written.tokens.token_ids)
        found = self.chat_format.turns(token_ids)
        if not found:
            raise SidelightError(
                "The model's chat template marks no turns, so a chat cannot be told from plain "
                "text. Use the raw prompt format (--format raw)."
            )
        if self.chat_format.markers(token_ids) != markers:
            raise SidelightError(
                "The text contains what the model's chat template writes between turns. Remove it, "
                "or use the raw prompt format (--format raw)."
            )
        return EncodedPrompt(
            token_ids, token_parts(found, len(token_ids), has_response=response is not None)
        )

    def places(self, messages: Conversation, response: str | None = None) -> list[Place | None]:
        """Where each token of ``encode`` stands; None: only the template or tokenizer wrote it."""
        if isinstance(messages, PlainText):
            return self._write_raw([Message("user", messages.content)], response).places()
        if self.prompt_format == "raw":
            return self._write_raw(messages, response).places()
        return self._write_chat(messages, response)[0].places()

    def _write_raw(self, messages: Sequence[Message], response: str | None) -> _Written:
        contents = [message.content for message in messages]
        prompt = "\n".join(contents)
        starts = [0, *accumulate(len(content) + 1 for content in contents)][: len(contents)]
        if response is not None:
            contents.append(response)
            starts.append(len(prompt))
        spans = [(start, start + len(own)) for start, own in zip(starts, contents, strict=True)]
        tokens = self._contents.encode_raw(prompt + (response or ""))
        return _Written(tokens, spans, [0] * len(spans))

    def _write_chat(
        self, messages: Sequence[Message], response: str | None
    ) -> tuple[_Written, tuple[str, ...]]:
        """The conversation, and the markers of turns in it."""
        # Few chat templates know the role "developer", which speaks as the system.
        turns = [replace(m, role="system") if m.role == "developer" else m for m in messages]
        if response is not None:
            turns.append(Message("assistant", response))
        for_generation = response is None
        rendered = self._render(turns, for_generation=for_generation)
        frame = self._frame(turns, for_generation=for_generation)
        spans = self._content_spans(rendered, turns, frame.literals)
        edges = [0, *(edge for span in spans for edge in span), len(rendered)]
        template = list(zip(edges[::2], edges[1::2], strict=True))
        tokens = self._contents.encode_chat(rendered, template)
        skipped = [
            turn.content.find(rendered[start:end])
            for turn, (start, end) in zip(turns, spans, strict=True)
        ]
        return _Written(tokens, spans, skipped), frame.markers

    def _render(self, turns: Sequence[Message], *, for_generation: bool) -> str:
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=for_generation
            )
        except TemplateError as error:
            raise SidelightError(
                f"The model's chat template refuses this conversation: {error}. Change the roles "
                "or their order, or use the raw prompt format (--format raw)."
            ) from error

    def _frame(self, turns: Sequence[Message], *, for_generation: bool) -> _Frame:
        roles = tuple(turn.role for turn in turns)
        is_short = len(roles) <= _CACHED_TURNS
        find_frame = self._cached_frame if is_short else self._render_frame
        # A template may write today's date.
        return find_frame(roles, for_generation=for_generation, _day=date.today())

    def _content_spans(
        self, rendered: str, turns: Sequence[Message], literals: Sequence[str]
    ) -> list[Span]:
        """The characters that each turn's text takes in the rendered template."""
        spans: list[Span] = []
        cursor = len(literals[0])
        for turn, literal in zip(turns, literals[1:], strict=True):
            text = turn.content
            # Templates may strip a turn's text, or write what a tool has answered as JSON.
            forms = (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"))
            forms = (*forms, json.dumps(text, ensure_ascii=False)[1:-1])
            ends = [cursor + len(f) for f in forms if rendered.startswith(f + literal, cursor)]
            if not ends:
                raise SidelightError(
                    "The chat template rewrites the text, so its tokens cannot be told from those "
                    "of the template. Use the raw prompt format for this model (--format raw)."
                )
            spans.append((cursor, ends[0]))
            cursor = ends[0] + len(literal)
        return spans

    def _render_frame(self, roles: tuple[str, ...], *, for_generation: bool, _day: date) -> _Frame:
        marks = [f"sidelight-turn-{i}-text" for i in range(len(roles))]
        marked = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
        rendered = self._render(marked, for_generation=for_generation)
        literals: list[str] = []
        cursor = 0
        for mark in marks:
            found = rendered.find(mark, cursor)
            if found < 0:
                raise SidelightError(
                    "The chat template leaves a turn out (roles: "
                    f"{', '.join(dict.fromkeys(roles))}). Use roles that the model knows, or the "
                    "raw prompt format (--format raw)."
                )
            literals.append(rendered[cursor:found])
            cursor = found + len(mark)
        tokens = self._tokenizer(rendered, add_special_tokens=False, verbose=False)
        markers = self.chat_format.markers(tokens["input_ids"])
        return _Frame((*literals, rendered[cursor:]), markers)


def _contents(messages: Conversation, response: str | None) -> list[str]:
    """All that a conversation says, and the response."""
    is_plain = isinstance(messages, PlainText)
    texts = [messages.content] if is_plain else [turn.content for turn in messages]
    return [*texts, response or ""]


def token_parts(turns: Sequence[Turn], tokens: int, *, has_response: bool) -> tuple[Part, ...]:
    """The part of each token of a conversation.

    What surrounds turns without text is not read, so that they add nothing to what others say. Only
    where no turn has text is there nothing else to read.

    Args:
        turns: As ``ChatFormat`` finds them; one or more.
        tokens: How many tokens the conversation has.
        has_response: Whether the last turn is the response to judge.
    """
    first = next((i for i, turn in enumerate(turns) if turn.role != "system"), 0)
    kinds = [Part.UNREAD] * first
    kinds += [Part.REPLY if turn.role in _OTHERS else Part.PROMPT for turn in turns[first:]]
    end = tokens
    if has_response and turns[-1].role == "assistant":
        kinds[-1] = Part.RESPONSE
        end = turns[-1].start
    begin = turns[first].start
    parts = [Part.UNREAD] * begin + [Part.TEMPLATE] * (end - begin) + [Part.UNREAD] * (tokens - end)
    has_text = any(turn.start < turn.stop for turn in turns[first:])
    ends = [*(turn.start for turn in turns[1:]), tokens]
    for turn, kind, next_start in zip(turns, kinds, ends, strict=True):
        parts[turn.start : turn.stop] = [kind] * (turn.stop - turn.start)
        if turn.start == turn.stop and has_text:
            parts[turn.start : next_start] = [Part.UNREAD] * (next_start - turn.start)
    return tuple(parts)


def _whole(offset: tuple[int, int]) -> tuple[int, int]:
    """The span of a token; tokenizers that trim blanks give (end, end) for a blank one."""
    start, end = offset
    return (end - 1 if start == end > 0 else start, end)
