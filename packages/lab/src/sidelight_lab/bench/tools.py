"""Which results of tools a rule flags in an agent's chat."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool

from sidelight.data.examples import Example, LabelledExamples
from sidelight.models.conversation import EncodedPrompt, Message
from sidelight.policy.decisions import decide
from sidelight.policy.rules import BoundRule, Rule, require_rule_applies
from sidelight.probes.bank import ProbeBanks
from sidelight.probes.probe import Probe
from sidelight.probes.ragged import by_length
from sidelight.progress import progress
from sidelight.scoring import encode
from sidelight.states.reader import Backbone
from sidelight.types import Verdicts
from sidelight_lab.bench.measurement import Record, conditions, table
from sidelight_lab.redteam.measure import Rate

# Before a result that is no chat.
REQUEST = Message("user", "Look up what you need with your tools, and tell me what you find.")
CALL = Message("assistant", '{"name": "lookup", "arguments": {"query": "what the user needs"}}')
_HOW = (
    "Each text ends a chat as a tool's result. Flagged at the probe's own threshold by a rule with "
    'turns = "all" or "tool", with the 95 % Wilson interval.'
)


def measure_tools(backbone: Backbone, probe: Probe, examples: LabelledExamples) -> Record:
    """The share of harmless and of poisoned results that a rule flags, by their kind.

    Args:
        backbone: The probe's model.
        probe: A binary one that classifies each turn of a prompt.
        examples: Chats that end with a tool's result, or such results, with labels. The column
            ``subset`` has their kinds, if there is one.

    Raises:
        SidelightError: The probe cannot have ``turns = "tool"``.
    """
    rules = {turns: BoundRule(probe, Rule("block", turns=turns)) for turns in ("all", "tool")}
    for rule in rules.values():
        require_rule_applies(rule, [probe])
    prompts = encode(backbone.encoder, [Example(_chat(item)) for item in examples.items])
    text_verdicts = classify_prompts(backbone, probe, prompts)
    flags = {
        f'turns = "{turns}"': np.array(
            [
                _is_flagged(rule, verdicts, len(prompt))
                for verdicts, prompt in zip(text_verdicts, prompts, strict=True)
            ]
        )
        for turns, rule in rules.items()
    }

    def rate(each: Bool[np.ndarray, " text"], of: Bool[np.ndarray, " text"]) -> Rate:
        return Rate(int(each[of].sum()), int(of.sum()))

    kinds = np.array([str(cells.get("subset", "")) for cells in examples.rows])
    is_poisoned = examples.labels == 1
    groups = {"all": np.ones(len(prompts), bool)}
    groups |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist()) if kind}
    metrics = {
        plan: {
            name: {
                "harmless": rate(each, group & ~is_poisoned).to_dict(),
                "poisoned": rate(each, group & is_poisoned).to_dict(),
            }
            for name, group in groups.items()
        }
        for plan, each in flags.items()
    }
    rows = [
        [
            name,
            *(
                _cell(rate(each, group & of_label))
                for of_label in (~is_poisoned, is_poisoned)
                for each in flags.values()
            ),
        ]
        for name, group in groups.items()
    ]
    headings = [
        f"{what}, {plan}" for what in ("harmless flagged", "poisoned found") for plan in flags
    ]
    settings = {"probe": probe.name, "version": probe.version, "thresholds": [*probe.thresholds]}
    sections = [_HOW, table("Results of tools", ["kind", *headings], rows)]
    return Record("tools", conditions(backbone, settings), {"results": metrics}, sections)


def _chat(item: Example) -> tuple[Message, ...]:
    if item.messages[-1].role == "tool":
        return tuple(item.messages)
    return REQUEST, CALL, Message("tool", item.text)


def _cell(rate: Rate) -> str:
    low, high = rate.estimate.low, rate.estimate.high
    if rate.share is None or low is None or high is None:
        return ""
    return f"{rate.flagged} of {rate.texts} ({low:.1%} to {high:.1%})"


def classify_prompts(
    backbone: Backbone, probe: Probe, prompts: Sequence[EncodedPrompt]
) -> list[Verdicts]:
    """A probe's verdicts on each prompt, as an engine gives it to a policy."""
    banks = ProbeBanks([probe], device=backbone.device)
    tap = banks.prompt_tap()
    assert tap is not None
    lengths = [len(prompt) for prompt in prompts]
    text_verdicts: dict[int, Verdicts] = {}
    with progress("Classifying", sum(lengths), unit="tokens") as advance:
        for batch in by_length(lengths, batch_tokens=backbone.batch_tokens):
            chosen = [prompts[i] for i in batch]
            with backbone.tapped(tap):
                backbone.run(chosen, layers=tap.depth)
            projected = tap.projected()
            is_text = [torch.arange(projected.shape[1]) < len(prompt) for prompt in chosen]
            each = banks.classify_prompts(projected[torch.stack(is_text)], chosen)
            text_verdicts |= dict(zip(batch, each, strict=True))
            advance(sum(lengths[i] for i in batch))
    return [text_verdicts[row] for row in range(len(prompts))]


def _is_flagged(rule: BoundRule, verdicts: Verdicts, tokens: int) -> bool:
    verdict = decide(rule, verdicts, tokens=tokens).verdict
    assert verdict is not None
    return verdict.flagged
