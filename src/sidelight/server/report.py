"""Verdicts as moderation categories, the words that OpenAI's clients know.

A chat completion's verdicts, in every form in which they reach a client.

Clients drop what they do not know, each another part: so the same verdicts go into a header, the
typed ``moderation`` field, one extension field, and the first delta of a stream.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sidelight.engines.base import Finished, PromptJudged, verdict_failure
from sidelight.probe import Probe
from sidelight.types import Verdict

# Names of a positive class that say nothing: the probe's own name says more.
_BARE_LABELS = frozenset({"1", "true", "yes"})


class Categories(BaseModel):
    """What one or more verdicts say, by category.

    Attributes:
        flagged: Whether any category is.
        categories: Whether each is flagged.
        category_scores: Its probability.
        category_applied_input_types: What was read for it: always text.
    """

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


@dataclass(frozen=True)
class CategoryNames:
    """The category of each probe's labels: only what a loaded probe covers has one.

    Attributes:
        by_probe: For each probe, its categories by label; a binary probe's negative label has none.
    """

    by_probe: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, probes: Sequence[Probe]) -> "CategoryNames":
        """Bare names where they are unique, ``probe/name`` where probes share one."""
        bare = {probe.name: _bare_names(probe) for probe in probes}
        uses = Counter(name for names in bare.values() for name in names.values())
        return cls(
            {
                probe: {
                    label: name if uses[name] == 1 else f"{probe}/{name}"
                    for label, name in names.items()
                }
                for probe, names in bare.items()
            }
        )

    def report(self, verdicts: Sequence[Verdict]) -> Categories:
        """All categories of these verdicts.

        A multi-class verdict is never flagged, so neither are its categories: its label is in the
        scores and in the ``sidelight`` field.
        """
        scores: dict[str, float] = {}
        flags: dict[str, bool] = {}
        for verdict in verdicts:
            for label, category in self.by_probe[verdict.probe].items():
                scores[category] = verdict.probabilities[label]
                flags[category] = verdict.flagged and label in verdict.labels
        return Categories(
            flagged=any(verdict.flagged for verdict in verdicts),
            categories=flags,
            category_scores=scores,
            category_applied_input_types={category: ["text"] for category in scores},
        )


def _bare_names(probe: Probe) -> dict[str, str]:
    labels = probe.task.labels
    if probe.task.kind != "binary":
        return {label: label for label in labels}
    positive = labels[1]
    return {positive: probe.name if positive.lower() in _BARE_LABELS else positive}


HEADER = "x-sidelight-verdicts"
# Proxies refuse answers whose headers pass 4 to 8 KiB in all.
_MAX_HEADER_BYTES = 3072
_HEADER_DIGITS = 6


class Extension(BaseModel):
    """The ``sidelight`` field of an answer: every verdict with all its labels."""

    verdicts: list[dict[str, Any]]


@dataclass(frozen=True)
class SideReport:
    """The verdicts of the probes that are judged at one point.

    Attributes:
        verdicts: Of the chosen probes.
        failed: The chosen probes that gave none.
        too_long: Those of the failed that may not judge so long a text.
    """

    verdicts: tuple[Verdict, ...] = ()
    failed: tuple[str, ...] = ()
    too_long: tuple[str, ...] = ()

    @property
    def failure(self) -> str:
        """Why verdicts are missing."""
        other = [name for name in self.failed if name not in self.too_long]
        reasons = [str(verdict_failure(other))] if other else []
        if self.too_long:
            reasons.append(
                f"No verdict from {', '.join(self.too_long)}: the text is longer than the policy "
                "lets them judge. Treat the text as not judged."
            )
        return " ".join(reasons)


@dataclass(frozen=True)
class Reporter:
    """Writes reports on the chosen probes.

    Attributes:
        model: The served model's name.
        probes: The chosen probes.
        names: Categories of all loaded probes.
    """

    model: str
    probes: Sequence[Probe]
    names: CategoryNames

    def side(self, event: PromptJudged | Finished) -> SideReport:
        """What the event says of the chosen probes."""
        chosen = {probe.name for probe in self.probes}
        return SideReport(
            tuple(verdict for verdict in event.verdicts if verdict.probe in chosen),
            tuple(name for name in event.failed if name in chosen),
            tuple(name for name in event.too_long if name in chosen),
        )

    def required(self, event: PromptJudged, *, has_response: bool) -> tuple[Verdict, ...]:
        """The verdicts of the chosen probes.

        Args:
            event: What was said of the text.
            has_response: Whether the probes that read a response had one.

        Raises:
            VerdictError: One of them gave none.
        """
        side = self.side(event)
        told = {verdict.probe for verdict in side.verdicts}
        # One that was unloaded since the request began has said nothing, and is not among the
        # failed.
        silent = [
            probe.name
            for probe in self.probes
            if probe.name not in told and (has_response or not probe.reads.includes_response)
        ]
        if silent:
            raise verdict_failure(silent)
        return side.verdicts

    @property
    def reads_response(self) -> bool:
        """Whether a chosen probe has to wait for the response."""
        return any(probe.reads.includes_response for probe in self.probes)

    def moderation(self, prompt: SideReport, response: SideReport | None) -> dict[str, Any]:
        """The ``moderation`` field; ``response`` is None while the text is being written."""
        pending = _error("pending", "The response is still being written.")
        output = pending if response is None and self.reads_response else None
        return {
            "input": self._moderated(prompt, "No chosen probe reads the prompt alone."),
            "output": output
            or self._moderated(response or SideReport(), "No chosen probe reads the response."),
        }

    def _moderated(self, side: SideReport, not_run: str) -> dict[str, Any]:
        if side.failed:
            return _error("verdict_failed", side.failure)
        if not side.verdicts:
            return _error("not_run", not_run)
        results = [
            {
                "type": "moderation_result",
                "model": verdict.probe,
                **self.names.report([verdict]).model_dump(),
            }
            for verdict in side.verdicts
        ]
        return {"type": "moderation_results", "model": self.model, "results": results}


def joined(sides: Sequence[SideReport]) -> SideReport:
    """Several texts' verdicts, one text after the other."""
    return SideReport(
        tuple(verdict for side in sides for verdict in side.verdicts),
        tuple(dict.fromkeys(name for side in sides for name in side.failed)),
        tuple(dict.fromkeys(name for side in sides for name in side.too_long)),
    )


