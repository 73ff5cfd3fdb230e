"""Which epoch of a training is kept: the best on validation texts. Knows no layers and no texts."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice

import numpy as np
from jaxtyping import Float
from torch import nn

from sidelight.errors import SidelightError
from sidelight.training import TrainingSettings, validation_score
from sidelight.types import Task

# With few texts, an epoch repeats them: a handful of steps is too few to judge progress by.
STEPS_AT_LEAST = 40


def train_to_best(
    model: nn.Module,
    epochs: Iterator[None],
    logits: Callable[[], Float[np.ndarray, "text output"]],
    *,
    task: Task,
    labels: np.ndarray,
    settings: TrainingSettings,
) -> float:
    """Trains until patience or epochs run out; the model ends frozen, as of its best epoch.

    Args:
        model: What is trained, in place.
        epochs: Trains for another epoch on each request.
        logits: The model's, of the validation texts.
        task: The classes.
        labels: Of the validation texts, as in ``Examples.labels``.
        settings: For their epochs and patience.

    Returns:
        The best validation score; of equals the first is kept.

    Raises:
        SidelightError: The logits are not finite any more.
    """
    best, state, since = -math.inf, deepcopy(model.state_dict()), 0
    for _ in islice(epochs, settings.epochs):
        score = validation_score(
            task, finite(logits(), learning_rate=settings.learning_rate), labels
        )
        since += 1
        if score > best:
            best, state, since = score, deepcopy(model.state_dict()), 0
        if since >= settings.patience:
            break
    model.load_state_dict(state)
    model.requires_grad_(False)
    return best


def finite(
    logits: Float[np.ndarray, "text output"], *, learning_rate: float
) -> Float[np.ndarray, "text output"]:
    """The same logits.

    Raises:
        SidelightError: One is NaN or infinite; the message names the learning rate.
    """
    if not np.isfinite(logits).all():
        raise SidelightError(
            "Training a baseline diverged: its logits are not finite. "
            f"Lower its learning rate (it was {learning_rate})."
        )
    return logits
