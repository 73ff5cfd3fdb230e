"""The context of a request, and its result as seen by clients and gateways.

Both servers create the ``RequestContext`` before they classify anything, and update a
``RequestResult`` while they respond. The probes that responses report are ``chosen``, and a
``VisibleVerdict`` is what a client sees of a decision. Responses are built from this type alone,
with two exceptions: ``server.chat`` omits running scores that are not disclosed, and
``server.guardrail`` names every probe that flags in LiteLLM's ``blocked_reason``. Clients drop
different unknown fields, so the same verdicts are in a header, the typed ``moderation`` field, and
the ``sidelight`` field.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from urllib.parse import quote

from sidelight.engines.base import verdict_failure
from sidelight.errors import SidelightError, did_you_mean
from sidelight.policy.decisions import Decision, PolicyError
from sidelight.policy.enforcement import Classified, Enforcement, TextObserver
from sidelight.policy.rules import BoundRule, Policy, Side
from sidelight.policy.second_stage import AsksJudges
from sidelight.probes.probe import Probe
from sidelight.types import Verdict

VERDICTS_HEADER = "x-sidelight-verdicts"
# Proxies refuse responses whose headers exceed 4 to 8 KiB in total.
_MAX_HEADER_BYTES = 3072
_HEADER_DIGITS = 6
# Names of a positive class that are less specific than the probe's name.
_TRUTH_LABELS = frozenset({"1", "true", "yes"})

Json = dict[str, Any]
# Categories of each probe by label; a binary probe's negative label has none.
CategoryNames = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class VisibleVerdict:
    """One probe's decision as a client sees it.

    Attributes:
        probe: Name of the probe.
        version: Version of the artifact, as in the audit log, even if the probe gave no verdict.
        verdict: The verdict, reduced by ``labels_only`` if scores are hidden; None if the probe
            gave none.
        has_scores: Whether the verdict's probabilities are the probe's.
        is_too_long: As in the decision.
        headers: Headers of the rule.
        decided_by: Source of the decision, and a judge's opinion; None if not disclosed.
    """

    probe: str
    version: str
    verdict: Verdict | None
    has_scores: bool
    is_too_long: bool
    headers: Sequence[tuple[str, str]]
    decided_by: Json | None = None

    def to_json(self) -> Json:
        """An entry of the ``sidelight`` field.

        ``labels`` are the labels that hold, any number for a multi-label probe. ``turn`` is present
        if one of several turns decided, ``spans`` if the probe labels spans, and ``ignored`` if its
        rule ignores some of them.
        """
        verdict, decided_by = self.verdict, self.decided_by or {}
        if verdict is None:
            failure = {"probe": self.probe, "version": self.version, "error": "verdict_failed"}
            return {**failure, **decided_by}
        return {
            "probe": self.probe,
            "version": self.version,
            "label": verdict.label,
            "labels": list(verdict.labels),
            **({"probabilities": verdict.probabilities} if self.has_scores else {}),
            "flagged": verdict.flagged,
            **({} if verdict.turn is None else {"turn": verdict.turn}),
            **verdict.spans_dict(),
            **decided_by,
        }


def labels_only(verdict: Verdict) -> Verdict:
    """A verdict without its scores: probabilities are 1.0 for labels that hold, otherwise 0.0.

    ``label`` is the first label that holds, or "" if a multi-label probe finds none. There is no
    ``turn``, because the most probable label, or the turn with the highest score, would reveal an
    order of hidden scores. There are no ``spans`` either, because they would show what to change.
    """
    label = verdict.labels[0] if verdict.labels else ""
    indicators = {name: float(name in verdict.labels) for name in verdict.probabilities}
    version = verdict.version
    return Verdict(
        verdict.probe, label, verdict.labels, indicators, verdict.flagged, version=version
    )


@dataclass(frozen=True)
class RequestContext:
    """The context of one request, which does not change while it is served.

    Attributes:
        model: Name of the served model.
        policy: Policy of the server.
        rules: Rules of all loaded probes.
        chosen: Rules of the probes that responses report, in order; none of them is in shadow mode.
        observe: Creates the observer of a text; with ``is_prompt_known``, the decisions on its
            prompt have already been recorded.
        is_admin: Whether the client sees what rules do not disclose.
        judges: Interface to the judges that rules defer to; None if no rule defers.
    """

    model: str
    policy: Policy
    rules: tuple[BoundRule, ...]
    chosen: tuple[BoundRule, ...]
    observe: Callable[..., TextObserver] = field(compare=False)
    is_admin: bool = False
    judges: AsksJudges | None = field(default=None, compare=False)

    def choose(self, names: Sequence[str] | None, *, for_text: bool = False) -> "RequestContext":
        """A copy that reports the probes with these names; None reports all visible probes.

        Args:
            names: Names from the client.
            for_text: Whether text will be generated; if so, probes that may block it are reported
                too.

        Raises:
            PolicyError: There is no such probe.
        """
        visible = {bound.name: bound for bound in self.rules if not bound.is_shadow}
        for name in names or ():
            if name not in visible:
                raise PolicyError(
                    f"Unknown probe '{name}'.{did_you_mean(name, visible)}",
                    code="probe_not_found",
                    param="probes",
                )
        chosen = dict.fromkeys(visible if names is None else names)
        if for_text:
            chosen |= dict.fromkeys(b.name for b in visible.values() if b.is_enforced)
        return replace(self, chosen=tuple(visible[name] for name in chosen))

    def with_enforced(self) -> "RequestContext":
        """A copy that also reports every probe whose rule blocks or redacts."""
        names = {bound.name for bound in self.chosen}
        enforced = (b for b in self.rules if b.mode in ("block", "redact") and b.name not in names)
        return replace(self, chosen=(*self.chosen, *enforced))

    def on(self, side: Side) -> list[BoundRule]:
        """The rules of this side, chosen or not, including those in shadow mode."""
        return [bound for bound in self.rules if bound.side == side]

    @property
    def probes(self) -> list[Probe]:
        return [bound.probe for bound in self.chosen]

    @property
    def reads_response(self) -> bool:
        """Whether a chosen probe has to wait for the response."""
        return any(bound.side == "output" for bound in self.chosen)

    @cached_property
    def categories(self) -> CategoryNames:
        """The categories of all visible probes; a name shared by two of them becomes
        ``probe/name``.
        """
        unprefixed: dict[str, dict[str, str]] = {}
        for bound in self.rules:
            if bound.is_shadow:
                continue
            task = bound.probe.task
            unprefixed[bound.name] = {label: label for label in task.labels}
            if task.kind == "binary":
                positive = task.labels[1]
                says_only_yes = positive.lower() in _TRUTH_LABELS
                unprefixed[bound.name] = {positive: bound.name if says_only_yes else positive}
        uses = Counter(name for names in unprefixed.values() for name in names.values())
        return {
            probe: {
                label: name if uses[name] == 1 else f"{probe}/{name}"
                for label, name in names.items()
            }
            for probe, names in unprefixed.items()
        }

    def of_chosen(self, decisions: Iterable[Decision]) -> list[Decision]:
        """Only those of the chosen probes."""
        names = {bound.name for bound in self.chosen}
        return [decision for decision in decisions if decision.rule.name in names]

    def visible(self, decisions: Iterable[Decision]) -> list[VisibleVerdict]:
        """The decisions of the chosen probes, as the client sees them."""
        return visible_to(self.of_chosen(decisions), is_admin=self.is_admin)

    def entries(self, decisions: Iterable[Decision]) -> list[Json]:
        """The entries of the ``sidelight`` field: verdicts, then the probes that gave none."""
        return _entries(self.visible(decisions))

    def headers(self, decisions: Sequence[Decision]) -> dict[str, str]:
        """The headers of a response: verdicts, and the rules' headers for a gateway."""
        headers = _rule_headers(visible_to(decisions, is_admin=self.is_admin))
        return {**_verdict_header(self.visible(decisions)), **headers}

    def moderation(self, decisions: Iterable[Decision], not_run: str) -> Json:
        """One side of the ``moderation`` field; ``not_run`` if no chosen probe is on that side."""
        visible_verdicts = self.visible(decisions)
        failed = [each for each in visible_verdicts if each.verdict is None]
        if failed:
            return _error("verdict_failed", _failure(failed))
        if not visible_verdicts:
            return _error("not_run", not_run)
        results = [
            {
                "type": "moderation_result",
                "model": each.probe,
                **category_fields([each], self.categories),
            }
            for each in visible_verdicts
        ]
        return {"type": "moderation_results", "model": self.model, "results": results}


