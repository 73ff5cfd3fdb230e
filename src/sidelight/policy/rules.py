"""The rules of a policy, from an operator's TOML file: what follows from each probe's verdicts."""

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from sidelight.errors import SidelightError, did_you_mean
from sidelight.judges.settings import JUDGE_THRESHOLD, JudgeSettings, judges_from
from sidelight.models.invisible import Invisible
from sidelight.policy.ignoring import Ignore, split
from sidelight.types import Span, Verdict

if TYPE_CHECKING:
    from sidelight.probes.card import ProbeCard
    from sidelight.probes.probe import Probe

Side = Literal["input", "output"]
Mode = Literal["score", "flag", "route", "redact", "block", "shadow"]
Action = Literal["none", "flag", "route", "redact", "block", "fail_closed", "fail_open", "shadow"]
Disclosure = Literal["scores", "labels"]

# What a rule's routes call a verdict that could not be computed.
FAILED_LABEL = "verdict_failed"

FLAGGED_HEADER = "x-sidelight-flagged"
ROUTE_HEADER = "x-sidelight-route"
# What the log says of a probe and a side; other actions are not logged.
LOGGED: Mapping[Action, str] = {
    "block": "Probe '%s' blocked the %s.",
    "fail_closed": "Probe '%s' gave no verdict on the %s: blocked.",
    "fail_open": "Probe '%s' gave no verdict on the %s: let through, as its rule says.",
}

# The limits hold for files only; pydantic reads the annotations in `read_policy`.
_Probability = Annotated[float, Field(ge=0, le=1, strict=True)]
_Count = Annotated[int, Field(ge=0, strict=True)]
_Positive = Annotated[int, Field(ge=1, strict=True)]
_Share = Annotated[float, Field(ge=0, lt=1, strict=True)]


@dataclass(frozen=True)
class Defer:
    """A judge that decides about the texts of which the probe of a rule is unsure.

    Attributes:
        judge: Its name in the policy.
        share: Share of background traffic that is deferred, beside what the probe flags; 0: only
            that.
        judge_every: Output only: fewest tokens of a text between two questions.
    """

    judge: str
    share: _Share = 0.05
    judge_every: _Positive = 32


@dataclass(frozen=True)
class Rule:
    """The consequence of one probe's verdict.

    Attributes:
        mode: ``score``: nothing. ``flag``: a mark for the gateway. ``route``: a name for the
            gateway. ``redact``: labelled words are replaced. ``block``: no answer, or no more of
            it. ``shadow``: counted, never shown.
        threshold: Probability from which a label counts; None: the artifact's own.
        labels: The labels that count; empty: the positive one, or all of a multi-label probe.
        on_failure: Whether a blocking or redacting rule blocks a text without a verdict. With
            ``probe``, the probe's verdict counts if the judge gives none.
        defer: Who decides where the probe is unsure; None: the probe.
        max_tokens: Length of the longest text that the probe classifies; None means any length.
        ignore: Spans that do not count; None: all count.
        turns: Input only: ``tool``: nothing follows from turns of other roles.
        routes: Input only: route by label; empty: a flagged label is its own route.
        shadow_of: The probe that a shadow is compared with.
        consecutive: Output only: tokens in a row that have to count before the text is cut.
        warm_up: Output only: first tokens that never count.
        hold_back: Output only: number of classified tokens to hold back; None means
            ``consecutive``, so that the streak that cuts the text is never sent.
        disclose: What answers tell keys without the admin role; None: ``labels`` if the rule
            blocks or redacts answers, otherwise ``scores``.
    """

    mode: Mode = "score"
    threshold: _Probability | None = None
    labels: tuple[str, ...] = ()
    on_failure: Literal["block", "pass", "probe"] = "block"
    max_tokens: _Positive | None = None
    ignore: Ignore | None = None
    turns: Literal["all", "tool"] = "all"
    routes: Mapping[str, str] = field(default_factory=dict)
    shadow_of: str | None = None
    consecutive: _Positive = 2
    warm_up: _Count = 0
    hold_back: _Count | None = None
    disclose: Disclosure | None = None
    defer: Defer | None = None


