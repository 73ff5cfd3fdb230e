"""Encoding of texts such that only the chat template can produce control tokens.

Works on tokenizers, independent of conversations and turns.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Protocol, runtime_checkable

from tokenizers import Tokenizer as PlainTokenizer

from sidelight.errors import SidelightError

Range = tuple[int, int]
"""Index of the first character, and index after the last."""
Token = tuple[int, int, int]
"""A token's id, and its range in the text."""


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face fast tokenizer that the modules of ``prompts`` use."""

    chat_template: Any
    added_tokens_decoder: Any
    unk_token: Any
    backend_tokenizer: Any

    def __call__(self, text: str, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def decode(self, token_ids: Any, **options: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def get_vocab(self) -> Any: ...


def control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The ids and names of the tokens that no text may become.

    These are the special tokens, and other added tokens that the template writes or that the
    model's own vocabulary lacks. Whitespace tokens, such as runs of spaces, are text.
    """
    template = str(tokenizer.chat_template)
    model = tokenizer.backend_tokenizer.model
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or (
            token.content.strip()
            and (token.content in template or model.token_to_id(token.content) is None)
        )
    }


class ContentTokenizer:
    """Encodes control tokens only where the chat template writes them; see ``turns``."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._names = control_tokens(tokenizer)
        # The unknown token can occur in any text.
        self._unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", tokenizer.unk_token)
        # A template has few parts, some of them long.
        self._cached_controls = lru_cache(maxsize=256)(self._find_controls)

    @cached_property
    def longest_token(self) -> int:
        """Upper bound of the characters per token: the longest token name."""
        return max(map(len, self._tokenizer.get_vocab()))

    def count(self, text: str) -> int:
        """Number of tokens of a text; a control token's name counts as a single token.

        This takes a tenth of the time of creating the tokens and ranges as Python objects, and
        releases the GIL.
        """
        backend = self._tokenizer.backend_tokenizer
        (tokens,) = backend.encode_batch_fast([text], add_special_tokens=False)
        return len(tokens)

    def holds_controls(self, text: str) -> bool:
        """Whether a text would produce control tokens on a server that does not prevent them."""
        backend = self._tokenizer.backend_tokenizer
        (tokens,) = backend.encode_batch_fast([text], add_special_tokens=False)
        return not self._names.keys().isdisjoint(tokens.ids)

    def encode_chat(self, text: str, template: Sequence[Range]) -> list[Token]:
        """Encode a rendered conversation.

        If no content contains a control token, the ids are the tokenizer's own for the whole text.

        Args:
            text: The text rendered by the template.
            template: The ranges that the template itself wrote, in order.

        Raises:
            SidelightError: The tokenizer cannot encode a content without a control token.
        """
        controls = [
            (token_id, begin + start, begin + end)
            for begin, stop in template
            for token_id, start, end in self._cached_controls(text[begin:stop])
        ]
        tokens = self._tokenise(text, add_special_tokens=False)
        if self._has_only(controls, tokens, text):
            return tokens
        tokens, cursor = list[Token](), 0
        for token_id, start, end in controls:
            tokens += self._as_text(text[cursor:start], at=cursor)
            tokens.append((token_id, start, end))
            cursor = end
        tokens += self._as_text(text[cursor:], at=cursor)
        return self._checked(tokens, controls, text)

    def encode_raw(self, text: str) -> list[Token]:
        """Encode a text without a template, between the tokenizer's own special tokens."""
        controls = self._controls_in(self._tokenise(""), "")
        tokens = self._tokenise(text)
        if self._has_only(controls, tokens, text):
            return tokens
        return self._checked(self._as_text(text, add_special_tokens=True), controls, text)

    def _tokenise(self, text: str, **options: Any) -> list[Token]:
        # Not verbose: the tokenizer would warn about long texts, which raise an error of our own.
        tokens = self._tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
        pairs = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        return [(token_id, start, end) for token_id, (start, end) in pairs]

    def _as_text(self, text: str, *, at: int = 0, add_special_tokens: bool = False) -> list[Token]:
        """Encode a part that begins at character ``at``, without recognising control tokens."""
        tokenizer = self._continuing if at else self._prefix_tokenizer
        run = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        pairs = zip(run.ids, run.offsets, strict=True)
        return [(token_id, at + start, at + end) for token_id, (start, end) in pairs]

    @cached_property
    def _prefix_tokenizer(self) -> PlainTokenizer:
        """A tokenizer without control tokens, for the beginning of a text."""
        return self._without_controls(self._tokenizer.backend_tokenizer.to_str())

    @cached_property
    def _continuing(self) -> PlainTokenizer:
        """As ``_prefix_tokenizer``, for later parts: no space is inserted before the first word."""
        definition = self._tokenizer.backend_tokenizer.to_str()
        return self._without_controls(
            re.sub(r'("prepend_scheme":\s*)"first"', r'\1"never"', definition)
        )

    def _without_controls(self, serialised: str) -> PlainTokenizer:
        definition = json.loads(serialised)
        added = [
            {**token, "special": token["id"] in self._names} for token in definition["added_tokens"]
        ]
        definition |= {"added_tokens": added, "truncation": None, "padding": None}
        plain = PlainTokenizer.from_str(json.dumps(definition))
        plain.encode_special_tokens = True
        return plain

    def _find_controls(self, text: str) -> list[Token]:
        return self._controls_in(self._tokenise(text, add_special_tokens=False), text)

    def _controls_in(self, tokens: Sequence[Token], text: str) -> list[Token]:
        controls: list[Token] = []
        for token_id, start, end in tokens:
            name = self._names.get(token_id)
            is_unknown = name == self._unknown and start < end and text[start:end].strip() != name
            if name is not None and not is_unknown:
                controls.append((token_id, start, end))
        return controls

    def _has_only(self, controls: Sequence[Token], tokens: Sequence[Token], text: str) -> bool:
        """Whether these are all its control tokens; they may cover adjacent spaces of a content."""
        actual = self._controls_in(tokens, text)
        return len(actual) == len(controls) and all(
            token[0] == expected[0] and token[1] <= expected[1] and expected[2] <= token[2]
            for token, expected in zip(actual, controls, strict=True)
        )

    def _checked(self, tokens: list[Token], controls: Sequence[Token], text: str) -> list[Token]:
        if not self._has_only(controls, tokens, text):
            raise SidelightError(
                "The text contains the name of a control token, which this model's tokenizer "
                "cannot encode as plain text. Remove it from the text."
            )
        return tokens
