"""Decisions as clients and gateways see them.

Each client drops other fields that it does not know, so the same verdicts go into a header, the
typed ``moderation`` field, an extension field, and the first delta of a stream.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from sidelight.engines.base import verdict_failure
from sidelight.policy.decisions import Decision
from sidelight.probe import Probe
from sidelight.types import Verdict

VERDICTS_HEADER = "x-sidelight-verdicts"
FLAGGED_HEADER = "x-sidelight-flagged"
ROUTE_HEADER = "x-sidelight-route"
# Proxies refuse answers whose headers pass 4 to 8 KiB in all.
_MAX_HEADER_BYTES = 3072
_HEADER_DIGITS = 6
# Names of a positive class that say less than the probe's own name.
_BARE_LABELS = frozenset({"1", "true", "yes"})

# For each probe, its categories by label; a binary probe's negative label has none.
CategoryNames = Mapping[str, Mapping[str, str]]


class Extension(BaseModel):
    """The ``sidelight`` field of an answer: every verdict with all its labels."""

    verdicts: list[dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """What a client sees of the verdicts of the probes that it chose.

    Attributes:
        model: The served model's name.
        probes: The chosen probes.
        names: Categories of all probes that clients see.
    """

    model: str
    probes: Sequence[Probe]
    names: CategoryNames

    @property
    def reads_response(self) -> bool:
        """Whether a chosen probe has to wait for the response."""
        return any(probe.reads.includes_response for probe in self.probes)

    def chosen(self, decisions: Iterable[Decision]) -> list[Decision]:
        """Only those of the chosen probes."""
        names = {probe.name for probe in self.probes}
        return [decision for decision in decisions if decision.rule.name in names]

    def extension(self, decisions: Iterable[Decision]) -> dict[str, Any]:
        """The ``sidelight`` field: every verdict, and an entry with ``error`` for a failed one."""
        chosen = self.chosen(decisions)
        verdicts = [verdict_json(d.verdict) for d in chosen if d.verdict is not None]
        failed = dict.fromkeys(d.rule.name for d in chosen if d.verdict is None)
        return {"verdicts": [*verdicts, *map(_failure_json, failed)]}

    def headers(self, decisions: Sequence[Decision]) -> dict[str, str]:
        """The headers of an answer: verdicts, and marks for a gateway."""
        return {**_verdict_header(self.chosen(decisions)), **_marks(decisions)}

    def moderation(
        self, prompt: Iterable[Decision], response: Iterable[Decision] | None
    ) -> dict[str, Any]:
        """The ``moderation`` field; ``response`` is None while the text is being written."""
        if response is None and self.reads_response:
            output = _error("pending", "The response is still being written.")
        else:
            output = self._moderated(response or (), "No chosen probe reads the response.")
        return {
            "input": self._moderated(prompt, "No chosen probe reads the prompt alone."),
            "output": output,
        }

    def required(self, decisions: Iterable[Decision], *, has_response: bool) -> list[Verdict]:
        """The verdicts of the chosen probes on one text, with or without a response.

        Raises:
            VerdictError: A probe that can judge it gave none.
        """
        verdicts = [d.verdict for d in self.chosen(decisions) if d.verdict is not None]
        judges = {verdict.probe for verdict in verdicts}
        # A probe that was unloaded since the request began is in no decision.
        silent = [
            probe.name
            for probe in self.probes
            if probe.name not in judges and (has_response or not probe.reads.includes_response)
        ]
        if silent:
            raise verdict_failure(silent)
        return verdicts

    def _moderated(self, decisions: Iterable[Decision], not_run: str) -> dict[str, Any]:
        chosen = self.chosen(decisions)
        failed = [decision for decision in chosen if decision.verdict is None]
        if failed:
            return _error("verdict_failed", _failure(failed))
        if not chosen:
            return _error("not_run", not_run)
        results = [
            {
                "type": "moderation_result",
                "model": decision.verdict.probe,
                **categories([decision.verdict], self.names),
            }
            for decision in chosen
            if decision.verdict is not None
        ]
        return {"type": "moderation_results", "model": self.model, "results": results}


def category_names(probes: Sequence[Probe]) -> CategoryNames:
    """Bare names where they are unique, ``probe/name`` where probes share one."""
    bare: dict[str, dict[str, str]] = {}
    for probe in probes:
        labels = probe.task.labels
        own = {label: label for label in labels}
        if probe.task.kind == "binary":
            is_bare = labels[1].lower() in _BARE_LABELS
            own = {labels[1]: probe.name if is_bare else labels[1]}
        bare[probe.name] = own
    uses = Counter(name for names in bare.values() for name in names.values())
    return {
        probe: {
            label: name if uses[name] == 1 else f"{probe}/{name}" for label, name in names.items()
        }
        for probe, names in bare.items()
    }


def categories(verdicts: Sequence[Verdict], names: CategoryNames) -> dict[str, Any]:
    """Whether each category of these verdicts is flagged, its score, and that text was read.

    A multi-class verdict is never flagged, so neither are its categories; its label is in the
    ``sidelight`` field.
    """
    scores: dict[str, float] = {}
    flags: dict[str, bool] = {}
    for verdict in verdicts:
        for label, category in names[verdict.probe].items():
            scores[category] = verdict.probabilities[label]
            flags[category] = verdict.flagged and label in verdict.labels
    return {
        "flagged": any(verdict.flagged for verdict in verdicts),
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": {category: ["text"] for category in scores},
    }


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """One verdict; ``labels`` are those that hold, for a multi-label probe none to all.

    ``turn`` is there if one turn of several has decided.
    """
    fields = {
        "probe": verdict.probe,
        "label": verdict.label,
        "labels": list(verdict.labels),
        "probabilities": verdict.probabilities,
        "flagged": verdict.flagged,
    }
    return fields if verdict.turn is None else {**fields, "turn": verdict.turn}


def refusal_headers(decisions: Sequence[Decision]) -> dict[str, str]:
    """The headers of a refused prompt: every verdict but those of shadows, and the marks."""
    shown = [decision for decision in decisions if not decision.rule.is_shadow]
    return {**_verdict_header(shown), **_marks(decisions)}


def _verdict_header(decisions: Sequence[Decision]) -> dict[str, str]:
    """Compact ASCII JSON.

    Probabilities are rounded. If the header would be too long for proxies, only probe, label and
    flag are left; if it still is, one entry with ``error``.
    """
    verdicts = [d.verdict for d in decisions if d.verdict is not None]
    full = [
        {
            "probe": v.probe,
            "label": v.label,
            "probabilities": {k: round(p, _HEADER_DIGITS) for k, p in v.probabilities.items()},
            "flagged": v.flagged,
        }
        for v in verdicts
    ]
    short = [{k: x for k, x in entry.items() if k != "probabilities"} for entry in full]
    failed = [_failure_json(d.rule.name) for d in decisions if d.verdict is None]
    too_long = [{"error": "too_long"}]
    texts = [
        json.dumps(entries, separators=(",", ":"))
        for entries in (full + failed, short + failed, too_long)
    ]
    fitting = next(text for text in texts if len(text) <= _MAX_HEADER_BYTES or text == texts[-1])
    return {VERDICTS_HEADER: fitting}


def _marks(decisions: Iterable[Decision]) -> dict[str, str]:
    """Headers for a gateway: which probes flagged, and the routes. Shadows are left out."""
    shown = [decision for decision in decisions if not decision.rule.is_shadow]
    flagged = dict.fromkeys(d.rule.name for d in shown if d.is_marked)
    routes = dict.fromkeys(route for d in shown if (route := d.route) is not None)
    # Labels are a user's own words: a comma or a line break must not reach a header.
    return {
        header: ", ".join(quote(name, safe=" /-_.:@") for name in names)
        for header, names in ((FLAGGED_HEADER, flagged), (ROUTE_HEADER, routes))
        if names
    }


def _failure(failed: Sequence[Decision]) -> str:
    too_long = dict.fromkeys(d.rule.name for d in failed if d.is_too_long)
    other = dict.fromkeys(d.rule.name for d in failed if d.rule.name not in too_long)
    reasons = [str(verdict_failure(other))] if other else []
    if too_long:
        reasons.append(
            f"No verdict from {', '.join(too_long)}: the text is longer than the policy lets it "
            "judge. Treat the text as not judged."
        )
    return " ".join(reasons)


def _failure_json(probe: str) -> dict[str, Any]:
    return {"probe": probe, "error": "verdict_failed"}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": message}