class RequestResult:
    """The result of a request so far: the generated texts for each of its prompts.

    Attributes:
        context: Context of the request.
        texts: Texts of each prompt.
        refusal: Reason for a refusal, if any.
        adapter: LoRA adapter that generates its texts; None without one.
    """

    def __init__(self, context: RequestContext):
        self.context = context
        self.texts: list[list[Enforcement]] = []
        self.refusal: SidelightError | None = None
        self.adapter: str | None = None

    def begin(self, texts: int, *, stream_scores: bool = False) -> list[Enforcement]:
        """Add a prompt with this number of texts; its decisions are recorded with the first."""
        context = self.context
        begun = [
            Enforcement(
                context.rules,
                partial(context.observe, is_prompt_known=number > 0),
                stream_scores=stream_scores,
                judges=context.judges,
                invisible=context.policy.invisible_characters,
            )
            for number in range(texts)
        ]
        self.texts.append(begun)
        return begun

    @property
    def is_decided(self) -> bool:
        """Whether each prompt so far is admitted, or one is refused."""
        is_admitted = bool(self.texts) and all(map(_admitted, self.texts))
        return self.refusal is not None or is_admitted

    @property
    def choices(self) -> list[Enforcement]:
        """The texts, in the order of choices."""
        return [text for texts in self.texts for text in texts]

    @property
    def prompts(self) -> list[Classified]:
        """The admitted prompts."""
        return [prompt for texts in self.texts if (prompt := _admitted(texts))]

    @property
    def prompt_decisions(self) -> list[Decision]:
        return [decision for prompt in self.prompts for decision in prompt.decisions]

    @property
    def response_decisions(self) -> list[Decision]:
        return [d for text in self.choices if text.ended for d in text.ended.decisions]

    def headers(self, *, is_stream: bool) -> dict[str, str]:
        """The headers of a response; for a stream, they cover only prompts."""
        response = [] if is_stream else self.response_decisions
        return self.context.headers([*self.prompt_decisions, *response])

    def extension(self) -> Json:
        """The ``sidelight`` field. With several texts, each entry names its ``choice``."""
        choices: list[list[Json]] = []
        for texts in self.texts:
            prompt = _admitted(texts)
            of_prompt = prompt.decisions if prompt else ()
            ends = (text.ended.decisions if text.ended else () for text in texts)
            choices += [self.context.entries([*of_prompt, *of_text]) for of_text in ends]
        if len(choices) == 1:
            (verdicts,) = choices
        else:
            numbered = enumerate(choices)
            verdicts = [{"choice": i, **entry} for i, entries in numbered for entry in entries]
        # Probes were trained on the model without the adapter.
        adapter = {} if self.adapter is None else {"adapter": self.adapter}
        return {"verdicts": verdicts, **adapter}

    def moderation(self) -> Json | None:
        """The ``moderation`` field; None if no probe is chosen."""
        if not self.context.chosen:
            return None
        prompt = self.context.moderation(
            self.prompt_decisions, "No chosen probe reads only the prompt."
        )
        if self.context.reads_response and not all(text.ended for text in self.choices):
            response = _error("pending", "The response is still being generated.")
        else:
            response = self.context.moderation(
                self.response_decisions, "No chosen probe reads the response."
            )
        return {"input": prompt, "output": response}


