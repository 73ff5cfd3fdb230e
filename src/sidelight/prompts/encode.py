"""From a conversation to token ids, and to what probes read of them.

``PromptEncoder`` renders the model's chat template. Knows neither models nor probes.
"""

import json
import secrets
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from jinja2 import TemplateError

from sidelight.errors import ContextLengthError, SidelightError
from sidelight.prompts.control_tokens import ContentTokenizer, Span, Tokenised, Tokenizer
from sidelight.prompts.conversation import (
    Conversation,
    EncodedPrompt,
    Message,
    Part,
    PlainText,
    PromptFormat,
    characters,
    contents,
    require_whole_characters,
)
from sidelight.prompts.turns import ChatFormat, token_parts


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
        markers: Those that the template writes, as ``ChatFormat.markers`` gives them; None: there
            is no template.
    """

    tokens: Tokenised
    spans: Sequence[Span]
    skipped: Sequence[int]
    markers: tuple[str, ...] | None = None

    def places(self) -> list[Place | None]:
        """The place of each token; None: no part of a content."""
        ends = [end for _, end in self.spans]
        places: list[Place | None] = []
        for first, last in map(_whole, self.tokens.offsets):
            message = bisect_right(ends, first)
            if (
                message == len(ends)
                or last <= (begin := self.spans[message][0])
                or self.skipped[message] < 0
            ):
                places.append(None)
                continue
            moved = self.skipped[message] - begin
            start, end = max(first, begin) + moved, min(last, ends[message]) + moved
            places.append(Place(message, start, end))
        return places


# Stands for each text where only what the template writes around texts matters.
_ANY_TEXT = "text"
_USE_RAW = "train with the raw prompt format (--set format=raw)"


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

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How the model's chat template marks turns."""
        return ChatFormat(self._tokenizer)

    def recognise(self, token_ids: Sequence[int]) -> EncodedPrompt:
        """The prompt that has these ids, whoever has encoded it.

        Ids that are not a conversation are plain text, and all are if the format is ``raw``.
        """
        ids = tuple(token_ids)
        turns = () if self.prompt_format == "raw" else self.chat_format.turns(ids)
        if turns:
            return EncodedPrompt(ids, token_parts(turns, len(ids), has_response=False))
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
            whole = "\n".join(filter(None, contents(messages, response)))
            require_whole_characters(whole, place="The text")
            tokens = self._contents.count(whole)
            if tokens > 2 * self.max_tokens:
                raise self._excess(f"{tokens} tokens without its template")
        encoded = self.encode_any_length(messages, response)
        if not len(encoded):
            raise SidelightError("The text is empty: there is no token to read. Send some text.")
        self.require_within_context(encoded)
        return encoded

    def require_within_context(self, prompt: EncodedPrompt) -> None:
        """Checks that the backbone accepts a prompt, whoever has encoded it.

        Raises:
            ContextLengthError: It is too long.
        """
        if len(prompt) > self.max_tokens:
            raise self._excess(f"{len(prompt)} tokens with its template")

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
        for text in contents(messages, response):
            require_whole_characters(text, place="The text")
        written = self._write(messages, response)
        token_ids = tuple(written.tokens.token_ids)
        if written.markers is None:
            _, stop = written.spans[-1 if response is None else -2]
            parts = (
                # The tokenizer's own special tokens cover no text: their offsets are (0, 0).
                Part.TEMPLATE if end == 0 else Part.PROMPT if start < stop else Part.RESPONSE
                for start, end in map(_whole, written.tokens.offsets)
            )
            return EncodedPrompt(token_ids, tuple(parts), is_plain=True)
        turns = self.chat_format.turns(token_ids)
        if not turns:
            raise SidelightError(
                "The model's chat template marks no turns, so a chat cannot be told from plain "
                f"text. To judge chats, {_USE_RAW}."
            )
        if self.chat_format.markers(token_ids) != written.markers:
            raise SidelightError(
                "The text contains what the model's chat template writes between turns. Remove it, "
                f"or {_USE_RAW}."
            )
        has_response = response is not None
        return EncodedPrompt(
            token_ids, token_parts(turns, len(token_ids), has_response=has_response)
        )

    def places(self, messages: Conversation, response: str | None = None) -> list[Place | None]:
        """Where each token of ``encode`` stands; None: only the template or tokenizer wrote it."""
        return self._write(messages, response).places()

    def _write(self, messages: Conversation, response: str | None) -> _Written:
        is_plain = isinstance(messages, PlainText)
        turns = [Message("user", messages.content)] if is_plain else [*messages]
        if not turns:
            raise SidelightError("A conversation needs at least one message.")
        is_raw = is_plain or self.prompt_format == "raw"
        return (self._write_raw if is_raw else self._write_chat)(turns, response)

    def _write_raw(self, messages: Sequence[Message], response: str | None) -> _Written:
        contents = [message.content for message in messages]
        prompt = "\n".join(contents)
        starts = [0, *accumulate(len(content) + 1 for content in contents)][: len(contents)]
        if response is not None:
            contents.append(response)
            starts.append(len(prompt))
        spans = [
            (start, start + len(content)) for start, content in zip(starts, contents, strict=True)
        ]
        tokens = self._contents.encode_raw(prompt + (response or ""))
        return _Written(tokens, spans, [0] * len(spans))

    def _write_chat(self, messages: Sequence[Message], response: str | None) -> _Written:
        # Few chat templates know the role "developer", which speaks as the system.
        turns = [replace(m, role="system") if m.role == "developer" else m for m in messages]
        if response is not None:
            turns.append(Message("assistant", response))
        pieces = self._pieces(turns, for_generation=response is None)
        edges = [0, *accumulate(map(len, pieces))]
        bounds = list(pairwise(edges))
        tokens = self._contents.encode_chat("".join(pieces), bounds[::2])
        skipped = [turn.content.find(text) for turn, text in zip(turns, pieces[1::2], strict=True)]
        frame = _ANY_TEXT.join(pieces[::2])
        ids = self._tokenizer(frame, add_special_tokens=False, verbose=False)["input_ids"]
        return _Written(tokens, bounds[1::2], skipped, self.chat_format.markers(ids))

    def _render(self, turns: Sequence[Message], *, for_generation: bool) -> str:
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=for_generation
            )
        except TemplateError as error:
            raise SidelightError(
                f"The model's chat template refuses this conversation: {error}. Change the roles "
                f"or their order, or {_USE_RAW}."
            ) from error

    def _pieces(self, turns: Sequence[Message], *, for_generation: bool) -> list[str]:
        """What the template writes before, between and after the turns, and each text between.

        The turns are rendered once more with a mark, which nobody can guess, at both ends of each
        text. Templates may strip a text, so blanks at its ends are the template's.
        """
        mark = f"edge{secrets.token_hex(8)}"
        texts = [turn.content.strip() for turn in turns]
        marked = [
            replace(turn, content=turn.content.replace(text, f"{mark}{text}{mark}", 1))
            if text
            else replace(turn, content=mark + mark + turn.content)
            for turn, text in zip(turns, texts, strict=True)
        ]
        pieces = self._render(marked, for_generation=for_generation).split(mark)
        if len(pieces) < 2 * len(turns) + 1:
            roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
            raise SidelightError(
                f"The chat template leaves a turn out (roles: {roles}). Use roles that the model "
                f"knows, or {_USE_RAW}."
            )
        # What a tool has answered may be written as JSON.
        forms = [(text, json.dumps(text, ensure_ascii=False)[1:-1]) for text in texts]
        written = zip(pieces[1::2], forms, strict=False)
        if (
            len(pieces) > 2 * len(turns) + 1
            or not all(piece in form for piece, form in written)
            or "".join(pieces) != self._render(turns, for_generation=for_generation)
        ):
            raise SidelightError(
                "The chat template rewrites the text, so its tokens cannot be told from those of "
                f"the template. To judge such texts, {_USE_RAW}."
            )
        return pieces


def _whole(offset: tuple[int, int]) -> tuple[int, int]:
    """The span of a token; tokenizers that trim blanks give (end, end) for a blank one."""
    start, end = offset
    return (end - 1 if start == end > 0 else start, end)
