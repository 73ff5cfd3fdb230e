"""Labelled responses: which of them are to be caught, and which are trained on. Knows no probe."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from sidelight.backbones import TransformersBackbone
from sidelight.data import Examples
from sidelight.errors import SidelightError, did_you_mean
from sidelight.prompts import Reads
from sidelight.types import Task

_RESPONSE = Reads("response")
_TEST_SHARE, _VALIDATION_SHARE = 0.3, 0.3


@dataclass(frozen=True, eq=False)
class Parts:
    """The responses; all those to one prompt are in one part.

    Attributes:
        training: What probes are trained on.
        validation: What they stop, and rules are chosen, on.
        test: What is reported.
    """

    training: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True, eq=False)
class Responses:
    """What is known of some responses besides their scores.

    Attributes:
        is_positive: Whether each is to be caught.
        labels: As in the data.
        tokens: Of each response.
        prompts: Number of each one's prompt: the same for responses to the same prompt.
        growth: The text of each after each of its tokens.
    """

    is_positive: Bool[np.ndarray, " response"]
    labels: tuple[str, ...]
    tokens: Int[np.ndarray, " response"]
    prompts: Int[np.ndarray, " response"]
    growth: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        """The number of responses."""
        return len(self.labels)


def with_positives(examples: Examples, positives: Sequence[str], *, name: str) -> Examples:
    """The examples with two classes: the positive labels together, and all others.

    Args:
        examples: Labelled with two or more classes, and with responses.
        positives: Labels of the responses to be caught.
        name: Of what is caught.

    Raises:
        SidelightError: A label is unknown, or no label is left for the other class.
    """
    if examples.task is None or examples.labels is None or examples.task.kind == "multilabel":
        raise SidelightError("A streaming comparison needs one label for each response.")
    known = examples.task.labels
    for label in positives:
        if label not in known:
            raise SidelightError(f"No response is labelled '{label}'.{did_you_mean(label, known)}")
    if set(positives) == set(known):
        raise SidelightError("Every label is positive, so that there is nothing to tell apart.")
    numbers = [known.index(label) for label in positives]
    task = Task("binary", (f"not {name}", name))
    labels = np.isin(examples.labels, numbers).astype(np.int64)
    return Examples(examples.items, task, labels, examples.rows)


def part(examples: Examples, *, seed: int) -> Parts:
    """Parts the examples by prompt.

    Args:
        examples: Of two classes.
        seed: Decides which prompts go where.
    """
    rest, test = examples.split(_TEST_SHARE, seed=seed)
    training, validation = rest.split(_VALIDATION_SHARE, seed=seed)
    return Parts(training, validation, test)


def describe(
    backbone: TransformersBackbone, examples: Examples, labels: Sequence[str]
) -> Responses:
    """What is known of the responses, with the tokens as the backbone reads them.

    Args:
        backbone: Whose tokens are counted.
        examples: Of two classes.
        labels: As in the data.
    """
    assert examples.labels is not None
    growth: list[tuple[str, ...]] = []
    for item in examples.items:
        encoded = backbone.encoder.encode(item.messages, item.response)
        read = encoded.mask(_RESPONSE).tolist()
        ids = [token for token, is_read in zip(encoded.token_ids, read, strict=True) if is_read]
        growth.append(tuple(str(backbone.tokenizer.decode(ids[: n + 1])) for n in range(len(ids))))
    texts = [item.text for item in examples.items]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return Responses(
        is_positive=examples.labels == 1,
        labels=tuple(labels),
        tokens=np.array([len(texts) for texts in growth], dtype=np.int64),
        prompts=np.array([numbers[text] for text in texts], dtype=np.int64),
        growth=tuple(growth),
    )
