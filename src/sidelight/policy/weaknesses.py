"""Settings of a policy under which a known evasion passes, each with its remedy.

Only settings are read, and what cards say of training. What a probe flags is for
``sidelight redteam`` to measure.
"""

from collections.abc import Iterator, Sequence

from sidelight.policy.rules import BoundRule, Mode, Policy, Rule, Side, bound_rules
from sidelight.probes.probe import Probe


def weaknesses(
    policy: Policy, probes: Sequence[Probe] = (), *, behind_litellm: bool = False
) -> list[str]:
    """What a client could use against this policy, one sentence or two each.

    Args:
        policy: The rules.
        probes: The probes that will be served, as far as they are known; rules of others are
            checked by themselves.
        behind_litellm: Whether to name the rules that block in LiteLLM's guardrail alone.
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
            "No rule blocks prompts, so every prompt is answered. Give a probe of the prompt "
            'mode = "block".'
        )
        return
    if policy.system_turns is None:
        yield (
            "system_turns is not set, so every chat that begins with a system turn is refused. "
            "Behind LiteLLM that is each request of an application with a system prompt. Say "
            '"trust" if only your own applications write system turns, otherwise "refuse".'
        )
    if policy.invisible_characters == "off":
        yield (
            "invisible_characters is off, so zero-width spaces between its letters hide an attack. "
            'Say "strip".'
        )
    formats = {each.probe.card.prompt_format for each in bound if each.name in blocking}
    if policy.system_turns == "trust" and formats != {"raw"}:
        yield (
            'system_turns = "trust" answers a conversation whose leading system turn holds the '
            'attack, which no probe of chats reads. If clients can write such turns, say "refuse".'
        )


def _of_guardrail(policy: Policy, bound: Sequence[BoundRule]) -> Iterator[str]:
    """The rules that block in LiteLLM's guardrail and nowhere else."""
    sides: tuple[Side, ...] = ("input", "output")
    modes: dict[tuple[Side, str], Mode] = {
        (side, name): rule.mode for side in sides for name, rule in policy.side(side).items()
    }
    # Without a threshold, as with several classes, nothing is flagged.
    modes |= {(each.side, each.name): each.mode if each.thresholds else "shadow" for each in bound}
    for (side, name), mode in modes.items():
        if mode in ("score", "flag", "route"):
            yield (
                f'[{side}.{name}] has mode = "{mode}", and LiteLLM\'s guardrail blocks whatever it '
                'flags. Set mode = "shadow" to count its verdicts only, or "block" to block them '
                "on every route."
            )


def _of_rule(place: str, rule: Rule, side: Side) -> Iterator[str]:
    if rule.threshold is not None and rule.threshold >= 1:
        yield (
            f"{place} threshold = {rule.threshold} counts only what the probe is entirely sure of, "
            "which is next to nothing. Leave it out, or give a lower one."
        )
    if rule.threshold == 0:
        yield (
            f"{place} threshold = 0 counts every text, whatever the probe says. Leave it out, or "
            "give a higher one."
        )
    if rule.mode != "block":
        return
    if rule.on_failure == "pass":
        yield (
            f'{place} on_failure = "pass" lets through what the probe cannot classify, such as '
            "plain text unless it was trained with format=both or raw. Leave it out, so that such "
            "a text is blocked."
        )
        if rule.max_tokens is not None:
            yield (
                f'{place} max_tokens = {rule.max_tokens} with on_failure = "pass" lets through '
                "whatever is padded beyond that length. Leave one of them out."
            )
    if rule.defer is not None:
        yield (
            f"{place} defers to judge '{rule.defer.judge}', which can clear what the probe flags, "
            "also because a text tells it to. Measure it on attacks first, or give the rule "
            'mode = "shadow" until you have.'
        )
    if rule.disclose == "scores":
        yield (
            f'{place} disclose = "scores" shows a blocked user how near the next attempt is. '
            "Leave it out, and give your own applications an admin key."
        )
    if rule.turns == "tool":
        yield (
            f'{place} turns = "tool" lets through an attack in any other turn, and clients write '
            "the roles. Leave it out unless your own application makes the messages."
        )
    window = rule.consecutive if rule.hold_back is None else rule.hold_back
    if side == "output" and window < rule.consecutive - 1:
        yield (
            f"{place} hold_back = {window} sends a part of the {rule.consecutive} tokens that cut "
            f"the text. Set it to {rule.consecutive - 1} or more, or leave it out."
        )


def _of_probe(rule: BoundRule, bound: Sequence[BoundRule]) -> Iterator[str]:
    probe = rule.probe
    labels = set(probe.task.labels)
    for twin in () if rule.discloses_scores() else bound:
        is_double = twin.side == rule.side and set(twin.probe.task.labels) == labels
        if is_double and twin.discloses_scores():
            yield (
                f"Probe '{twin.name}' tells its scores and has the labels of '{rule.name}', which "
                'blocks. Give it a rule with disclose = "labels".'
            )
    if rule.side == "output":
        return
    if probe.card.prompt_format != "raw" and probe.reads.scope == "last_turn":
        yield (
            f"Probe '{probe.name}' has several classes and classifies the user's last turn alone, "
            "so it misses an attack in an earlier turn. Train it again on one label."
        )
    # The largest logit of a token is that of its text, whatever stands around it.
    is_diluted = probe.spans is None
    if is_diluted and probe.card.prompt_format != "raw" and probe.reads.scope == "conversation":
        yield (
            f"Probe '{probe.name}' judges a conversation as one text, so an attack in an earlier "
            "turn is outweighed by those after it. If a part of a text can have its labels, train "
            "it again with this version, on one label."
        )
    if not probe.standardisation.is_normalised:
        yield (
            f"Probe '{probe.name}' reads states of any norm, so one token of a large norm can "
            "outweigh an attack. Train it again with this version, on two classes."
        )
    blocks_long = rule.fails_closed and rule.rule.max_tokens is not None
    if is_diluted and not probe.card.training.contexts.get("inside") and not blocks_long:
        yield (
            f"Probe '{probe.name}' learned from texts by themselves, so an attack is outweighed in "
            "a long one. Train it with background traffic (--background), or set max_tokens to the "
            "length of its training texts."
        )
