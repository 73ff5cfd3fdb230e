"""Long inputs made of short texts: what teaches a probe to find one text among others.

A probe that has seen short texts only misses one of them in a long input (docs/results.md). Where a
label says that some part of a text is so, an input of several texts has the labels of all.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from sidelight.backbones import TransformersBackbone
from sidelight.data import Example, Examples
from sidelight.errors import SidelightError
from sidelight.fitting.screening import labels_of, task_of
from sidelight.prompts import Message

_LEAST_AROUND = 64
# Of the room around a text: what is cut and joined can have some tokens more than its parts.
_FILLED = 0.95
_BETWEEN = "\n\n"


def surrounded(
    text: str,
    others: Sequence[str],
    *,
    tokens: int,
    backbone: TransformersBackbone,
    random: np.random.Generator,
) -> str:
    """The text, whole, at a random place among others.

    Args:
        text: To be found.
        others: What is drawn from, at least one.
        tokens: Of those drawn, together with what parts them; the last one is cut.
        backbone: Counts them.
        random: Decides which, and the place.
    """
    pieces: list[str] = []
    missing = tokens
    while missing > 0:
        other = others[int(random.integers(len(others)))]
        ids = backbone.tokenizer(other + _BETWEEN, add_special_tokens=False)["input_ids"]
        pieces.append(backbone.tokenizer.decode(ids[:missing]).removesuffix(_BETWEEN))
        missing -= len(ids)
    place = int(random.integers(len(pieces) + 1))
    return _BETWEEN.join([*pieces[:place], text, *pieces[place:]])


def long_inputs(
    examples: Examples, backbone: TransformersBackbone, *, count: int, max_tokens: int, seed: int
) -> Examples:
    """Texts among others that have no label; half of them have one, which is then the input's.

    Their lengths are log-uniform. A text that leaves no room for others is passed over.

    Args:
        examples: Labelled prompts of one message.
        backbone: Whose tokens are counted.
        count: How many.
        max_tokens: Of the longest, template and all.
        seed: Decides texts, lengths and places.

    Raises:
        SidelightError: There are several classes, of which a text of several parts could have any;
            a conversation or a response; or too few texts.
    """
    labelled = _have_a_label(examples)
    prompts = [backbone.encoder.encode_any_length(item.messages) for item in examples.items]
    room = _FILLED * (max_tokens - np.array([len(prompt) for prompt in prompts]))
    random = np.random.default_rng(seed)
    drawn = [
        _draw(np.flatnonzero(kind & (room >= _LEAST_AROUND)), number, random)
        for kind, number in ((labelled, count // 2), (~labelled, count - count // 2))
    ]
    chosen = np.concatenate(drawn)
    others = [examples.items[row].text for row in np.flatnonzero(~labelled)]
    made: list[Example] = []
    for row in chosen:
        tokens = math.exp(random.uniform(math.log(_LEAST_AROUND), math.log(room[row])))
        text = examples.items[row].text
        whole = surrounded(text, others, tokens=int(tokens), backbone=backbone, random=random)
        made.append(Example((Message("user", whole),)))
    return Examples(tuple(made), task_of(examples), labels_of(examples)[chosen], ({},) * len(made))


def _have_a_label(examples: Examples) -> Bool[np.ndarray, " row"]:
    if task_of(examples).kind == "multiclass":
        raise SidelightError(
            "Long inputs are for a label that some part of a text can have, so for a binary or a "
            "multi-label task: a text of several parts could have any of several classes. Leave "
            "--long-inputs out (long_inputs=0)."
        )
    if any(len(item.messages) > 1 or item.response is not None for item in examples.items):
        raise SidelightError(
            "Long inputs are made of single messages without a response. Leave --long-inputs out "
            "(long_inputs=0)."
        )
    return labels_of(examples).reshape(len(examples), -1).any(1)


def _draw(
    rows: Int[np.ndarray, " _"], count: int, random: np.random.Generator
) -> Int[np.ndarray, " _"]:
    """So many of them in random order; where there are fewer, all of them again and again."""
    if count and not len(rows):
        raise SidelightError(
            "Long inputs need texts with and without a label that are short enough to have others "
            "around them. Raise --max-tokens, or leave --long-inputs out (long_inputs=0)."
        )
    rounds = [random.permutation(rows) for _ in range(math.ceil(count / max(1, len(rows))))]
    return np.concatenate([rows[:0], *rounds])[:count]