def _admitted(texts: Sequence[Enforcement]) -> Classified | None:
    """The decisions on a prompt, from the first of its texts that was admitted."""
    return next((text.admitted for text in texts if text.admitted), None)


def category_fields(visible_verdicts: Iterable[VisibleVerdict], names: CategoryNames) -> Json:
    """Whether each category of these verdicts is flagged, its score, and that text was read.

    A multi-class verdict is never flagged, so neither are its categories; its label is in the
    ``sidelight`` field.
    """
    verdicts = [each.verdict for each in visible_verdicts if each.verdict is not None]
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


def refusal_headers(decisions: Sequence[Decision], *, is_admin: bool) -> dict[str, str]:
    """The headers of a refused prompt: all verdicts except those in shadow mode, and the rule
    headers.
    """
    visible_verdicts = visible_to(decisions, is_admin=is_admin)
    return {**_verdict_header(visible_verdicts), **_rule_headers(visible_verdicts)}


def visible_to(decisions: Iterable[Decision], *, is_admin: bool) -> list[VisibleVerdict]:
    """The decisions that a client sees, never those in shadow mode."""
    visible_verdicts: list[VisibleVerdict] = []
    for decision in decisions:
        rule, verdict = decision.rule, decision.verdict
        if rule.is_shadow:
            continue
        has_scores, headers = rule.discloses_scores(is_admin=is_admin), rule.headers(verdict)
        if verdict is not None and not has_scores:
            verdict = labels_only(verdict)
        name, version = rule.name, rule.probe.version
        decided_by = _decided_by(decision) if is_admin and rule.rule.defer else None
        visible_verdicts.append(
            VisibleVerdict(
                name, version, verdict, has_scores, decision.is_too_long, headers, decided_by
            )
        )
    return visible_verdicts


