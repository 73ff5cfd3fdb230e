"""Decisions as clients and gateways see them.

Each client drops other fields that it does not know, so the same verdicts go into a header, the
typed ``moderation`` field, an extension field, and the first delta of a stream.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, Field

from sidelight.engines.base import verdict_failure
from sidelight.explanation import Explanation
from sidelight.policy.decisions import Decision, LabelsOnly
from sidelight.policy.enforcement import Running
from sidelight.policy.rules import BoundRule
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


# Why, for each verdict, in the order of the verdicts; only if the request asks.
Explanations = Annotated[
    list[dict[str, Any]] | None, Field(exclude_if=lambda explanations: explanations is None)
]


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
        sees_all: Whether it sees what rules do not disclose.
        explains: Whether it asks why the probes say so; ``matrix``: by token and layer.
    """

    model: str
    probes: Sequence[Probe]
    names: CategoryNames
    sees_all: bool = False
    explains: Literal["matrix"] | bool = False

    @property
    def reads_response(self) -> bool:
        """Whether a chosen probe has to wait for the response."""
        return any(probe.reads.includes_response for probe in self.probes)

    def chosen(self, decisions: Iterable[Decision]) -> list[Decision]:
        """Only those of the chosen probes, whether or not the client sees them."""
        names = {probe.name for probe in self.probes}
        return [decision for decision in decisions if decision.rule.name in names]

    def shown(self, decisions: Iterable[Decision]) -> list[Decision]:
        """What the client sees of those of the chosen probes."""
        return disclosed(self.chosen(decisions), sees_all=self.sees_all)

    def extension(self, decisions: Iterable[Decision]) -> dict[str, Any]:
        """The ``sidelight`` field: every verdict, and an entry with ``error`` for a failed one."""
        shown = self.shown(decisions)
        verdicts = [verdict_json(d.verdict) for d in shown if d.verdict is not None]
        failed = dict.fromkeys(d.rule.name for d in shown if d.verdict is None)
        return {"verdicts": [*verdicts, *map(_failure_json, failed)]}

    def running(self, index: int, running: Running) -> dict[str, Any]:
        """The ``sidelight`` field while text ``index`` is written: verdicts with scores alone.

        A label would tell ordinary keys more of what blocks them than the cut does.
        """
        shown = [d.verdict for d in self.shown(running.decisions) if d.verdict is not None]
        verdicts = [verdict_json(v) for v in shown if not isinstance(v, LabelsOnly)]
        return {"running": {"index": index, "tokens": running.tokens, "verdicts": verdicts}}

    def explained(self, rules: Iterable[BoundRule]) -> list[str] | None:
        """The chosen probes whose verdicts the client may have explained; None: it does not ask."""
        if not self.explains:
            return None
        chosen = {probe.name for probe in self.probes}
        return [b.name for b in rules if b.name in chosen and (self.sees_all or b.explains)]

    def explanations(
        self, decisions: Iterable[Decision], found: Iterable[Explanation]
    ) -> list[dict[str, Any]] | None:
        """For each verdict on one text that the client sees, why, or why it is not told."""
        if not self.explains:
            return None
        known = {explanation.verdict.probe: explanation for explanation in found}
        return [
            known[d.rule.name].to_dict(matrix=self.explains == "matrix")
            if d.rule.name in known
            else {"probe": d.rule.name, "error": "not_disclosed"}
            for d in self.shown(decisions)
            if d.verdict is not None
        ]

    def headers(self, decisions: Sequence[Decision]) -> dict[str, str]:
        """The headers of an answer: verdicts, and marks for a gateway."""
        marked = disclosed(decisions, sees_all=self.sees_all)
        return {**_verdict_header(self.shown(decisions)), **_marks(marked)}

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

    def require_all(self, decisions: Iterable[Decision], *, has_response: bool) -> None:
        """Checks that the chosen probes judged one text, with or without a response.

        Raises:
            VerdictError: A probe that can judge it gave no verdict.
        """
        judges = {d.rule.name for d in self.chosen(decisions) if d.verdict is not None}
        # A probe that was unloaded since the request began is in no decision.
        silent = [
            probe.name
            for probe in self.probes
            if probe.name not in judges and (has_response or not probe.reads.includes_response)
        ]
        if silent:
            raise verdict_failure(silent)

    def _moderated(self, decisions: Iterable[Decision], not_run: str) -> dict[str, Any]:
        chosen = self.chosen(decisions)
        shown = disclosed(chosen, sees_all=self.sees_all)
        failed = [decision for decision in shown if decision.verdict is None]
        if failed:
            return _error("verdict_failed", _failure(failed))
        if not chosen:
            return _error("not_run", not_run)
        if not shown:
            return _error("not_disclosed", "The server's policy does not disclose these verdicts.")
        results = [
            {
                "type": "moderation_result",
                "model": decision.verdict.probe,
                **categories([decision.verdict], self.names),
            }
            for decision in shown
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


def disclosed(decisions: Iterable[Decision], *, sees_all: bool) -> list[Decision]:
    """What a client sees of decisions; ``sees_all`` of one that has an admin key."""
    if sees_all:
        return list(decisions)
    return [shown for d in decisions if (shown := d.disclosed()) is not None]


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """One verdict; ``labels`` are those that hold, for a multi-label probe none to all.

    ``turn`` is there if one turn of several has decided.
    """
    has_scores = not isinstance(verdict, LabelsOnly)
    fields = {
        "probe": verdict.probe,
        "label": verdict.label,
        "labels": list(verdict.labels),
        **({"probabilities": verdict.probabilities} if has_scores else {}),
        "flagged": verdict.flagged,
    }
    return fields if verdict.turn is None else {**fields, "turn": verdict.turn}


def refusal_headers(decisions: Sequence[Decision], *, sees_all: bool) -> dict[str, str]:
    """The headers of a refused prompt: every verdict but those of shadows, and the marks."""
    visible = [decision for decision in decisions if not decision.rule.is_shadow]
    shown = disclosed(visible, sees_all=sees_all)
    return {**_verdict_header(shown), **_marks(shown)}


def _verdict_header(decisions: Sequence[Decision]) -> dict[str, str]:
    """Compact ASCII JSON.

    Probabilities are rounded. If the header would be too long for proxies, only probe, label and
    flag are left; if it still is, one entry with ``error``.
    """
    verdicts = [d.verdict for d in decisions if d.verdict is not None]
    short = [{"probe": v.probe, "label": v.label, "flagged": v.flagged} for v in verdicts]
    full = [
        entry
        if isinstance(v, LabelsOnly)
        else {
            **entry,
            "probabilities": {k: round(p, _HEADER_DIGITS) for k, p in v.probabilities.items()},
        }
        for v, entry in zip(verdicts, short, strict=True)
    ]
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
