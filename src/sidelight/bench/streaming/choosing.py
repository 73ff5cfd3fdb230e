"""The rule of a detector, chosen on validation responses. Never sees the test."""

from collections.abc import Sequence
from itertools import product

import numpy as np

from sidelight.bench.streaming.outcomes import f1, false_alarms, outcomes
from sidelight.bench.streaming.replay import Scores
from sidelight.bench.streaming.responses import Responses
from sidelight.streaming_rule import StreamingRule

_THRESHOLDS = (*(round(0.05 * step, 2) for step in range(1, 20)), 0.97, 0.99)
_CONSECUTIVE = (1, 2, 3, 5, 8)
_WARM_UPS = (0, 4, 8, 16)
# A rule this much worse in F1 is as good, if it fires sooner.
_NEAR_BEST = 0.01

# What a running score may be judged by, and what a single score is.
RUNNING = tuple(
    StreamingRule(threshold, consecutive, warm_up)
    for threshold, consecutive, warm_up in product(_THRESHOLDS, _CONSECUTIVE, _WARM_UPS)
)
SINGLE = tuple(StreamingRule(threshold, consecutive=1) for threshold in _THRESHOLDS)
HALF = (StreamingRule(0.5, consecutive=1),)


def choose_rule(
    candidates: Sequence[StreamingRule], scores: Scores, responses: Responses
) -> StreamingRule:
    """Of the rules with almost the best F1, the one that fires soonest.

    How soon is the mean number of tokens read of the positive responses, whole ones where the rule
    does not fire. Of rules that are equal in this too, the one with the fewest false alarms.

    Args:
        candidates: To choose from.
        scores: Running scores of validation responses.
        responses: The same responses.
    """
    found = [outcomes(rule, scores, responses) for rule in candidates]
    quality = [f1(these) for these in found]
    good = [i for i, value in enumerate(quality) if value >= max(quality) - _NEAR_BEST]

    def cost(i: int) -> tuple[float, float]:
        these = found[i].select(np.flatnonzero(responses.is_positive))
        read = np.where(these.fired, these.fired_at, these.tokens)
        return float(read.mean()), false_alarms(found[i])

    return candidates[min(good, key=cost)]
