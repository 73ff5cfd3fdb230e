"""Recent scores of each probe, compared with those of its validation texts.

What probes said and what followed, as series for Prometheus.

Counts and times for Prometheus; no text, no keys, and labels of bounded number.
"""

import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidelight.engines.base import (
    Engine,
    Event,
    Finished,
    PromptJudged,
    ResponseScored,
    TextDelta,
    written_by,
)
from sidelight.metrics import BINS, score_counts, stability_index
from sidelight.policy.decisions import Decision, agreements
from sidelight.probe import Probe
from sidelight.server.middleware import route_of
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

    def add(self, probe: Probe, verdict: Verdict) -> None:
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


def _key(probe: Probe) -> tuple[str, str]:
    return probe.name, probe.version


def scores(probe: Probe, verdict: Verdict) -> dict[str, float]:
    """The probability of each label; of a binary probe that of the positive one alone."""
    if probe.task.kind != "binary":
        return verdict.probabilities
    positive = probe.task.labels[1]
    return {positive: verdict.probabilities[positive]}


def reference_counts(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """The validation scores of each label, as training stored them; older probes have none."""
    stored: dict[str, list[int]] = record.get("validation", {}).get("scores", {})
    return {label: counts for label, counts in stored.items() if len(counts) == BINS}


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
            rule = decision.rule
            self._verdicts.labels(rule.name, decision.outcome).inc()
            if decision.action != "none":
                self._actions.labels(rule.name, rule.side, decision.action).inc()
            # Scores of whole texts are compared with each other, and with those of validation.
            if not decision.is_unfinished:
                self._note_scores(decision)
        for shadow, agreement in agreements(decisions):
            self._agreements.labels(shadow.shadow_of, shadow.name, agreement).inc()

    def _note_scores(self, decision: Decision) -> None:
        if decision.verdict is None:
            return
        probe = decision.rule.probe
        for label, score in scores(probe, decision.verdict).items():
            self._scores.labels(probe.name, label).observe(score)
        self._drift.add(probe, decision.verdict)


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_JUDGING_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *_SECONDS)


class Metrics:
    """The series of one server, in a registry of its own.

    Args:
        engine: Gives the requests that run and wait.
    """

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self.requests = self._count("requests", "Answers by route and status", "route", "status")
        self.prompt_tokens = self._count(
            "prompt_tokens", "Tokens read, also of checks and blocked prompts"
        )
        self._completion_tokens = self._count("completion_tokens", "Tokens written")
        self.audit_failures = self._count("audit_failures", "Lines that could not be written")
        self._verdicts = VerdictSeries(engine, registry)
        self._to_verdict = self._seconds("time_to_verdict", "Until the prompt was judged")
        self._to_first_text = self._seconds("time_to_first_text", "Until the first text")
        self._between = self._seconds("inter_text_latency", "Between two pieces of text")
        self._in_all = self._seconds("e2e_request_latency", "Until the text was complete")
        self._judging = Histogram(
            "sidelight_judging_seconds",
            "By which probes made the steps of a request longer",
            ["side"],
            buckets=_JUDGING_SECONDS,
            registry=registry,
        )
        running = Gauge("sidelight_requests_running", "Being written", registry=registry)
        running.set_function(lambda: engine.load.running)
        waiting = Gauge("sidelight_requests_waiting", "In line", registry=registry)
        waiting.set_function(lambda: engine.load.waiting)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)

    async def read(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The engine's events; what it read and wrote is counted, whatever becomes of it."""
        written_s: float | None = None
        written = 0
        try:
            async with aclosing(events):
                async for event in events:
                    written = max(written, written_by(event))
                    match event:
                        case PromptJudged():
                            self.prompt_tokens.inc(event.tokens)
                            self.note_judging(event)
                        case ResponseScored() | Finished():
                            # Of a text that no probe read, none of the time was a probe's.
                            if event.verdicts or event.failed:
                                written_s = event.judging_s
                        case TextDelta():
                            pass
                    yield event
        finally:
            self._completion_tokens.inc(written)
            if written_s is not None:
                self._judging.labels("output").observe(written_s)

    async def observed(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The same events, counted and timed as they pass."""
        start = last = time.perf_counter()
        to_text = self._to_first_text
        async with aclosing(events):
            async for event in events:
                now = time.perf_counter()
                match event:
                    case PromptJudged():
                        self._to_verdict.observe(now - start)
                    case TextDelta():
                        to_text.observe(now - last)
                        to_text, last = self._between, now
                    case ResponseScored():
                        pass
                    case Finished():
                        self._in_all.observe(now - start)
                yield event

    def note_judging(self, event: PromptJudged) -> None:
        """Counts the seconds that probes took in the pass over one text."""
        self._judging.labels("input").observe(event.judging_s)

    def count(self, decisions: Sequence[Decision]) -> None:
        """Counts what probes said, what was done, and whether shadows agreed."""
        self._verdicts.count(decisions)

    def _count(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"sidelight_{name}", meaning, labels, registry=self._registry)

    def _seconds(self, name: str, meaning: str) -> Histogram:
        return Histogram(
            f"sidelight_{name}_seconds", meaning, buckets=_SECONDS, registry=self._registry
        )


class CountRequests:
    """Counts every answer by route template and status; unknown routes share one label."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and notes its status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_answered = False

        async def noted(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                self._count(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            # An exception that no handler took becomes a 500 further out.
            if not is_answered:
                self._count(scope, 500)

    def _count(self, scope: Scope, status: int) -> None:
        self._metrics.requests.labels(route_of(scope), str(status)).inc()
