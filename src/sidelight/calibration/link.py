"""Between logits, log-odds and probabilities. Knows a task's kind, not how a map was fitted."""

import numpy as np
from jaxtyping import Float

from sidelight.metrics import Values
from sidelight.types import TaskKind


def link(task: TaskKind, logits: Float[Values, "row output"]) -> Float[Values, "row output"]:
    """Probabilities of logits: the softmax if multi-class, else the sigmoid of each output."""
    if task == "multiclass":
        return np.exp(log_softmax(logits))
    return np.exp(-np.logaddexp(0, -logits))


def log_softmax(logits: Float[Values, "row label"]) -> Float[Values, "row label"]:
    """The logarithm of each row's softmax; no size of logits overflows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def to_log_odds(probabilities: Float[Values, "*shape"]) -> Float[Values, "*shape"]:
    """The logarithm of p / (1 - p), with p kept 1e-15 away from 0 and 1."""
    within = np.clip(probabilities, 1e-15, 1 - 1e-15)
    return np.log(within) - np.log1p(-within)
