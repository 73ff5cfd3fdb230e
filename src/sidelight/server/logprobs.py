"""Log-probabilities in OpenAI's two formats."""

from collections.abc import Mapping, Sequence
from typing import Any

from sidelight.engines.logprobs import Candidate, Spelling, TokenLogprobs


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """As a chat's choice has them."""
    content = [
        {**_entry(token.drawn), "top_logprobs": [_entry(other) for other in token.likeliest]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """As a text's choice has them: the drawn token stands among the likeliest in any case."""
    return {
        "tokens": [_name(token.drawn.spelling) for token in tokens],
        "token_logprobs": [token.drawn.logprob for token in tokens],
        "top_logprobs": [_by_name((*token.likeliest, token.drawn)) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _entry(candidate: Candidate) -> dict[str, Any]:
    known = candidate.spelling.bytes
    return {
        "token": candidate.spelling.text,
        "bytes": None if known is None else list(known),
        "logprob": candidate.logprob,
    }


def _by_name(candidates: Sequence[Candidate]) -> Mapping[str, float]:
    """By spelling; of two tokens that are spelled alike, the likelier."""
    return {_name(one.spelling): one.logprob for one in reversed(candidates)}


def _name(spelling: Spelling) -> str:
    return f"bytes:{spelling.text}" if spelling.is_partial else spelling.text
