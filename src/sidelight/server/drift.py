"""Recent scores of each probe, compared with those of its validation texts."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from sidelight.engines.base import LoadedProbe
from sidelight.metrics.drift import BINS, score_counts, stability_index
from sidelight.types import Verdict

# Of recent scores: as many are compared, and fewer than the second number say nothing.
WINDOW = 1000
ENOUGH = 100


class ScoreWatch:
    """Keeps the last scores of each label of each probe."""

    def __init__(self) -> None:
        self._recent: dict[tuple[str, str, str], deque[float]] = {}

    def add(self, probe: LoadedProbe, verdict: Verdict) -> dict[str, float]:
        """The drift of each label of the probe that can be told; a new version begins anew."""
        reference = reference_counts(probe.record)
        drifts: dict[str, float] = {}
        for label, score in scores(probe, verdict).items():
            key = (probe.name, probe.version, label)
            recent = self._recent.setdefault(key, deque(maxlen=WINDOW))
            recent.append(score)
            if label in reference and len(recent) >= ENOUGH:
                drifts[label] = stability_index(reference[label], score_counts(recent))
        return drifts


def scores(probe: LoadedProbe, verdict: Verdict) -> dict[str, float]:
    """The probability of each label; of a binary probe that of the positive one alone."""
    if probe.task.kind != "binary":
        return verdict.probabilities
    positive = probe.task.labels[1]
    return {positive: verdict.probabilities[positive]}


def reference_counts(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """The validation scores of each label, as training stored them; older probes have none."""
    stored: dict[str, list[int]] = record.get("validation", {}).get("scores", {})
    return {label: counts for label, counts in stored.items() if len(counts) == BINS}