def _decided_by(decision: Decision) -> Json:
    judge = {} if decision.second is None else {"judge": decision.second.to_json()}
    return {"decided_by": decision.decided_by, **judge}


def _entries(visible_verdicts: Iterable[VisibleVerdict]) -> list[Json]:
    in_order = sorted(visible_verdicts, key=lambda each: each.verdict is None)
    return [each.to_json() for each in in_order]


def _verdict_header(visible_verdicts: Sequence[VisibleVerdict]) -> dict[str, str]:
    """Compact ASCII JSON.

    Probabilities are rounded. If the header would be too long for proxies, it is reduced to probe,
    label and flag, and then to a single entry with ``error``.
    """
    keys, entries = ("probe", "label", "flagged", "error"), _entries(visible_verdicts)
    short = [{key: entry[key] for key in keys if key in entry} for entry in entries]
    full = [dict(entry) for entry in short]
    for entry, complete in zip(full, entries, strict=True):
        if "probabilities" in complete:
            scores = complete["probabilities"].items()
            entry["probabilities"] = {label: round(p, _HEADER_DIGITS) for label, p in scores}
    too_long = [{"error": "too_long"}]
    texts = [json.dumps(each, separators=(",", ":")) for each in (full, short, too_long)]
    fitting = next(text for text in texts if len(text) <= _MAX_HEADER_BYTES or text == texts[-1])
    return {VERDICTS_HEADER: fitting}


def _rule_headers(visible_verdicts: Sequence[VisibleVerdict]) -> dict[str, str]:
    """The headers that rules add to a response, for a gateway."""
    headers = dict.fromkeys(header for each in visible_verdicts for header in each.headers)
    # Labels are chosen by users, so a comma or a line break must not reach a header.
    return {
        header: ", ".join(quote(name, safe=" /-_.:@") for key, name in headers if key == header)
        for header in sorted({header for header, _ in headers})
    }


def _failure(failed: Sequence[VisibleVerdict]) -> str:
    too_long = dict.fromkeys(each.probe for each in failed if each.is_too_long)
    failures = dict.fromkeys(each.probe for each in failed if each.probe not in too_long)
    reasons = [str(verdict_failure(failures))] if failures else []
    if too_long:
        reasons.append(
            f"No verdict from {', '.join(too_long)}: the text is longer than the policy allows. "
            "Treat the text as unclassified."
        )
    return " ".join(reasons)


def _error(code: str, message: str) -> Json:
    return {"type": "error", "code": code, "message": message}
