"""Logistic regression on the means and last tokens of all layers, which is a readout.

There are tens of thousands of features but few texts, so it is solved in the span of the texts,
where an L2 penalty is equivalent. The penalty is chosen by the out-of-fold log loss. The mean and
the last token of a layer are two poolings of a text; each is weighted by how well it alone predicts
held-out texts, as in ``training/scaling.py``, which matters most with few texts.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor

from sidelight.probes.mechanisms.base import Geometry
from sidelight.probes.mechanisms.readout import Readout
from sidelight.probes.standardisation import Standardisation, spread_and_mean
from sidelight.statistics.calibration import link
from sidelight.statistics.metrics import log_losses
from sidelight.training.scaling import layer_scores, relative_weights
from sidelight.training.validation import Folds
from sidelight.types import Task

# scikit-learn's C, for features with a total mean square of 1 per text.
STRENGTHS = tuple(float(10**k) for k in np.arange(-1, 4.1, 0.5))
_ITERATIONS = 1000


@dataclass(frozen=True)
class Regression:
    """logits = bias + sum_l (value_l . mean_l + last_l . last token_l), of the given states.

    Attributes:
        weight: Weights of the mean of each layer, then of the last token of each.
        strength: Inverse of the penalty.
        left_out: Out-of-fold logits of each text at this strength.
    """

    weight: Float[Tensor, "view width output"]
    bias: Float[Tensor, " output"]
    strength: float
    left_out: Float[np.ndarray, "text output"]

    def readout(self) -> Readout:
        """The regression as a readout mechanism, whose single gate is zero and thus averages over
        tokens.
        """
        value, last = self.weight.chunk(2)
        # The drawn parameters are overwritten; the caller's random state is preserved.
        with torch.random.fork_rng(()):
            readout = Readout(Geometry(*value.shape), heads=1)
        scale = math.sqrt(len(value))
        state = {"gate": torch.zeros_like(readout.gate), "value": scale * value[:, :, None]}
        readout.load_state_dict({**state, "last": scale * last, "bias": self.bias})
        return readout.eval().requires_grad_(False)

    def logits(
        self, poolings: Float[Tensor, "pooling text layer width"]
    ) -> Float[np.ndarray, "text output"]:
        """Compute the logits of texts from their means and last tokens."""
        pairs = zip(poolings, self.weight.chunk(2), strict=True)
        products = (torch.einsum("tld,ldc->tc", vectors, weight) for vectors, weight in pairs)
        return (sum(products) + self.bias).double().numpy()


def fit_regression(
    pooled: Float[Tensor, "kind text layer width"],
    labels: Int[np.ndarray, "text ..."],
    task: Task,
    folds: Folds,
) -> Regression:
    """Fit the regression to texts; each fold and its complement must contain every label."""
    poolings = torch.cat([*pooled], 1)
    order = np.random.default_rng(0).permutation(len(labels))

    def space(
        rows: Int[np.ndarray, " row"],
    ) -> tuple[Standardisation, Float[Tensor, "feature row"], Float[np.ndarray, "text row"]]:
        """The scaling from these texts, their basis, and the coordinates of all texts."""
        scores = layer_scores(pooled[:, rows], labels[rows], task)
        scaling = _scaling(poolings[rows], relative_weights(scores).flatten().float())
        features = ((poolings - scaling.mean) / scaling.scale).flatten(1)
        basis, _ = torch.linalg.qr(features[rows].T)
        return scaling, basis, (features @ basis).numpy()

    rests = [order[~np.isin(order, fold)] for fold in folds]
    inputs = [space(rest)[2] for rest in rests]
    left_out: dict[float, Float[np.ndarray, "text output"]] = {}
    losses: dict[float, float] = {}
    for strength in STRENGTHS:
        logits = np.empty((len(labels), task.outputs))
        for fold, rest, kernel in zip(folds, rests, inputs, strict=True):
            logits[fold] = _decide(kernel[rest], labels[rest], kernel[fold], task, strength)
        left_out[strength] = logits
        losses[strength] = float(log_losses(task, link(task.kind, logits), labels).mean())
        # Weaker penalties take increasingly long.
        if losses[strength] > 1.1 * min(losses.values()):
            break
    strength = min(losses, key=losses.__getitem__)
    scaling, basis, kernel = space(order)
    # The logits of the origin and of the unit vectors give the bias and the weights.
    basis_rows = np.eye(kernel.shape[1] + 1, kernel.shape[1], k=-1)
    basis_rows = torch.from_numpy(
        _decide(kernel[order], labels[order], basis_rows, task, strength)
    ).float()
    folded = scaling.fold(
        (basis @ (basis_rows[1:] - basis_rows[0])).unflatten(0, poolings.shape[1:])
    )
    bias = basis_rows[0] + folded.shift.sum(0)
    return Regression(folded.weight, bias, strength, left_out[strength])


def _scaling(
    poolings: Float[Tensor, "text pooling width"], weights: Float[Tensor, " pooling"]
) -> Standardisation:
    """Scale features so that a pooling's mean squared norm is its share of the weights."""
    spread, mean = spread_and_mean(poolings)
    # Dimensions with almost no variance would be amplified. A constant pooling, such as the
    # template's last embedding, is uninformative.
    scale = spread + 1e-2 * spread.mean(1, keepdim=True)
    is_constant = spread.amax(1) < 1e-3 * poolings.abs().mean((0, 2)).clamp(min=1e-9)
    scale[is_constant] = math.inf
    norm = (spread / scale).square().sum(1, keepdim=True).sqrt().clamp(min=1e-9)
    return Standardisation(mean, scale * norm).weighted((weights / weights.sum()).sqrt())


def _decide(
    inputs: Float[np.ndarray, "text coordinate"],
    labels: Int[np.ndarray, "text ..."],
    queries: Float[np.ndarray, "query coordinate"],
    task: Task,
    strength: float,
) -> Float[np.ndarray, "other output"]:
    """The logits of other texts from a regression on these texts."""
    model = LogisticRegression(C=strength, max_iter=_ITERATIONS)
    if task.kind == "multilabel":
        model = OneVsRestClassifier(model)
    with warnings.catch_warnings():
        # A label that all texts have is almost certain.
        warnings.filterwarnings("ignore", "Label .* is present in all training examples")
        model.fit(inputs, labels)
    return model.decision_function(queries).reshape(len(queries), -1)
