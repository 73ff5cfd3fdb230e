"""From a conversation to token ids, and to what probes read of them.

``PromptEncoder`` renders the model's chat template. Knows neither models nor probes.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property, lru_cache
from itertools import accumulate

from jinja2 import TemplateError

from sidelight.errors import ContextLengthError, SidelightError
from sidelight.models.control_tokens import ContentTokenizer, Range, Token, Tokenizer
from sidelight.models.conversation import (
    Conversation,
    EncodedPrompt,
    Message,
    Place,
    PlainText,
    PromptFormat,
    TokenRole,
    characters,
    contents,
    require_valid_unicode,
)
from sidelight.models.turns import ChatFormat, are_attributed, roles_of_tokens

# What a template writes around longer conversations is not cached.
_CACHED_TURNS = 200
_USE_RAW = "train with the raw prompt format (--set format=raw)"


class PromptEncoder:
    """Encodes conversations for one backbone.

    No content becomes a control token, whatever it says. Where no content contains the name of
    one, the ids are those of the tokenizer's ``apply_chat_template``.

    Args:
        tokenizer: A fast tokenizer (its offsets tell what each token belongs to).
        prompt_format: ``chat`` renders the model's chat template, and so does ``both``; ``raw``
            joins the turns by line breaks and adds the tokenizer's own special tokens. A
            ``PlainText`` is always encoded as with ``raw``. None means chat if the tokenizer has a
            chat template.
        max_tokens: The longest input that the backbone accepts.
        more: The end of a refusal, if a setting allows longer ones.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_format: PromptFormat | None,
        max_tokens: int,
        more: str = "",
    ):
        self.tokenizer = tokenizer
        self._contents = ContentTokenizer(tokenizer)
        by_default: PromptFormat = "chat" if tokenizer.chat_template else "raw"
        self.prompt_format: PromptFormat = prompt_format or by_default
        self.max_tokens, self.more = max_tokens, more
        # Clients choose the sequences of roles, so both their number and length are bounded.
        self._cached_frame = lru_cache(maxsize=256)(self._render_frame)

    @property
    def uses_template(self) -> bool:
        """Whether chats are rendered with the model's chat template."""
        return self.prompt_format != "raw"

    @property
    def warning(self) -> str | None:
        """A warning about chats sent to this model; None: it has a chat template."""
        if self.tokenizer.chat_template:
            return None
        return (
            "The model has no chat template, so a chat is read as one plain text: all its turns "
            "are classified together. If the original model has a template, copy its "
            "chat_template.jinja into this model's folder, or, if this model is a single file, "
            "name the original with --tokenizer."
        )

    @cached_property
    def chat_format(self) -> ChatFormat:
        """The marks of turns in the model's chat template."""
        return ChatFormat(self.tokenizer)

    def recognise(
        self, token_ids: Sequence[int], chat: Sequence[Message] | None = None
    ) -> EncodedPrompt:
        """The prompt that has these ids; ``chat`` are its messages, if any.

        Ids that are not a conversation are plain text, and all are if the format is ``raw``.
        """
        ids = tuple(token_ids)
        turns = self.chat_format.turns(ids) if self.uses_template else ()
        if turns:
            token_roles = roles_of_tokens(turns, len(ids), has_response=False)
            tools = [
                message.content for message in chat or () if message.role in ("tool", "function")
            ]
            is_attributed = (
                chat is not None
                and are_attributed(turns, [message.role for message in chat])
                # A control token can hide the marker before it.
                and not any(map(self._contents.holds_controls, tools))
            )
            return EncodedPrompt(ids, token_roles, is_attributed=is_attributed)
        # What the tokenizer itself writes around a text. Within it, the same ids are a client's.
        around = set(self.tokenizer("")["input_ids"])
        text = [i for i, token_id in enumerate(ids) if token_id not in around] or [len(ids)]
        token_roles = (
            TokenRole.PROMPT if text[0] <= i <= text[-1] else TokenRole.TEMPLATE
            for i in range(len(ids))
        )
        return EncodedPrompt(ids, tuple(token_roles), is_plain=True)

    def encode(
        self, messages: Conversation, response: str | None = None, *, with_places: bool = False
    ) -> EncodedPrompt:
        """Token ids of the conversation, ready for generation or followed by ``response``.

        ``with_places`` says in which characters each token stands, too.

        Raises:
            ContextLengthError: It is longer than ``max_tokens``; nothing is cut.
            SidelightError: It has no message or no token, or the template cannot be followed.
        """
        self.require_few_characters(messages, response)
        # A text that is far too long is only counted. Beside the template, a turn can have a token
        # less than by itself, but not half of them.
        if characters(messages, response) > self.max_tokens:
            joined = "\n".join(filter(None, contents(messages, response)))
            require_valid_unicode(joined, place="The text")
            tokens = self._contents.count(joined)
            if tokens > 2 * self.max_tokens:
                raise self._excess(f"{tokens} tokens without its template")
        encoded = self.encode_any_length(messages, response, with_places=with_places)
        if not len(encoded):
            raise SidelightError("The text is empty: there is no token to read. Send some text.")
        self.require_within_context(encoded)
        return encoded

    def require_within_context(self, prompt: EncodedPrompt) -> None:
        """Checks that the backbone accepts a prompt.

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
        limit = f"{self.max_tokens} token{'s' * (self.max_tokens != 1)}"
        return ContextLengthError(
            f"The text has {size}, but the model reads at most {limit}. Shorten it, or split it "
            f"into parts.{self.more}"
        )

    def encode_any_length(
        self, messages: Conversation, response: str | None = None, *, with_places: bool = False
    ) -> EncodedPrompt:
        """As ``encode``, without a limit: for training, which cuts by itself and reports it."""
        texts = contents(messages, response)
        for text in texts:
            require_valid_unicode(text, place="The text")
        if not messages:
            raise SidelightError("A conversation needs at least one message.")
        is_rendered = self.uses_template and not isinstance(messages, PlainText)
        encode = self._encode_chat if is_rendered else self._encode_raw
        prompt, places = encode(messages, response)
        return replace(prompt, texts=tuple(texts), places=tuple(places)) if with_places else prompt

    def _encode_raw(
        self, messages: Sequence[Message], response: str | None
    ) -> tuple[EncodedPrompt, Iterator[Place | None]]:
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
        token_roles = (
            # The tokenizer's own special tokens cover no text: their offsets are (0, 0).
            TokenRole.TEMPLATE
            if end == 0
            else TokenRole.PROMPT
            if start < len(prompt)
            else TokenRole.RESPONSE
            for start, end in map(_token_range, tokens)
        )
        encoded = EncodedPrompt(_ids(tokens), tuple(token_roles), is_plain=True)
        return encoded, _places(tokens, spans, [0] * len(spans))

    def _encode_chat(
        self, messages: Sequence[Message], response: str | None
    ) -> tuple[EncodedPrompt, Iterator[Place | None]]:
        # Few chat templates know the role "developer", which speaks as the system.
        chat = [replace(m, role="system") if m.role == "developer" else m for m in messages]
        if response is not None:
            chat.append(Message("assistant", response))
        roles = tuple(turn.role for turn in chat)
        for_generation = response is None
        rendered = self._render(chat, for_generation=for_generation)
        is_short = len(roles) <= _CACHED_TURNS
        find_frame = self._cached_frame if is_short else self._render_frame
        # A template may write today's date.
        literals, markers = find_frame(roles, for_generation=for_generation, _day=date.today())
        spans = self._content_spans(rendered, chat, literals)
        edges = [0, *(edge for span in spans for edge in span), len(rendered)]
        template = list(zip(edges[::2], edges[1::2], strict=True))
        tokens = self._contents.encode_chat(rendered, template)
        ids = _ids(tokens)
        turns = self.chat_format.turns(ids)
        if not turns:
            raise SidelightError(
                "The model's chat template marks no turns, so a chat cannot be told from plain "
                f"text. To classify chats, {_USE_RAW}."
            )
        if self.chat_format.markers(ids) != markers:
            raise SidelightError(
                "The text contains what the model's chat template writes between turns. Remove it, "
                f"or {_USE_RAW}."
            )
        token_roles = roles_of_tokens(turns, len(ids), has_response=response is not None)
        pairs = zip(chat, spans, strict=True)
        skipped = [turn.content.find(rendered[start:end]) for turn, (start, end) in pairs]
        encoded = EncodedPrompt(ids, token_roles, is_attributed=are_attributed(turns, roles))
        return encoded, _places(tokens, spans, skipped)

    def _render(self, turns: Sequence[Message], *, for_generation: bool) -> str:
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=for_generation
            )
        except TemplateError as error:
            raise SidelightError(
                f"The model's chat template refuses this conversation: {error}. Change the roles "
                f"or their order, or {_USE_RAW}."
            ) from error

    def _content_spans(
        self, rendered: str, turns: Sequence[Message], literals: Sequence[str]
    ) -> list[Range]:
        """The characters that each turn's text takes in the rendered template."""
        spans: list[Range] = []
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
                    f"of the template. To classify such texts, {_USE_RAW}."
                )
            spans.append((cursor, ends[0]))
            cursor = ends[0] + len(literal)
        return spans

    def _render_frame(
        self, roles: tuple[str, ...], *, for_generation: bool, _day: date
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The text of the template before, between and after turns of these roles: its markers."""
        sentinels = [f"sidelight-turn-{i}-text" for i in range(len(roles))]
        placeholders = [
            Message(role, sentinel) for role, sentinel in zip(roles, sentinels, strict=True)
        ]
        rendered = self._render(placeholders, for_generation=for_generation)
        literals: list[str] = []
        cursor = 0
        for sentinel in sentinels:
            start = rendered.find(sentinel, cursor)
            if start < 0:
                raise SidelightError(
                    "The chat template leaves a turn out (roles: "
                    f"{', '.join(dict.fromkeys(roles))}). Use roles that the model knows, or "
                    f"{_USE_RAW}."
                )
            literals.append(rendered[cursor:start])
            cursor = start + len(sentinel)
        tokens = self.tokenizer(rendered, add_special_tokens=False, verbose=False)
        literals.append(rendered[cursor:])
        return tuple(literals), self.chat_format.markers(tokens["input_ids"])


def _ids(tokens: Sequence[Token]) -> tuple[int, ...]:
    return tuple(token_id for token_id, _, _ in tokens)


def _token_range(token: Token) -> Range:
    """The range of a token; tokenizers that trim blanks give (end, end) for a blank one."""
    _, start, end = token
    return (end - 1 if start == end > 0 else start, end)


def _places(
    tokens: Sequence[Token], spans: Sequence[Range], skipped: Sequence[int]
) -> Iterator[Place | None]:
    """The place of each token; None: no part of a content.

    Args:
        tokens: Those of the text that the model reads.
        spans: What of that text is each turn's content.
        skipped: How many first characters of each content the template has left out; -1: it has
            written the content in another way.
    """
    ends = [end for _, end in spans]
    for first, last in map(_token_range, tokens):
        message = bisect_right(ends, first)
        if message == len(ends) or last <= spans[message][0] or skipped[message] < 0:
            yield None
            continue
        begin, end = spans[message]
        moved = skipped[message] - begin
        yield Place(message, max(first, begin) + moved, min(last, end) + moved)
