"""Prometheus metrics: requests, tokens, times and verdicts, without texts or keys.

Every label has a bounded number of values.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from sidelight.engines.base import Engine
from sidelight.judges.question import FailureReason
from sidelight.policy.decisions import Decision, DecisionStatus, SecondOpinion, agreements
from sidelight.policy.rules import Action, BoundRule
from sidelight.probes.probe import Probe
from sidelight.types import Verdict

# `deploy/alerts.yaml` refers to these bounds.
_TENTHS = tuple(i / 10 for i in range(1, 11))
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_CHANGES = ("flagged", "passed")
_CLASSIFICATION_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *_SECONDS)


class Metrics(Collector):
    """The metrics of one server, in a separate registry.

    Args:
        engine: Engine with the running and waiting requests.
        rules: Function that returns the rules of all loaded probes.
    """

    def __init__(self, engine: Engine, rules: Callable[[], Iterable[BoundRule]]):
        self._rules = rules
        self._registry = registry = CollectorRegistry()
        self.requests = self._count(
            "requests", "HTTP responses by route and status", "route", "status"
        )
        self.prompt_tokens = self._count(
            "prompt_tokens", "Prompt tokens read, including checks and blocked prompts"
        )
        self.completion_tokens = self._count("completion_tokens", "Tokens generated")
        self.audit_failures = self._count(
            "audit_failures", "Audit log lines that could not be written"
        )
        self._verdicts = self._count("verdicts", "Verdicts by outcome", "probe", "outcome")
        self._actions = self._count(
            "actions", "Policy actions taken on verdicts", "probe", "side", "action"
        )
        self._agreements = self._count(
            "shadow_agreements",
            "Agreement of shadow probes with the probes they shadow",
            *("probe", "shadow", "agreement"),
        )
        self._questions = self._count(
            "judge_questions",
            "Questions to judges by outcome",
            *("judge", "probe", "side", "outcome"),
        )
        self._changes = self._count(
            "judge_changes",
            "Decisions changed by a judge",
            *("judge", "probe", "side", "outcome"),
        )
        self._judge_seconds = self._time(
            "judge_answer", "Time until a judge answered the questions about a text", "judge"
        )
        self.request_duration = self._time(
            "request_duration", "Time until the response was complete", "route"
        )
        self.time_to_verdict = self._time("time_to_verdict", "Time until the prompt was classified")
        self.time_to_first_text = self._time("time_to_first_text", "Time to the first text")
        self.inter_text_latency = self._time(
            "inter_text_latency", "Time between two chunks of text"
        )
        self.request_latency = self._time(
            "e2e_request_latency", "Time until the generated text was complete"
        )
        self.classification = self._time(
            "classification",
            "Time that probes added to the steps of a request",
            "side",
            buckets=_CLASSIFICATION_SECONDS,
        )
        self._scores = Histogram(
            "sidelight_probe_score",
            "Probabilities by label; for a binary probe, of its positive label",
            ["probe", "label"],
            buckets=_TENTHS,
            registry=registry,
        )
        self._gauge("requests_running", "Requests being processed", lambda: engine.load.running)
        self._gauge(
            "requests_waiting", "Requests waiting in the queue", lambda: engine.load.waiting
        )
        build = Info("sidelight_build", "Installed version of Sidelight", registry=registry)
        build.info({"version": version("sidelight")})

    def exposition(self) -> bytes:
        """The metrics in Prometheus's text format, including process metrics."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        return generate_latest(registry)

    def collect(self) -> Iterable[Metric]:
        """All series. Counters of each probe start at 0, because a first value is not an increase.

        The creation times of series are left out, because they double the storage and no query uses
        them.
        """
        # A new family at each scrape, so that a version that is no longer served leaves no series.
        served = InfoMetricFamily("sidelight_probe", "Probes that are served", labels=["probe"])
        for rule in self._rules():
            served.add_metric([rule.name], {"version": rule.probe.version})
            for result in get_args(DecisionStatus):
                self._verdicts.labels(rule.name, result)
            for action in get_args(Action):
                if action != "none":
                    self._actions.labels(rule.name, rule.side, action)
            if rule.rule.defer is not None:
                named = rule.rule.defer.judge, rule.name, rule.side
                for result in ("answered", *get_args(FailureReason)):
                    self._questions.labels(*named, result)
                for result in _CHANGES:
                    self._changes.labels(*named, result)
        yield served
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family

    def count(self, decisions: Sequence[Decision], beside: Sequence[Decision] = ()) -> None:
        """Count verdicts, the actions taken, and the agreement of shadow probes.

        Args:
            decisions: Decisions to count.
            beside: Decisions counted earlier on the same text, to compare shadow probes with.
        """
        for decision in decisions:
            rule, verdict = decision.rule, decision.verdict
            self._verdicts.labels(rule.name, decision.status).inc()
            if decision.action != "none":
                self._actions.labels(rule.name, rule.side, decision.action).inc()
            # Only scores of whole texts are comparable with each other.
            if verdict is not None and not decision.is_unfinished:
                for label, score in scores(rule.probe, verdict).items():
                    self._scores.labels(rule.name, label).observe(score)
            if decision.second is not None:
                self._count_second(decision, decision.second)
        counted = {decision.rule.name for decision in decisions}
        for shadow, agreement in agreements((*beside, *decisions)):
            if shadow.name not in counted:
                continue
            self._agreements.labels(shadow.shadow_of, shadow.name, agreement).inc()

    def _count_second(self, decision: Decision, second: SecondOpinion) -> None:
        named = second.judge, decision.rule.name, decision.rule.side
        for reason in second.failures:
            self._questions.labels(*named, reason).inc()
        answered = second.questions - len(second.failures)
        self._questions.labels(*named, "answered").inc(answered)
        if answered:
            self._judge_seconds.labels(second.judge).observe(second.seconds)
        if second.is_changed and decision.verdict is not None:
            self._changes.labels(*named, decision.status).inc()

    def _count(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"sidelight_{name}", meaning, labels, registry=self._registry)

    def _gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        Gauge(f"sidelight_{name}", meaning, registry=self._registry).set_function(value)

    def _time(
        self, name: str, meaning: str, *labels: str, buckets: Sequence[float] = _SECONDS
    ) -> Histogram:
        name = f"sidelight_{name}_seconds"
        return Histogram(name, meaning, labels, buckets=buckets, registry=self._registry)


def scores(probe: Probe, verdict: Verdict) -> dict[str, float]:
    """The probability of each label; for a binary probe only that of the positive label."""
    return {label: verdict.probabilities[label] for label in probe.task.output_labels}
