"""Other forms of training texts, with their labels, that a probe also learns from.

A probe that has seen a form with one label alone learns the form, so every form is shown with all
labels. Calibration, threshold and figures are made from the texts as they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from sidelight.data.examples import Example, LabelledExamples
from sidelight.disguises import DISGUISES
from sidelight.prompts import Message


def with_variants(
    examples: LabelledExamples, *, plain: bool, disguised: bool
) -> tuple[LabelledExamples, Sequence[int]]:
    """The texts, then their variants, and the text of each variant.

    Args:
        examples: The texts.
        plain: Whether each is also shown without a chat template.
        disguised: Whether each that is a single turn is also shown in a disguise, such as spaced
            letters.
    """
    random = Random(0)
    variants: list[tuple[int, Example]] = []
    for text, example in enumerate(examples.items):
        if plain:
            variants.append((text, replace(example, is_plain=True)))
        if disguised and [message.role for message in example.messages] == ["user"]:
            disguise = DISGUISES[random.choice([*DISGUISES])]
            message = Message("user", disguise(example.text, random))
            variants.append((text, replace(example, messages=(message,))))
    sources = [text for text, _ in variants]
    shown = examples.select([*range(len(examples)), *sources])
    items = (*examples.items, *(variant for _, variant in variants))
    return replace(shown, items=items, warnings=examples.warnings), sources