@dataclass(frozen=True)
class Policy:
    """The rules of one server. Probes without a rule are scored.

    Attributes:
        input: By name of a probe that reads the prompt.
        output: By name of a probe that reads the response.
        system_turns: Whether a conversation may begin with turns that no probe reads, the system's
            or a developer's; None: only if no rule blocks prompts.
        invisible_characters: Whether to strip or refuse them before the model reads a text.
        judges: By name, those that rules may defer to.
    """

    input: Mapping[str, Rule] = field(default_factory=dict)
    output: Mapping[str, Rule] = field(default_factory=dict)
    system_turns: Literal["trust", "refuse"] | None = None
    invisible_characters: Invisible = "off"
    judges: Mapping[str, JudgeSettings] = field(default_factory=dict)

    @property
    def refuses_system_turns(self) -> bool:
        """Whether a conversation that begins with a system or developer turn is refused."""
        if self.system_turns is None:
            return any(rule.mode == "block" for rule in self.input.values())
        return self.system_turns == "refuse"

    def side(self, side: Side) -> Mapping[str, Rule]:
        return self.input if side == "input" else self.output


@dataclass(frozen=True)
class BoundRule:
    """A rule and the loaded probe that it applies to; ``judge`` is the one that it defers to."""

    probe: "Probe"
    rule: Rule
    judge: JudgeSettings | None = None

    @property
    def name(self) -> str:
        return self.probe.name

    @property
    def side(self) -> Side:
        return side_of(self.probe.card)

    @property
    def mode(self) -> Mode:
        return self.rule.mode

    @property
    def shadow_of(self) -> str | None:
        return self.rule.shadow_of

    @property
    def is_blocking(self) -> bool:
        """Whether a flag ends the answer."""
        return self.mode == "block"

    @property
    def is_redacting(self) -> bool:
        """Whether labelled words of the answer are replaced. A prompt is read as it is."""
        return self.mode == "redact" and self.side == "output"

    @property
    def is_enforced(self) -> bool:
        """Whether text must not pass before it is classified."""
        return self.is_blocking or self.is_redacting

    @property
    def fails_closed(self) -> bool:
        """Whether a missing verdict ends the answer."""
        return self.is_enforced and self.rule.on_failure != "pass"

    @property
    def is_shadow(self) -> bool:
        """Whether clients never see it."""
        return self.mode == "shadow"

    def discloses_scores(self, *, is_admin: bool = False) -> bool:
        """Whether a client sees the scores of its verdicts; ``is_admin``: it has an admin key.

        A client that sees the scores of what blocks it can search for a text that passes.
        """
        default: Disclosure = "labels" if self.is_enforced else "scores"
        is_visible = is_admin or (self.rule.disclose or default) == "scores"
        return is_visible and not self.is_shadow

    @property
    def explains(self) -> bool:
        """Whether keys without the admin role may have its verdicts explained.

        A client that sees which words block it needs few attempts to find others.
        """
        return self.discloses_scores() and not self.is_enforced

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Probability from which each label counts; labels that never count are absent.

        The labels of a multi-class probe count only if the rule names them, with a threshold.
        """
        threshold = self.rule.threshold
        if self.probe.task.kind == "multiclass":
            return {} if threshold is None else dict.fromkeys(self.rule.labels, threshold)
        return {
            label: stored if threshold is None else threshold
            for label, stored in self.probe.card.label_thresholds.items()
            if not self.rule.labels or label in self.rule.labels
        }

    @cached_property
    def defer_threshold(self) -> float:
        """The probability from which a text is deferred; infinite if none is.

        The lower of the rule's own threshold and the one that the share of background traffic
        exceeds.
        """
        if self.rule.defer is None:
            return math.inf
        ((label, threshold),) = self.thresholds.items()
        share = self.rule.defer.share
        if not share or not len(self.probe.card.background):
            return threshold
        return min(threshold, self.probe.share_threshold(label, share))

    def defers(self, verdict: Verdict) -> bool:
        """Whether the judge decides about a text, by the probe's verdict on it."""
        if self.rule.defer is None:
            return False
        (label,) = self.thresholds
        return verdict.flagged or verdict.probabilities[label] >= self.defer_threshold

    def agrees(self, scored: Verdict, probability: float) -> bool:
        """Whether a deferred text is flagged: by the fit on the probe's card, or the judge alone.

        Args:
            scored: The probe's verdict.
            probability: The judge's.
        """
        fit = self.probe.card.judge_fit
        if fit is None:
            return probability >= JUDGE_THRESHOLD
        assert self.judge is not None, "only rules that defer have answers"
        assert fit.judge == self.judge.digest, "policies with another judge are refused"
        (label,) = self.thresholds
        return fit.flags(scored.probabilities[label], probability)

    def is_too_long(self, tokens: int) -> bool:
        return self.rule.max_tokens is not None and tokens > self.rule.max_tokens

    def decide(self, verdict: Verdict) -> Verdict:
        """The verdict at the rule's thresholds instead of the probe's own; clients see this one."""
        scores, spans, thresholds = verdict.probabilities, verdict.known_spans, self.thresholds
        annotated = verdict.labels
        ignored: list[Span] = []
        if self.rule.ignore is not None:
            spans, ignored = split(spans, self.rule.ignore)
            # What the text has of such a label are the ignored words.
            ignored_labels = {span.label for span in ignored} - {span.label for span in spans}
            thresholds = {
                name: least for name, least in thresholds.items() if name not in ignored_labels
            }
        if self.rule.threshold is not None:
            annotated = ()
            spans = [span for span in spans if scores[span.label] >= self.rule.threshold]
        decided = self.probe.task.decide(
            self.name,
            scores,
            thresholds,
            None if verdict.spans is None else spans,
            annotated,
            turn=verdict.turn,
            version=verdict.version,
        )
        return replace(decided, ignored=tuple(ignored)) if ignored else decided

    def action(self, verdict: Verdict | None) -> Action:
        """What follows from a verdict at the rule's thresholds; None: there is none."""
        if verdict is None:
            failure: Action = "fail_closed" if self.fails_closed else "fail_open"
            return failure if self.is_enforced else "none"
        match self.mode:
            case "score":
                return "none"
            case "route":
                return "none" if self._route(verdict) is None else "route"
            case "redact":
                return "redact" if verdict.spans else "none"
            case "flag" | "block" | "shadow" as mode:
                return mode if verdict.flagged else "none"

    def headers(self, verdict: Verdict | None) -> Sequence[tuple[str, str]]:
        """The headers that tell a gateway of a verdict, each with a name: a probe, or a route."""
        match self.mode:
            case "flag" | "redact" | "block":
                return [(FLAGGED_HEADER, self.name)] if verdict and verdict.flagged else []
            case "route":
                route = self._route(verdict)
                return [] if route is None else [(ROUTE_HEADER, route)]
            case "score" | "shadow":
                return []

    def _route(self, verdict: Verdict | None) -> str | None:
        routes = self.rule.routes
        if verdict is None:
            return routes.get(FAILED_LABEL, FAILED_LABEL)
        if routes:
            return next((routes[label] for label in verdict.labels if label in routes), None)
        named = self.probe.task.output_labels
        return next((label for label in verdict.labels if label in named), None)


