"""Check of a judge's labels: a blind sample that a person labels too, and the resulting gate.

The sample is stratified by a probe's score, so that it contains enough texts of a rare label. Its
size is chosen so that the gate stops a judge with 0.70 balanced agreement, and passes one with
0.92, in 19 of 20 draws (``test_agreement.py``).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from sidelight.statistics.agreement import Agreement, measure_agreement

# Minimum balanced agreement to pass.
LEAST_AGREEMENT = 0.8
# Size of the first sample, and of the sample after which only the estimate counts.
SAMPLE = 100
MOST = 200
LEAST_OF_LABEL = 20
_STEP = 25
# Limits of the score between negative, uncertain and positive texts.
_CUTS = (0.1, 0.5)
# Probability of the other label from which a probe doubts the judge's.
_SURE = 0.9

GateState = Literal["open", "passed", "stopped", "too_few"]


@dataclass(frozen=True)
class BlindSample:
    """Texts that a person labels without seeing the judge's labels.

    Attributes:
        strata: Rows in random order; the sample is a prefix of each. A larger sample contains the
            smaller ones.
    """

    strata: tuple[tuple[int, ...], ...]

    @staticmethod
    def draw(
        rows: Collection[int], scores: Float[np.ndarray, " text"] | None, *, seed: int = 0
    ) -> "BlindSample":
        """Draw the strata of these rows.

        Args:
            rows: Texts that a judge has labelled.
            scores: A probe's probability of the positive label for each text; None without a probe,
                which leads to a single stratum.
            seed: Seed of the order.
        """
        order = np.random.default_rng(seed).permutation(sorted(rows)).astype(int)
        if scores is None:
            return BlindSample((tuple(order.tolist()),))
        stratum = np.digitize(scores[order], _CUTS)
        strata = (order[stratum == each] for each in range(len(_CUTS) + 1))
        return BlindSample(tuple(tuple(each.tolist()) for each in strata if len(each)))

    def first(self, count: int) -> dict[int, float]:
        """A sample of at most this size, with the number of texts that each represents.

        Strata contribute equally, or all of their texts.
        """
        sample: dict[int, float] = {}
        left = min(count, self.total)
        # Small strata first, so that the others make up for them.
        for number, rows in enumerate(sorted(self.strata, key=len)):
            taken = min(len(rows), left // (len(self.strata) - number))
            left -= taken
            sample |= {row: len(rows) / taken for row in rows[:taken]}
        return sample

    @property
    def total(self) -> int:
        return sum(map(len, self.strata))


@dataclass(frozen=True)
class Gate:
    """The decision whether a judge may continue.

    Attributes:
        state: ``open`` while texts of the sample are unlabelled; ``too_few`` if the sample cannot
            contain enough of each label.
        agreement: Agreement with the person on the labelled part of the sample.
        sample: Rows of the sample.
        left: Rows that the person has not labelled.
    """

    state: GateState
    agreement: Agreement
    sample: Sequence[int]
    left: Sequence[int]


def decide_gate(sample: BlindSample, person: Mapping[int, bool], judge: Mapping[int, bool]) -> Gate:
    """Decide the gate of a judge.

    The sample grows until it has enough of each label and its interval excludes the minimum
    agreement, up to a limit.

    Args:
        sample: Sample of texts that the judge has labelled.
        person: A person's labels, by row.
        judge: The judge's labels, by row.
    """
    # A judge with constant labels has a balanced agreement of one half on any sample.
    if len({*judge.values()}) == 1:
        return Gate("stopped", measure_agreement([], [], []), (), ())
    count = SAMPLE
    while True:
        weights = sample.first(count)
        known = [row for row in weights if row in person]
        left = tuple(row for row in weights if row not in person)
        agreement = measure_agreement(
            [person[row] for row in known],
            [judge[row] for row in known],
            [weights[row] for row in known],
        )
        if left:
            return Gate("open", agreement, (*weights,), left)
        fewest = min(agreement.positives, agreement.texts - agreement.positives)
        is_all = len(weights) == sample.total
        if agreement.value is not None and fewest >= LEAST_OF_LABEL:
            assert agreement.low is not None
            assert agreement.high is not None
            is_clear = not agreement.low < LEAST_AGREEMENT <= agreement.high
            if is_clear or is_all or count >= MOST:
                passes = agreement.value >= LEAST_AGREEMENT
                return Gate("passed" if passes else "stopped", agreement, (*weights,), ())
        if is_all:
            return Gate("too_few", agreement, (*weights,), ())
        count += _STEP


def doubtful(
    probabilities: Float[np.ndarray, " text"], labels: Mapping[int, bool]
) -> dict[int, float]:
    """Texts whose label is wrong according to a confident probe, most confident first, with the
    probability.

    Args:
        probabilities: Probabilities of the positive label, from a probe that was not trained on the
            text.
        labels: Labels of the texts to examine, by row.
    """
    doubts = {row: float(probabilities[row]) for row in labels}
    doubts = {row: 1 - p if labels[row] else p for row, p in doubts.items()}
    surest = sorted(doubts, key=doubts.__getitem__, reverse=True)
    return {row: doubts[row] for row in surest if doubts[row] >= _SURE}
