"""Renders a conversation by the model's chat template and encodes it."""

from collections.abc import Sequence
from functools import lru_cache

from jinja2 import TemplateError

from sidelight.errors import ContextLengthError, SidelightError
from sidelight.prompts.control_tokens import ContentTokenizer, Tokenizer
from sidelight.prompts.conversation import (
    Conversation,
    Message,
    Part,
    PlainText,
    PromptFormat,
)
from sidelight.prompts.encoded import EncodedPrompt

# What a template writes around longer conversations is found anew each time.
_CACHED_TURNS = 200


class PromptEncoder:
    """Encodes conversations for one backbone.

    No content becomes a special token, whatever it says; for other contents the ids are those of
    the tokenizer's ``apply_chat_template``.

    Args:
        tokenizer: A fast tokenizer (offsets are needed to know what a token belongs to).
        prompt_format: ``chat`` renders the model's chat template; ``raw`` joins the turns by line
            breaks and adds the tokenizer's own special tokens.
        max_tokens: The longest input that the backbone accepts.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt_format: PromptFormat, max_tokens: int):
        self._tokenizer = tokenizer
        self._contents = ContentTokenizer(tokenizer)
        self.prompt_format: PromptFormat = prompt_format
        self.max_tokens = max_tokens
        # Bounded in number and in turns: clients choose the sequences of roles.
        self._cached_literals = lru_cache(maxsize=256)(self._render_literals)

    def encode(self, messages: Conversation, response: str | None = None) -> EncodedPrompt:
        """Token ids of the conversation, ready for generation or followed by ``response``.

        Raises:
            ContextLengthError: Longer than ``max_tokens``; nothing is cut.
            SidelightError: No message, no token, or a template that cannot be followed.
        """
        encoded = self.encode_any_length(messages, response)
        if not len(encoded):
            raise SidelightError("The text is empty: there is no token to read. Send some text.")
        if len(encoded) > self.max_tokens:
            raise ContextLengthError(
                f"The text has {len(encoded)} tokens with its template, but the model reads at "
                f"most {self.max_tokens}. Shorten it, or judge it in parts."
            )
        return encoded

    def encode_any_length(
        self, messages: Conversation, response: str | None = None
    ) -> EncodedPrompt:
        """As ``encode``, with no limit on the length: for training, which reports what it cuts."""
        is_plain = isinstance(messages, PlainText)
        turns = [Message("user", messages.content)] if is_plain else _known_roles(messages)
        if not turns:
            raise SidelightError("A conversation needs at least one message.")
        _require_whole_characters([*(turn.content for turn in turns), response or ""])
        if is_plain or self.prompt_format == "raw":
            return self._encode_raw(turns, response)
        return self._encode_chat(turns, response)

    def _encode_raw(self, messages: Sequence[Message], response: str | None) -> EncodedPrompt:
        prompt = "\n".join(message.content for message in messages)
        tokens = self._contents.encode_raw(prompt + (response or ""))
        parts = [
            # The tokenizer's own special tokens cover no text, and say (0, 0).
            Part.TEMPLATE if end == 0 else Part.PROMPT if start < len(prompt) else Part.RESPONSE
            for start, end in map(_whole, tokens.offsets)
        ]
        return EncodedPrompt(tuple(tokens.token_ids), tuple(parts))

    def _encode_chat(self, messages: Sequence[Message], response: str | None) -> EncodedPrompt:
        turns = [*messages] if response is None else [*messages, Message("assistant", response)]
        rendered = self._render(turns, for_generation=response is None)
        spans = self._content_spans(rendered, turns, for_generation=response is None)
        first = next((i for i, turn in enumerate(turns) if turn.role != "system"), 0)
        kinds = [Part.UNREAD] * first + [Part.PROMPT] * (len(turns) - first)
        if response is not None:
            kinds[-1] = Part.RESPONSE
        edges = [0, *(edge for span in spans for edge in span), len(rendered)]
        template = list(zip(edges[::2], edges[1::2], strict=True))
        tokens = self._contents.encode_chat(rendered, template)
        return EncodedPrompt(
            token_ids=tuple(tokens.token_ids), parts=_token_parts(tokens.offsets, spans, kinds)
        )

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

    def _content_spans(
        self, rendered: str, turns: Sequence[Message], *, for_generation: bool
    ) -> list[tuple[int, int]]:
        """Where each turn's text stands in the rendered template, in characters."""
        roles = tuple(turn.role for turn in turns)
        is_short = len(roles) <= _CACHED_TURNS
        find_literals = self._cached_literals if is_short else self._render_literals
        literals = find_literals(roles, for_generation=for_generation)
        spans: list[tuple[int, int]] = []
        cursor = len(literals[0])
        for turn, literal in zip(turns, literals[1:], strict=True):
            # Templates may strip a turn's text.
            text = turn.content
            forms = (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"))
            ends = [cursor + len(f) for f in forms if rendered.startswith(f + literal, cursor)]
            if not ends:
                raise SidelightError(
                    "The chat template rewrites the text, so its tokens cannot be told from the "
                    "template's. Use the raw prompt format for this model (--format raw)."
                )
            spans.append((cursor, ends[0]))
            cursor = ends[0] + len(literal)
        return spans

    def _render_literals(self, roles: tuple[str, ...], *, for_generation: bool) -> list[str]:
        """What the template writes before, between and after the texts of turns of these roles."""
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
        return [*literals, rendered[cursor:]]


def _known_roles(messages: Sequence[Message]) -> list[Message]:
    """A developer speaks as the system: few chat templates know the role."""
    return [
        Message("system", turn.content) if turn.role == "developer" else turn for turn in messages
    ]


def _token_parts(
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    kinds: Sequence[Part],
) -> tuple[Part, ...]:
    """The part of each token: its turn's kind inside a turn's text, else template or unread."""
    begin = min(s for (s, _), kind in zip(spans, kinds, strict=True) if kind != Part.UNREAD)
    end = spans[-1][0] if kinds[-1] == Part.RESPONSE else float("inf")
    parts: list[Part] = []
    turn = 0
    for start, stop in map(_whole, offsets):
        while turn < len(spans) and spans[turn][1] <= start:
            turn += 1
        if turn < len(spans) and stop > spans[turn][0]:
            parts.append(kinds[turn])
        else:
            parts.append(Part.TEMPLATE if begin <= start < end else Part.UNREAD)
    return tuple(parts)


def _whole(offset: tuple[int, int]) -> tuple[int, int]:
    """The characters of a token; tokenizers that trim blanks say (end, end) for a blank one."""
    start, end = offset
    return (end - 1 if start == end > 0 else start, end)


def _require_whole_characters(texts: Sequence[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise SidelightError(
            "The text has half of a character (a lone surrogate). Decode it from valid UTF-8 or "
            "UTF-16 first."
        ) from error
