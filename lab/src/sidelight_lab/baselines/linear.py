"""Linear classifiers of one vector per text: logistic regressions and Gaussian discriminants."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from sidelight.types import Task

# L2 penalties per text, for features of variance 1: from very strong to very weak.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)
# The logit of a class that no training text has.
_ABSENT = -20.0


@dataclass(frozen=True)
class Linear:
    """logits = inputs @ weight + bias."""

    weight: Float[np.ndarray, "feature output"]
    bias: Float[np.ndarray, " output"]

    @property
    def parameters(self) -> int:
        """The number of fitted numbers."""
        return self.weight.size + self.bias.size

    def __call__(
        self, inputs: Float[np.ndarray, "text feature"]
    ) -> Float[np.ndarray, "text output"]:
        return inputs @ self.weight + self.bias


def fit_logistic(
    inputs: Float[np.ndarray, "text feature"],
    labels: Int[np.ndarray, "text ..."],
    task: Task,
    *,
    penalty: float,
    iterations: int = 100,
) -> Linear:
    """A class-balanced regression on standardised inputs; one for each label of a multi-label task.

    Minimises mean loss + penalty / 2 * |weight|^2.
    """

    def fit(scaled: np.ndarray, column: np.ndarray, classes: int) -> Linear:
        present = np.unique(column)
        weight, bias = np.zeros((scaled.shape[1], classes)), np.full(classes, _ABSENT)
        bias[present] = 0
        if len(present) > 1:
            strength = 1 / (penalty * len(scaled))
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=iterations)
            with warnings.catch_warnings():
                # Penalties are compared after the same number of iterations.
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(scaled, column)
            # scikit-learn gives weights for the second of two classes only.
            weight[:, present[-len(model.coef_) :]] = model.coef_.T
            bias[present[-len(model.coef_) :]] = model.intercept_
        return Linear(weight, bias)

    return _fit_columns(inputs, labels, task, fit)


def gaussian_discriminant(
    inputs: Float[np.ndarray, "text feature"], labels: Int[np.ndarray, "text ..."], task: Task
) -> Linear:
    """Gaussian classes with one covariance, shrunk as Ledoit and Wolf (2004) estimate.

    Inputs are standardised first, so that the covariance shrinks towards equal importance.
    """

    def fit(scaled: np.ndarray, column: np.ndarray, classes: int) -> Linear:
        counts = np.bincount(column, minlength=classes)
        # A class without texts has the mean of all, which is zero.
        means = (np.eye(classes, dtype=scaled.dtype)[column].T @ scaled) / np.maximum(
            counts, 1
        ).astype(scaled.dtype)[:, None]
        estimate = LedoitWolf(assume_centered=True, store_precision=False)
        covariance = estimate.fit(scaled - means[column]).covariance_
        # The floor keeps it regular when all texts are equal.
        floor = 1e-6 * np.eye(len(covariance))
        weight = np.linalg.solve(covariance + floor, means.T.astype(np.float64))
        # One text is added to each class, so that an absent class has a prior.
        prior = np.log((counts + 1) / (len(scaled) + classes))
        return Linear(weight, prior - (means.T * weight).sum(0) / 2)

    return _fit_columns(inputs, labels, task, fit)


def _fit_columns(
    inputs: Float[np.ndarray, "text feature"],
    labels: Int[np.ndarray, "text ..."],
    task: Task,
    fit: Callable[[np.ndarray, np.ndarray, int], Linear],
) -> Linear:
    """Standardises inputs and folds that into the fit; two classes become their log-odds.

    Args:
        fit: Takes standardised inputs, class indices and the number of classes, and gives a logit
            per class.
    """
    scaler: Any = StandardScaler().fit(inputs)
    scaled = scaler.transform(inputs)
    if task.kind == "multiclass":
        fits = [fit(scaled, labels, task.outputs)]
    else:
        pairs = [fit(scaled, column, 2) for column in labels.reshape(len(labels), -1).T]
        fits = [Linear(np.diff(pair.weight), np.diff(pair.bias)) for pair in pairs]
    weight = np.concatenate([each.weight for each in fits], 1) / scaler.scale_[:, None]
    bias = np.concatenate([each.bias for each in fits]) - scaler.mean_ @ weight
    return Linear(weight.astype(np.float32), bias.astype(np.float32))
