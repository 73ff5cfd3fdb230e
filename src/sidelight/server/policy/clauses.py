"""A loaded probe with the rule that holds for it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sidelight.engines.base import LoadedProbe
from sidelight.errors import SidelightError, did_you_mean
from sidelight.server.policy.rules import FAILED_LABEL, Policy, Rule, Side
from sidelight.streaming_rule import StreamingRule
from sidelight.types import Verdict


@dataclass(frozen=True)
class Clause:
    """One probe and its rule.

    Attributes:
        probe: The loaded probe.
        rule: What follows from its verdict.
        is_tightened: Whether a request wants a flag to block, whatever the rule's mode.
    """

    probe: LoadedProbe
    rule: Rule
    is_tightened: bool = False

    @property
    def name(self) -> str:
        """The probe's."""
        return self.probe.name

    @property
    def side(self) -> Side:
        """What is judged."""
        return side_of(self.probe)

    @property
    def is_blocking(self) -> bool:
        """Whether a flag ends the answer."""
        return self.is_tightened or self.rule.mode == "block"

    @property
    def is_shadow(self) -> bool:
        """Whether clients never hear of it."""
        return self.rule.mode == "shadow"

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Probability from which each label counts; labels that never count are absent.

        A multi-class probe names a class. Its labels count only where the rule names them, with a
        threshold.
        """
        task, own = self.probe.task, self.probe.thresholds
        if task.kind == "multiclass":
            threshold = self.rule.threshold
            return {} if threshold is None else dict.fromkeys(self.rule.labels, threshold)
        counting = task.labels[1:] if task.kind == "binary" else task.labels
        return {
            label: threshold if self.rule.threshold is None else self.rule.threshold
            for label, threshold in zip(counting, own, strict=True)
            if not self.rule.labels or label in self.rule.labels
        }

    def is_too_long(self, tokens: int) -> bool:
        """Whether a text is longer than the probe may judge."""
        return self.rule.max_tokens is not None and tokens > self.rule.max_tokens

    def decide(self, verdict: Verdict) -> Verdict:
        """The verdict at the rule's thresholds."""
        labels = self.probe.task.labels
        scores = verdict.probabilities
        held = tuple(name for name, least in self.thresholds.items() if scores[name] >= least)
        match self.probe.task.kind:
            case "binary":
                label = held[0] if held else labels[0]
                return replace(verdict, label=label, labels=(label,), flagged=bool(held))
            case "multilabel":
                return replace(verdict, labels=held, flagged=bool(held))
            case "multiclass":
                return replace(verdict, labels=held or (verdict.label,), flagged=bool(held))

    def streaming_rules(self) -> dict[str, StreamingRule]:
        """When a running score of each label cuts the text."""
        rule = self.rule
        return {
            label: StreamingRule(threshold, rule.consecutive, rule.warm_up)
            for label, threshold in self.thresholds.items()
        }


def side_of(probe: LoadedProbe) -> Side:
    """What a probe judges: it is the response as soon as it reads some of it."""
    return "input" if probe.reads.side == "prompt" else "output"


def clauses_of(policy: Policy, probes: Iterable[LoadedProbe]) -> tuple[Clause, ...]:
    """Each probe with its rule; rules whose probe is not among them wait for it."""
    return tuple(Clause(p, policy.side(side_of(p)).get(p.name, Rule())) for p in probes)


def require_fitting(policy: Policy, probes: Sequence[LoadedProbe]) -> None:
    """Checks that every rule has its probe, and can hold for it.

    Raises:
        SidelightError: A rule names no such probe, or something that the probe does not have.
    """
    sides: tuple[Side, ...] = ("input", "output")
    for side in sides:
        for name in policy.side(side):
            known = [probe.name for probe in probes if side_of(probe) == side]
            if name not in known:
                raise SidelightError(
                    f"The policy has a rule for the {side}, but no probe '{name}' judges it."
                    f"{did_you_mean(name, known)}"
                )
    for clause in clauses_of(policy, probes):
        require_fitting_probe(clause, probes)


def require_fitting_probe(clause: Clause, probes: Iterable[LoadedProbe]) -> None:
    """Checks that a rule can hold for its probe.

    Raises:
        SidelightError: It cannot, so it would never do what it says.
    """
    _require_known(clause, clause.rule.labels, clause.probe.task.labels)
    _require_known(clause, clause.rule.routes, (*clause.probe.task.labels, FAILED_LABEL))
    if clause.rule.mode in ("flag", "block") and not clause.thresholds:
        raise SidelightError(
            f"Probe '{clause.name}' flags nothing as it is, so its rule '{clause.rule.mode}' would "
            "never hold. Name the 'labels' that count and their 'threshold'."
        )
    if clause.rule.mode == "route" and clause.side == "output":
        raise SidelightError(
            f"Probe '{clause.name}' judges the output: too late for a route. Use another mode."
        )
    if clause.rule.shadow_of is not None:
        _require_rival(clause, clause.rule.shadow_of, probes)


def _require_known(clause: Clause, labels: Iterable[str], known: Sequence[str]) -> None:
    for label in labels:
        if label not in known:
            raise SidelightError(
                f"The rule of probe '{clause.name}' names label '{label}', which it does not have."
                f"{did_you_mean(label, known)}"
            )


def _require_rival(clause: Clause, rival: str, probes: Iterable[LoadedProbe]) -> None:
    known = [p.name for p in probes if side_of(p) == clause.side and p.name != clause.name]
    if clause.rule.mode != "shadow" or rival not in known:
        raise SidelightError(
            f"Probe '{clause.name}' cannot be the shadow of '{rival}': that takes the mode "
            f"'shadow' and a probe that judges the {clause.side}.{did_you_mean(rival, known)}"
        )