def side_of(card: "ProbeCard") -> Side:
    """The side that a probe classifies: the response, if it reads any of it."""
    return "output" if card.reads.includes_response else "input"


def bound_rules(policy: Policy, probes: "Iterable[Probe]") -> tuple[BoundRule, ...]:
    """Each probe with its rule; a rule without its probe waits for it."""
    bound: list[BoundRule] = []
    for probe in probes:
        rule = policy.side(side_of(probe.card)).get(probe.name, Rule())
        judge = policy.judges.get(rule.defer.judge) if rule.defer else None
        bound.append(BoundRule(probe, rule, judge))
    return tuple(bound)


def require_policy_applies(policy: Policy, probes: "Sequence[Probe]") -> None:
    """Refuses a rule without its probe, or one that cannot apply to it."""
    sides: tuple[Side, ...] = ("input", "output")
    for side in sides:
        known = [probe.name for probe in probes if side_of(probe.card) == side]
        for name in policy.side(side):
            if name not in known:
                wrong_side = [probe.name for probe in probes if side_of(probe.card) != side]
                table = f"{'input' if side == 'output' else 'output'}.{name}"
                remedy = (
                    f" It reads the other side: write [{table}], or train it on the {side}."
                    if name in wrong_side
                    else did_you_mean(name, known)
                )
                raise SidelightError(
                    f"The policy has a rule for the {side}, but no probe '{name}' "
                    f"classifies it.{remedy}"
                )
    for bound in bound_rules(policy, probes):
        require_rule_applies(bound, probes)


