"""Recent scores of each probe, compared with those of its validation texts."""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sidelight.engines.base import Engine, LoadedProbe
from sidelight.metrics.drift import BINS, score_counts, stability_index
from sidelight.types import Verdict

# Of recent scores: as many are compared, and fewer than the second number say nothing. Without
# drift, so few exceed 0.1 in at most 5 of 100 comparisons with 150 scores of validation.
WINDOW = 1000
ENOUGH = 200


class Drift(Collector):
    """The drift of each label of the probes that run, computed when it is asked for.

    Args:
        engine: Has the probes; the scores of others are forgotten.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._recent: dict[tuple[str, str], dict[str, deque[float]]] = {}

    def add(self, probe: LoadedProbe, verdict: Verdict) -> None:
        """Keeps the verdict's scores; a new version begins anew."""
        key = _key(probe)
        if key not in self._recent:
            running = {key, *map(_key, self._engine.probes)}
            self._recent = {k: kept for k, kept in self._recent.items() if k in running}
            self._recent[key] = {}
        for label, score in scores(probe, verdict).items():
            self._recent[key].setdefault(label, deque(maxlen=WINDOW)).append(score)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The series; of a probe that has no scores of validation, or too few of its own, none."""
        family = GaugeMetricFamily(
            "sidelight_probe_drift_psi",
            "Population stability index of recent scores against validation's, less that of chance",
            labels=["probe", "label"],
        )
        for probe in self._engine.probes if self._engine.is_ready else ():
            recent = self._recent.get(_key(probe), {})
            for label, reference in reference_counts(probe.record).items():
                if len(own := recent.get(label, ())) >= ENOUGH:
                    family.add_metric(
                        [probe.name, label], stability_index(reference, score_counts(own))
                    )
        return [family]


def _key(probe: LoadedProbe) -> tuple[str, str]:
    return probe.name, probe.version


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
