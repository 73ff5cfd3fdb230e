"""Ready guards: training options, and a policy in shadow mode."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from sidelight.data.examples import LabelledExamples
from sidelight.data.guards import draw_texts, find_guard
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.models.encode import PromptEncoder
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.card import ProbeCard
from sidelight.states.reader import Backbone
from sidelight.statistics.thresholds import ThresholdRule
from sidelight.training.background import Background, load_background
from sidelight.training.cost import TrainingEstimate, estimate_training, training_tokens
from sidelight.training.settings import (
    AUTO,
    READS,
    FitOptions,
    named_mechanism,
    suggested_settings,
)
from sidelight.types import Task

_CPU = torch.device("cpu")
# Maximum tokens of a guard's texts by default.
TOKENS_ON_CPU = 250_000
_POLICY = """\
# In shadow mode, a guard blocks nothing and clients do not see its verdicts. They are counted in
# /metrics, which then needs a key (--metrics-key).
# To block what a guard flags, replace "shadow" with "block". A line such as
# threshold = 0.9 overrides the threshold from training. Rules that block prompts refuse chats that
# begin with a system turn. If only your application writes such turns, add this line at the top:
# system_turns = "trust"
# In a rule for prompts, turns = "tool" acts only on tool results, not on user messages.
"""


def load_guard(name: str, suffix: str = "", task: Task | None = None) -> LabelledExamples:
    """Load the training texts of a guard, with the user's rows for ``,FILE``, or a ``:TEST``."""
    spans, source = find_guard(name).card.columns["spans"], f"guard:{name}{suffix}"
    return load_examples(source, spans=spans, task=task)


def affordable(
    texts: LabelledExamples,
    encoder: PromptEncoder,
    device: torch.device = _CPU,
    *,
    seed: int = 0,
) -> LabelledExamples:
    """Texts with a total of ``TOKENS_ON_CPU`` tokens on a CPU, or all texts on a GPU.

    ``seed`` determines which.
    """
    if device.type != "cpu":
        return texts
    sizes = training_tokens(texts, encoder)
    return draw_texts(texts, sizes=sizes, most=TOKENS_ON_CPU, seed=seed)


def estimate_guards(
    names: Sequence[str], encoder: PromptEncoder, model: Fingerprint
) -> TrainingEstimate:
    """Estimate the cost of training guards on this CPU with their default texts."""
    estimates = [
        estimate_training(affordable(load_guard(name), encoder), encoder, model) for name in names
    ]
    return TrainingEstimate(
        tokens=sum(estimate.tokens for estimate in estimates),
        # The states of one guard are removed before the next is trained.
        disk_bytes=max(estimate.disk_bytes for estimate in estimates),
        seconds=sum(estimate.seconds for estimate in estimates),
    )


def guard_options(
    name: str, texts: LabelledExamples, backbone: Backbone, rule: ThresholdRule, *, seed: int = 0
) -> FitOptions:
    """The training options of a guard.

    In transformers, the last layer is left out, because llama.cpp does not compute its states for
    every token. The probe can then be accepted on a GGUF copy of the model.
    """
    card = find_guard(name).card
    layers = backbone.fingerprint.layers - 1 if isinstance(backbone, TransformersBackbone) else None
    settings = suggested_settings(named_mechanism(AUTO, type(texts)))
    return FitOptions(
        settings=replace(settings, layers=layers, seed=seed),
        reads=replace(READS, side=card.reads),
        background=Background() if card.labels is None else load_background("packaged"),
        threshold=rule,
    )


def shadow_policy(probes: Sequence[ProbeCard]) -> str:
    """A policy in shadow mode, with a comment that explains how to block."""
    rules = [_POLICY]
    for probe in probes:
        side = "output" if probe.reads.includes_response else "input"
        # A bare TOML key cannot contain a dot.
        name = f'"{probe.name}"' if "." in probe.name else probe.name
        rules.append(f'\n[{side}.{name}]\nmode = "shadow"\n')
    return "".join(rules)
