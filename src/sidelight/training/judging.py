"""Texts judged by probes on their backbone: logits, and the spans of a probe that labels tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sidelight.backbone import Backbone
from sidelight.bank import Bank
from sidelight.data.examples import Example, located
from sidelight.probe import Probe, ProbeOutput
from sidelight.prompts.conversation import EncodedPrompt
from sidelight.prompts.encode import PromptEncoder
from sidelight.spans import character_scores
from sidelight.states.extraction import text_logits
from sidelight.training.dataset import span_places
from sidelight.training.validation import require_side
from sidelight.types import Span


def encode(
    encoder: PromptEncoder, examples: Sequence[Example], *, with_places: bool = False
) -> list[EncodedPrompt]:
    """The examples' token ids; ``with_places`` as for ``PromptEncoder.encode``.

    Raises:
        ContextLengthError: One is longer than the backbone reads.
        SidelightError: One cannot be rendered.
    """
    prompts: list[EncodedPrompt] = []
    for index, example in enumerate(examples):
        with located(example, index):
            text = example.conversation, example.response
            prompts.append(encoder.encode(*text, with_places=with_places))
    return prompts


def judge(backbone: Backbone, probe: Probe, examples: Sequence[Example]) -> list[ProbeOutput]:
    """A probe's output for each text.

    Raises:
        ContextLengthError: A text is longer than the backbone reads.
        SidelightError: The probe reads responses and a text has none, or it finds spans in prompts
            and a text has a response.
        VerdictError: A logit is not finite; the message names the first text with one.
    """
    require_side(probe, examples)
    bank = Bank([probe], device=backbone.device)
    (judged,) = text_logits(backbone, bank, encode(backbone.encoder, examples))
    for index, text in enumerate(judged):
        with located(examples[index], index):
            probe.require_finite(text.logits)
    return judged


def find_spans(
    backbone: Backbone, probe: Probe, examples: Sequence[Example]
) -> tuple[Float[np.ndarray, "text output"], list[list[Span]]]:
    """The logits of whole texts, and the spans in each, from one forward pass.

    Raises:
        ContextLengthError: A text is longer than the backbone reads.
        VerdictError: A logit is not finite.
        SidelightError: The probe reads responses and a text has none, or the reverse.
    """
    assert probe.spans is not None
    judged = judge_characters(backbone, probe, examples)
    logits = np.reshape([text.logits for text, _ in judged], (len(examples), probe.task.outputs))
    return logits, [probe.spans.read(scores, probe.task.output_labels) for _, scores in judged]


def judge_characters(
    backbone: Backbone, probe: Probe, examples: Sequence[Example]
) -> list[tuple[ProbeOutput, Float[np.ndarray, "character label"]]]:
    """The output of a probe of spans for each text, and its characters' probabilities."""
    assert probe.spans is not None
    texts: list[str] = []
    for index, example in enumerate(examples):
        with located(example, index):
            texts.append(example.span_text)
    judged = judge(backbone, probe, examples)
    calibration = probe.spans.calibration
    tokens = [calibration.apply(text.tokens) for text in judged if text.tokens is not None]
    places = span_places(backbone.encoder, examples, [*map(len, tokens)])
    scores = map(character_scores, texts, places, tokens)
    return list(zip(judged, scores, strict=True))