def require_rule_applies(bound: BoundRule, probes: "Iterable[Probe]") -> None:
    """Refuses a rule that could never do what it says for this probe."""
    _require_labels(bound)
    if bound.probe.spans is None:
        _require_text_rule(bound)
    reads, form, kind = bound.probe.reads, bound.probe.card.prompt_format, bound.probe.task.kind
    uses_template = bound.probe.uses_template
    is_known = bound.side == "input" and uses_template and bound.probe.classifies_turns
    if bound.rule.turns == "tool" and not is_known:
        remedy = (
            "train one on one label"
            if uses_template
            else "train one on a model with a chat template (--tokenizer, if its file lacks one)"
        )
        raise SidelightError(
            f"Probe '{bound.name}' cannot have turns = \"tool\", which takes one that classifies "
            f"each turn of a chat's prompt, got task {kind}, side {reads.side}, format {form}, "
            f"scope {reads.scope}. Leave 'turns' out, or {remedy}."
        )
    if bound.rule.defer is not None:
        _require_deferrable(bound, bound.rule.defer)
    if bound.mode == "route" and bound.side == "output":
        raise SidelightError(
            f"Probe '{bound.name}' classifies the response, which is too late for a route. Use "
            "another mode."
        )
    rivals = [p.name for p in probes if side_of(p.card) == bound.side and p.name != bound.name]
    rival = bound.shadow_of
    if rival is not None and (not bound.is_shadow or rival not in rivals):
        raise SidelightError(
            f"Probe '{bound.name}' cannot be the shadow of '{rival}': its mode must be 'shadow', "
            f"and both must classify the {bound.side}.{did_you_mean(rival, rivals)}"
        )


def _require_labels(bound: BoundRule) -> None:
    """Refuses labels that the probe lacks, and a rule that has no label to count."""
    labels = bound.probe.task.labels
    for named, known in ((bound.rule.labels, labels), (bound.rule.routes, (*labels, FAILED_LABEL))):
        for label in named:
            if label not in known:
                raise SidelightError(
                    f"The rule of probe '{bound.name}' names label '{label}', which the probe does "
                    f"not have.{did_you_mean(label, known)}"
                )
    if bound.mode not in ("score", "route", "redact", "shadow") and not bound.thresholds:
        why = "is multi-class, so it flags no label by default. Set 'labels' and 'threshold'."
        if bound.probe.task.kind != "multiclass":
            flagged = ", ".join(bound.probe.card.label_thresholds)
            why = f"flags only {flagged}, which is not in the rule's 'labels'. Name it there."
        raise SidelightError(
            f"Rule '{bound.mode}' of probe '{bound.name}' would never apply: the probe {why}"
        )


def _require_text_rule(bound: BoundRule) -> None:
    """Refuses what would apply only to spans, which the probe does not label."""
    settings = (
        (bound.mode == "redact", "rule 'redact'", "use another mode"),
        (bound.rule.ignore is not None, "'ignore'", "leave 'ignore' out"),
    )
    for is_set, setting, remedy in settings:
        if is_set:
            raise SidelightError(
                f"Probe '{bound.name}' labels no spans, so {setting} would never apply. Train one "
                f"that does (sidelight train --spans COLUMN), or {remedy}."
            )


def _require_deferrable(bound: BoundRule, defer: Defer) -> None:
    """Refuses to defer where one answer, yes or no, could not decide."""
    if bound.judge is None:
        raise SidelightError(
            f"The rule of probe '{bound.name}' defers to judge '{defer.judge}', which the policy "
            f"does not have. Write a table [judges.{defer.judge}]."
        )
    where = "" if bound.probe.spans is None else " in spans"
    if where or len(bound.thresholds) != 1:
        counted = ", ".join(bound.thresholds) or "none"
        raise SidelightError(
            f"The rule of probe '{bound.name}' cannot defer: a judge says whether one label holds, "
            f"and the rule counts {counted}{where}. Name one in 'labels', or leave 'defer' out."
        )
    if defer.share and not len(bound.probe.card.background):
        raise SidelightError(
            f"Probe '{bound.name}' has no record of background traffic, so nothing says which "
            f"texts are {defer.share:g} of it. Recalibrate it with --background, or set "
            "defer.share = 0, which defers only what the probe flags."
        )
    fit, judge = bound.probe.card.judge_fit, bound.judge
    if fit is not None and fit.judge != judge.digest:
        raise SidelightError(
            f"Probe '{bound.name}' was fitted to judge {fit.model} ({fit.judge}), but the policy "
            f"defers to '{defer.judge}', which is {judge.model} ({judge.digest}): another model, "
            "profile or criterion. Fit it to this judge (sidelight eval --judge), or serve the "
            "probe without a fit, whose judge decides alone."
        )


