"""Where a rule fired on each response, and the figures that follow. Knows no scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Shaped

from sidelight.bench.streaming.replay import Scores
from sidelight.bench.streaming.responses import Responses
from sidelight.streaming_rule import StreamingRule

_PER_TOKENS = 1000
_RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Where a rule fired.

    Attributes:
        is_positive: Whether each response was to be caught.
        tokens: Of each response.
        fired_at: Tokens read when the rule fired; 0: it did not.
    """

    is_positive: Bool[np.ndarray, " response"]
    tokens: Int[np.ndarray, " response"]
    fired_at: Int[np.ndarray, " response"]

    def select(self, rows: Shaped[np.ndarray, " row"]) -> "Outcomes":
        """Some of the responses."""
        return Outcomes(self.is_positive[rows], self.tokens[rows], self.fired_at[rows])

    @property
    def fired(self) -> Bool[np.ndarray, " response"]:
        """Whether the rule fired at all."""
        return self.fired_at > 0


def outcomes(rule: StreamingRule, scores: Scores, responses: Responses) -> Outcomes:
    """Where the rule fires on each response."""
    fired_at = [rule.first_firing(own) or 0 for own in scores]
    return Outcomes(responses.is_positive, responses.tokens, np.array(fired_at, dtype=np.int64))


def precision(these: Outcomes) -> float:
    """Share of firings that are right; NaN without any."""
    return _mean(these.is_positive[these.fired])


def recall(these: Outcomes) -> float:
    """Share of the positive responses that are caught before they end."""
    return _mean(these.fired[these.is_positive])


def f1(these: Outcomes) -> float:
    """Harmonic mean of precision and recall, response by response."""
    hits = int((these.fired & these.is_positive).sum())
    return 2 * hits / max(1, int(these.fired.sum()) + int(these.is_positive.sum()))


def median_delay(these: Outcomes) -> float:
    """Tokens read when a positive response is caught, half of the time or more."""
    return _percentile(these.fired_at[these.fired & these.is_positive], 50)


def late_delay(these: Outcomes) -> float:
    """Tokens read when nine of ten positive responses that are caught at all are caught."""
    return _percentile(these.fired_at[these.fired & these.is_positive], 90)


def false_alarms(these: Outcomes) -> float:
    """Firings per 1,000 tokens read of the other responses; each is read until it fires."""
    other = these.select(np.flatnonzero(~these.is_positive))
    read = np.where(other.fired, other.fired_at, other.tokens).sum()
    return _PER_TOKENS * int(other.fired.sum()) / max(1, int(read))


FIGURES: dict[str, Callable[[Outcomes], float]] = {
    "F1": f1,
    "precision": precision,
    "recall": recall,
    "delay, median": median_delay,
    "delay, 90 %": late_delay,
    "false alarms per 1,000 tokens": false_alarms,
}


@dataclass(frozen=True)
class Estimate:
    """A figure, mean over seeds, with its 95 % interval over prompts and seeds.

    None stands for what is undefined, such as a delay where nothing is caught.
    """

    value: float | None
    low: float | None
    high: float | None


def estimates(
    by_seed: Sequence[Outcomes], prompts: Int[np.ndarray, " response"], *, seed: int = 0
) -> dict[str, Estimate]:
    """Every figure, bootstrapped: prompts with all their responses, and seeds, drawn again.

    Args:
        by_seed: Of one detector, for each training seed.
        prompts: Number of each response's prompt.
        seed: Of the resamples.
    """
    generator = np.random.default_rng(seed)
    rows = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    drawn: list[dict[str, float]] = []
    for _ in range(_RESAMPLES):
        chosen = np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))])
        seeds = generator.integers(len(by_seed), size=len(by_seed))
        drawn.append(_means([by_seed[i].select(chosen) for i in seeds]))
    whole = _means(by_seed)
    return {name: _estimate(whole[name], [one[name] for one in drawn]) for name in FIGURES}


def _means(by_seed: Sequence[Outcomes]) -> dict[str, float]:
    return {
        name: float(np.mean([figure(these) for these in by_seed]))
        for name, figure in FIGURES.items()
    }


def _estimate(value: float, drawn: Sequence[float]) -> Estimate:
    if np.isnan(value):
        return Estimate(None, None, None)
    defined = [one for one in drawn if not np.isnan(one)]
    low, high = np.percentile(defined, _INTERVAL)
    return Estimate(value, float(low), float(high))


def _mean(values: Bool[np.ndarray, " _"]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _percentile(values: Int[np.ndarray, " _"], percent: int) -> float:
    return float(np.percentile(values, percent)) if len(values) else float("nan")
