"""Policy settings that let a known evasion pass, each with its remedy.

Only settings and the training records in cards are examined; ``sidelight redteam`` measures what a
probe flags.
"""

from collections.abc import Iterator, Sequence

from sidelight.policy.rules import BoundRule, Mode, Policy, Rule, Side, bound_rules
from sidelight.probes.probe import Probe


def weaknesses(
    policy: Policy, probes: Sequence[Probe] = (), *, behind_litellm: bool = False
) -> list[str]:
    """Find what a client could use against this policy, described in one or two sentences each.

    Args:
        policy: The rules.
        probes: The probes that will be served, if known; rules of other probes are checked without
            them.
        behind_litellm: Whether to report rules that block only in LiteLLM's guardrail.
    """
    bound = bound_rules(policy, probes)
    sides: tuple[Side, ...] = ("input", "output")
    return [
        *_of_prompts(policy, bound),
        *(
            weakness
            for side in sides
            for name, rule in policy.side(side).items()
            for weakness in _of_rule(f"[{side}.{name}]", rule, side)
        ),
        *(
            weakness
            for blocking in bound
            if blocking.mode == "block"
            for weakness in _of_probe(blocking, bound)
        ),
        *(_of_guardrail(policy, bound) if behind_litellm else ()),
    ]


def _of_prompts(policy: Policy, bound: Sequence[BoundRule]) -> Iterator[str]:
    blocking = {name for name, rule in policy.input.items() if rule.mode == "block"}
    if not blocking:
        yield (
            'No rule blocks prompts, so every prompt is answered. Set mode = "block" for a probe '
            "that reads prompts."
        )
        return
    if policy.system_turns is None:
        yield (
            "system_turns is not set, so every chat that begins with a system turn is refused. "
            "Behind LiteLLM, this affects every request from an application with a system "
            'prompt. Set it to "trust" if only your own applications write system turns, and '
            'otherwise to "refuse".'
        )
    if policy.invisible_characters == "off":
        yield (
            "invisible_characters is off, so zero-width spaces between its letters hide an attack. "
            'Set it to "strip".'
        )
    uses_template = {each.probe.uses_template for each in bound if each.name in blocking}
    # Without its probes, a policy is taken to be for chats.
    if policy.system_turns == "trust" and uses_template != {False}:
        yield (
            'system_turns = "trust" lets leading system turns pass unclassified, even if one '
            'contains an attack. If clients can write such turns, set it to "refuse".'
        )


def _of_guardrail(policy: Policy, bound: Sequence[BoundRule]) -> Iterator[str]:
    """The rules that block only in LiteLLM's guardrail."""
    sides: tuple[Side, ...] = ("input", "output")
    modes: dict[tuple[Side, str], Mode] = {
        (side, name): rule.mode for side in sides for name, rule in policy.side(side).items()
    }
    # Without a threshold, as for a multi-class probe, nothing is flagged.
    modes |= {(each.side, each.name): each.mode if each.thresholds else "shadow" for each in bound}
    for (side, name), mode in modes.items():
        if mode in ("score", "flag", "route"):
            yield (
                f'[{side}.{name}] has mode = "{mode}", but LiteLLM\'s guardrail blocks whatever '
                'it flags. Set mode = "shadow" to only count its verdicts, or "block" to block '
                "on every route."
            )


def _of_rule(place: str, rule: Rule, side: Side) -> Iterator[str]:
    if rule.threshold is not None and rule.threshold >= 1:
        yield (
            f"{place} threshold = {rule.threshold} flags only texts of which the probe is almost "
            "certain, which are extremely rare. Leave it out, or lower it."
        )
    if rule.threshold == 0:
        yield (
            f"{place} threshold = 0 flags every text, regardless of the probe. Leave it out, or "
            "raise it."
        )
    if rule.mode != "block":
        return
    if rule.on_failure == "pass":
        yield (
            f'{place} on_failure = "pass" lets through texts that the probe cannot classify, '
            "such as plain text unless the probe was trained with format=both or raw. Leave it "
            "out to block such texts."
        )
        if rule.max_tokens is not None:
            yield (
                f'{place} max_tokens = {rule.max_tokens} with on_failure = "pass" lets through '
                "any text that is padded beyond that length. Leave one of the two out."
            )
    if rule.defer is not None:
        yield (
            f"{place} defers to judge '{rule.defer.judge}', which can clear a text that the "
            "probe flags, even because the text instructs it to. Measure the judge on attacks "
            'first, and set mode = "shadow" until then.'
        )
    if rule.disclose == "scores":
        yield (
            f'{place} disclose = "scores" shows a blocked user how close an attempt is to the '
            "threshold. Leave it out, and give your own applications an admin key."
        )
    if rule.turns == "tool":
        yield (
            f'{place} turns = "tool" lets through an attack in any other turn, and clients '
            "choose the roles. Leave it out unless your own application builds the messages."
        )
    window = rule.consecutive if rule.hold_back is None else rule.hold_back
    if side == "output" and window < rule.consecutive - 1:
        yield (
            f"{place} hold_back = {window} sends some of the {rule.consecutive} tokens that end "
            f"the response. Set it to {rule.consecutive - 1} or more, or leave it out."
        )


def _of_probe(rule: BoundRule, bound: Sequence[BoundRule]) -> Iterator[str]:
    probe = rule.probe
    labels = set(probe.task.labels)
    for twin in () if rule.discloses_scores() else bound:
        is_double = twin.side == rule.side and set(twin.probe.task.labels) == labels
        if is_double and twin.discloses_scores():
            yield (
                f"Probe '{twin.name}' discloses its scores and has the same labels as "
                f"'{rule.name}', which blocks. Give it a rule with disclose = \"labels\"."
            )
    if rule.side == "output":
        return
    if probe.uses_template and probe.reads.scope == "last_turn":
        yield (
            f"Probe '{probe.name}' has several classes and classifies only the user's last turn, "
            "so it misses an attack in an earlier turn. Retrain it on one label."
        )
    # The text's logit is the largest logit of its tokens, regardless of the surrounding text.
    is_diluted = probe.spans is None
    if is_diluted and probe.uses_template and probe.reads.scope == "conversation":
        yield (
            f"Probe '{probe.name}' classifies a conversation as one text, so later turns can "
            "outweigh an attack in an earlier one. If its labels can apply to part of a text, "
            "retrain it with this version, on one label."
        )
    if not probe.standardisation.is_normalised:
        yield (
            f"Probe '{probe.name}' reads hidden states of any norm, so a single token with a "
            "large norm can outweigh an attack. Retrain it with this version, on two classes."
        )
    blocks_long = rule.fails_closed and rule.rule.max_tokens is not None
    if is_diluted and not probe.card.training.contexts.get("inside") and not blocks_long:
        yield (
            f"Probe '{probe.name}' was trained on texts without context, so a long text can "
            "outweigh an attack in it. Train it with background traffic (--background), or set "
            "max_tokens to the length of its training texts."
        )
