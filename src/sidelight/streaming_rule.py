"""When a score that runs along with a response counts: the rule against flicker.

A running score is the probe's probability after each token of the response. A single token over
the threshold is often noise, so the rule wants several in a row. The server cuts text by it, and
`sidelight bench streaming` measures it. Knows scores, not probes or text.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sidelight.errors import SidelightError, VerdictError


@dataclass(frozen=True)
class Watched:
    """What a rule remembers of one response.

    Attributes:
        tokens: Scores seen.
        streak: Scores at or over the threshold since the last one below it, after the warm-up.
        fired_at: Tokens seen when the rule first held; None while it has not. It stays.
    """

    tokens: int = 0
    streak: int = 0
    fired_at: int | None = None

    @property
    def has_fired(self) -> bool:
        """Whether the rule held at some token."""
        return self.fired_at is not None


@dataclass(frozen=True)
class StreamingRule:
    """Fires at the first token that ends a streak over the threshold.

    Holding back `consecutive` tokens of text keeps the whole streak from the reader.

    Attributes:
        threshold: Probability from which a token counts, in [0, 1].
        consecutive: Tokens in a row that have to count, 1 or more.
        warm_up: First tokens of the response that never count.

    Raises:
        SidelightError: A value is out of its range.
    """

    threshold: float
    consecutive: int = 2
    warm_up: int = 0

    def __post_init__(self):
        if not 0 <= self.threshold <= 1 or self.consecutive < 1 or self.warm_up < 0:
            raise SidelightError(
                "A streaming rule needs a threshold from 0 to 1, one or more consecutive tokens "
                f"and a warm-up of 0 or more, got: {self}."
            )

    def advance(self, watched: Watched, score: float) -> Watched:
        """What is remembered after one more token.

        Args:
            watched: `Watched()` before the first token.
            score: The running probability with this token.

        Raises:
            VerdictError: The score is not finite. There is no verdict then, not even a harmless
                one: a blocking policy blocks.
        """
        if not math.isfinite(score):
            raise VerdictError(
                f"The running score of token {watched.tokens + 1} is not finite. Treat the text "
                "as not judged."
            )
        tokens = watched.tokens + 1
        counts = tokens > self.warm_up and score >= self.threshold
        streak = watched.streak + 1 if counts else 0
        fires = not watched.has_fired and streak >= self.consecutive
        return Watched(tokens, streak, tokens if fires else watched.fired_at)

    def first_firing(self, scores: Float[np.ndarray, " token"]) -> int | None:
        """Tokens seen when the rule first holds on a complete response; None: it never does.

        The same as `advance` over all scores, for measuring many rules on many responses.

        Raises:
            VerdictError: A score is not finite.
        """
        if not np.isfinite(scores).all():
            raise VerdictError("A running score is not finite. Treat the text as not judged.")
        if len(scores) < self.consecutive:
            return None
        counts = scores >= self.threshold
        counts[: self.warm_up] = False
        windows = np.lib.stride_tricks.sliding_window_view(counts, self.consecutive)
        starts = np.flatnonzero(windows.all(1))
        return int(starts[0]) + self.consecutive if len(starts) else None
