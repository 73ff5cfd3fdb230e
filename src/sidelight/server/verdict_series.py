"""What probes said and what followed, as series for Prometheus."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from sidelight.engines.base import Engine
from sidelight.server.drift import Drift, scores
from sidelight.server.policy.decisions import Decision, agreements

_TENTHS = tuple(i / 10 for i in range(1, 11))


class VerdictSeries:
    """Counts of verdicts, and how their scores are distributed.

    Args:
        engine: Has the probes.
        registry: Takes the series.
    """

    def __init__(self, engine: Engine, registry: CollectorRegistry):
        self._verdicts = Counter(
            "sidelight_verdicts", "Verdicts by outcome", ["probe", "outcome"], registry=registry
        )
        self._actions = Counter(
            "sidelight_actions",
            "What followed from verdicts",
            ["probe", "side", "action"],
            registry=registry,
        )
        self._agreements = Counter(
            "sidelight_shadow_agreements",
            "Whether a shadow said what its probe said",
            ["probe", "shadow", "agreement"],
            registry=registry,
        )
        self._scores = Histogram(
            "sidelight_probe_score",
            "Probabilities; of a binary probe those of its positive label",
            ["probe", "label"],
            buckets=_TENTHS,
            registry=registry,
        )
        self._drift = Drift(engine)
        registry.register(self._drift)

    def count(self, decisions: Sequence[Decision]) -> None:
        """Counts what probes said, what was done, and whether shadows agreed."""
        for decision in decisions:
            clause = decision.clause
            self._verdicts.labels(clause.name, decision.outcome).inc()
            if decision.action != "none":
                self._actions.labels(clause.name, clause.side, decision.action).inc()
            # Scores of whole texts are compared with each other, and with those of validation.
            if not decision.is_unfinished:
                self._note_scores(decision)
        for shadow, agreement in agreements(decisions):
            self._agreements.labels(shadow.rule.shadow_of, shadow.name, agreement).inc()

    def _note_scores(self, decision: Decision) -> None:
        if decision.verdict is None:
            return
        probe = decision.clause.probe
        for label, score in scores(probe, decision.verdict).items():
            self._scores.labels(probe.name, label).observe(score)
        self._drift.add(probe, decision.verdict)
