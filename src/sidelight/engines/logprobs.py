"""How probable the model found each token that it wrote, and which it found the likeliest.

All are of the model's own distribution: before temperature and ``top_p``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# What OpenAI writes for "very unlikely"; JSON has no word for minus infinity.
LOWEST = -9999.0


@dataclass(frozen=True)
class Odds:
    """Log-probabilities at one position, by token id.

    Attributes:
        drawn: The token that was written.
        logprob: Its own, at least ``LOWEST``.
        likeliest: The most probable tokens, in this order, each with its log-probability.
    """

    drawn: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Spelling:
    r"""What a token stands for.

    Attributes:
        text: The characters; ``\xf0\x9f`` for a token that is only a part of one.
        bytes: Those that it adds to a text; None for a special token, which adds none, and where
            the tokenizer does not tell.
    """

    text: str
    bytes: bytes | None

    @property
    def is_partial(self) -> bool:
        """Whether it is a part of a character, so that ``text`` only describes it."""
        return self.bytes is not None and self.text.encode() != self.bytes


@dataclass(frozen=True)
class Candidate:
    """A token that was written, or could have been.

    Attributes:
        spelling: What it stands for.
        logprob: The natural logarithm of its probability, at least ``LOWEST``.
    """

    spelling: Spelling
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """One token of a text.

    Attributes:
        drawn: The token.
        likeliest: The most probable tokens at its place, in this order.
        offset: Characters of the text before it.
    """

    drawn: Candidate
    likeliest: tuple[Candidate, ...]
    offset: int


def odds_of(logits: Float[Tensor, " vocabulary"], token: int, *, count: int) -> Odds:
    """The odds of the token that was drawn, and of the ``count`` likeliest."""
    logprobs = torch.log_softmax(logits.float(), dim=-1).clamp(min=LOWEST)
    best = logprobs.topk(min(count, len(logprobs)))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Odds(token, logprobs[token].item(), tuple(ranked))


class Trail:
    """The tokens of a growing text, each told together with the text that it has a part in.

    Text may be held back: it may turn out to be part of a stop string, or half a character. So may
    then be what is told of its tokens.

    Args:
        spell: What a token stands for.
    """

    def __init__(self, spell: Callable[[int], Spelling]):
        self._spell = spell
        self._waiting: list[TokenLogprobs] = []
        self._length = 0
        self._sent = 0

    def add(self, odds: Odds, *, characters: int) -> None:
        """Takes a token with the number of characters that it completes."""
        likeliest = tuple(self._candidate(*pair) for pair in odds.likeliest)
        drawn = self._candidate(odds.drawn, odds.logprob)
        # A whole token's characters are the last ones; before them may stand what it completes.
        text = 0 if drawn.spelling.is_partial else min(characters, len(drawn.spelling.text))
        offset = self._length + (characters - text if text else 0)
        self._waiting.append(TokenLogprobs(drawn, likeliest, offset))
        self._length += characters

    def told(self, characters: int) -> tuple[TokenLogprobs, ...]:
        """The tokens to tell with the next ``characters`` of the text."""
        self._sent += characters
        told = tuple(token for token in self._waiting if token.offset < self._sent)
        self._waiting = self._waiting[len(told) :]
        return told

    def rest(self) -> tuple[TokenLogprobs, ...]:
        """The tokens that are left where the text ends by itself: parts of a character."""
        return tuple(self._waiting)

    def _candidate(self, token: int, logprob: float) -> Candidate:
        return Candidate(self._spell(token), logprob)