def extension(*sides: SideReport) -> dict[str, Any]:
    """The ``sidelight`` field: every verdict, and an entry with ``error`` for a failed one."""
    verdicts = [verdict_json(verdict) for side in sides for verdict in side.verdicts]
    failures = [_failure_json(name) for side in sides for name in side.failed]
    return {"verdicts": [*verdicts, *failures]}


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """One verdict; ``labels`` are those that hold, for a multi-label probe none to all."""
    return {
        "probe": verdict.probe,
        "label": verdict.label,
        "labels": list(verdict.labels),
        "probabilities": verdict.probabilities,
        "flagged": verdict.flagged,
    }


def header(*sides: SideReport) -> Mapping[str, str]:
    """The verdicts as an HTTP header: compact ASCII JSON.

    Probabilities are rounded; where they would make the header too long for proxies, only probe,
    label and flag are left, and where even these do, one entry with ``error``.
    """
    full = [_rounded(verdict) for side in sides for verdict in side.verdicts]
    short = [{k: v for k, v in entry.items() if k != "probabilities"} for entry in full]
    failures = [_failure_json(name) for side in sides for name in side.failed]
    too_long = [{"error": "too_long"}]
    texts = [_compact(entries) for entries in (full + failures, short + failures, too_long)]
    fitting = next(text for text in texts if len(text) <= _MAX_HEADER_BYTES or text == texts[-1])
    return {HEADER: fitting}


def _rounded(verdict: Verdict) -> dict[str, Any]:
    rounded = {k: round(p, _HEADER_DIGITS) for k, p in verdict.probabilities.items()}
    return {
        "probe": verdict.probe,
        "label": verdict.label,
        "probabilities": rounded,
        "flagged": verdict.flagged,
    }


def _compact(entries: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(entries, ensure_ascii=True, separators=(",", ":"))


def _failure_json(probe: str) -> dict[str, Any]:
    return {"probe": probe, "error": "verdict_failed"}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": message}
