"""Whether a judge's labels can be trusted: a blind sample that a person labels too, and its gate.

The sample is stratified by a probe's score, so that it has enough of a rare label. Its size is
chosen so that the gate stops a judge of 0.70 balanced agreement, and lets one of 0.92 pass, in 19
of 20 draws (``test_agreement.py``).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from sidelight.statistics.agreement import Agreement, measure_agreement

# The least balanced agreement of a judge that goes on.
LEAST_AGREEMENT = 0.8
# The first sample, and the one after which the figure alone counts.
SAMPLE = 100
MOST = 200
LEAST_OF_LABEL = 20
_STEP = 25
# Texts that a probe calls negative, unsure, and positive.
_CUTS = (0.1, 0.5)
# A probe this sure of the other label doubts the judge's.
_SURE = 0.9

GateState = Literal["open", "passed", "stopped", "too_few"]


@dataclass(frozen=True)
class BlindSample:
    """Texts that a person labels without seeing what a judge said.

    Attributes:
        strata: Rows in random order; the sample is the beginning of each. A larger sample has the
            texts of a smaller one.
    """

    strata: tuple[tuple[int, ...], ...]

    @staticmethod
    def draw(
        rows: Collection[int], scores: Float[np.ndarray, " text"] | None, *, seed: int = 0
    ) -> "BlindSample":
        """Strata of these rows.

        Args:
            rows: Texts that a judge has labelled.
            scores: Probability that a probe gives the positive label, for each text; None: there
                is no probe, so there is one stratum.
            seed: Of the order.
        """
        order = np.random.default_rng(seed).permutation(sorted(rows)).astype(int)
        if scores is None:
            return BlindSample((tuple(order.tolist()),))
        stratum = np.digitize(scores[order], _CUTS)
        strata = (order[stratum == each] for each in range(len(_CUTS) + 1))
        return BlindSample(tuple(tuple(each.tolist()) for each in strata if len(each)))

    def first(self, count: int) -> dict[int, float]:
        """A sample of so many, or all, with how many texts each stands for.

        Strata give the same number, or all that they have.
        """
        sample: dict[int, float] = {}
        left = min(count, self.total)
        # Small strata first: the others give what these lack.
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
    """Whether a judge may go on.

    Attributes:
        state: ``open`` while the person has texts of the sample to label; ``too_few`` if the sample
            cannot have enough of each label.
        agreement: With the person, on what is labelled of the sample.
        sample: The rows of the sample.
        left: Those that the person has not labelled.
    """

    state: GateState
    agreement: Agreement
    sample: Sequence[int]
    left: Sequence[int]


def decide_gate(sample: BlindSample, person: Mapping[int, bool], judge: Mapping[int, bool]) -> Gate:
    """The gate of a judge.

    The sample grows until it has enough of each label and its interval excludes the least
    agreement, up to a limit.

    Args:
        sample: Of texts that the judge has labelled.
        person: A person's labels, by row.
        judge: The judge's.
    """
    # One that always says the same agrees on half of each label, whatever a sample is like.
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
    """The texts whose label a probe is sure is wrong, the surest first, with how sure it is.

    Args:
        probabilities: Of the positive label, by a probe that did not learn from the text.
        labels: Of the texts to look at, by row.
    """
    doubts = {row: float(probabilities[row]) for row in labels}
    doubts = {row: 1 - p if labels[row] else p for row, p in doubts.items()}
    surest = sorted(doubts, key=doubts.__getitem__, reverse=True)
    return {row: doubts[row] for row in surest if doubts[row] >= _SURE}