_KEYS = {key.name for key in fields(Rule)}
_IGNORE_KEYS = {key.name for key in fields(Ignore)}
_DEFER_KEYS = {key.name for key in fields(Defer)}
_CUTTING = {"consecutive", "warm_up", "hold_back"}
_RULE_KEYS = {"input": _KEYS - _CUTTING, "output": _KEYS - {"routes", "turns"}}
# Words are labelled by the thresholds that training chose for them.
_REDACT_KEYS = _KEYS - _CUTTING - {"routes", "threshold", "shadow_of", "turns", "defer"}


def read_policy(path: Path) -> Policy:
    """The policy in a TOML file. Every key is checked: an ignored safety setting is a hole.

    Raises:
        SidelightError: The file is unreadable or not TOML, a key is unknown, or a value is wrong.
    """
    try:
        # Notepad begins UTF-8 with a byte order mark.
        table = tomllib.loads(path.read_text("utf-8-sig"))
        _require_known_keys(path, table)
        if "judges" in table:
            table["judges"] = judges_from(table["judges"], path.parent, str(path))
        policy = TypeAdapter(Policy).validate_python(table)
        policy = replace(
            policy,
            input=_with_ignored(policy.input, path.parent),
            output=_with_ignored(policy.output, path.parent),
        )
    except (OSError, UnicodeDecodeError) as error:
        raise SidelightError(f"Cannot read {path}: {error}. Name a TOML file in UTF-8.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SidelightError(
            f"{path} is not TOML: {error}. Write texts in quotes, table names in brackets, and "
            "each key of a table once."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        table_problem = f"Input should be a table, [{place}]"
        # pydantic names Python's types.
        problem = {
            "tuple_type": 'Input should be a list of texts, such as ["toxic"]',
            "dict_type": table_problem,
            "dataclass_type": table_problem,
        }.get(first["type"], first["msg"])
        raise SidelightError(f"{place} in {path}: {problem}, got {first['input']!r}.") from error
    _require_judges(path, policy)
    return policy


def _require_judges(path: Path, policy: Policy) -> None:
    """Refuses rules that defer where they cannot, whatever their probe is."""
    rules = {f"input.{name}": rule for name, rule in policy.input.items()}
    rules |= {f"output.{name}": rule for name, rule in policy.output.items()}
    for name, rule in rules.items():
        place = f"{name} in {path}"
        if rule.defer is None:
            if rule.on_failure == "probe":
                raise SidelightError(
                    f'{place}: on_failure = "probe" is for rules that defer to a judge. Write '
                    'defer = { judge = "NAME" }, or another on_failure.'
                )
            continue
        if rule.mode == "score":
            raise SidelightError(
                f"{place}: mode 'score' does nothing, so there is nothing to defer. Leave 'defer' "
                "out, or use another mode."
            )
        if rule.defer.judge not in policy.judges:
            raise SidelightError(
                f"{place}: there is no judge '{rule.defer.judge}'."
                f"{did_you_mean(rule.defer.judge, policy.judges)} Each has a table, [judges.NAME]."
            )


def _with_ignored(rules: Mapping[str, Rule], folder: Path) -> dict[str, Rule]:
    """The rules with the words of the files that they ignore."""
    return {
        name: rule if rule.ignore is None else replace(rule, ignore=rule.ignore.read(folder))
        for name, rule in rules.items()
    }


def _require_known_keys(path: Path, table: Mapping[str, Any]) -> None:
    tables: list[tuple[str, Any, set[str]]] = [("", table, {key.name for key in fields(Policy)})]
    for side, keys in _RULE_KEYS.items():
        rules = table.get(side)
        # What is no table is refused by its type.
        for name, rule in rules.items() if isinstance(rules, dict) else ():
            if isinstance(rule, dict):
                redacts = rule.get("mode") == "redact"
                tables.append((f"{side}.{name}.", rule, _REDACT_KEYS if redacts else keys))
                if isinstance(ignore := rule.get("ignore"), dict):
                    tables.append((f"{side}.{name}.ignore.", ignore, _IGNORE_KEYS))
                if isinstance(defer := rule.get("defer"), dict):
                    defer_keys = _DEFER_KEYS - ({"judge_every"} if side == "input" else set())
                    tables.append((f"{side}.{name}.defer.", defer, defer_keys))
    for place, keys_of, known in tables:
        for key in keys_of:
            if key not in known:
                is_known = key in _KEYS | _DEFER_KEYS
                what = "a key that cannot hold there" if is_known else "an unknown key"
                raise SidelightError(f"{path} has {what}: {place}{key}.{did_you_mean(key, known)}")
