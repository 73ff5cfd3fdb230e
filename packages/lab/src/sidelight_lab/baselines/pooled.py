"""Baselines on one vector per text and layer (mean or last token), and their linear classifiers.

The classifiers are logistic regressions and Gaussian discriminants on standardised vectors, built
on scikit-learn.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sidelight.progress import progress
from sidelight.states.cache import write_tensors
from sidelight.training.dataset import Split
from sidelight.training.preparing import ProbeDataset
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline, best_on_validation

# L2 penalties per text for features of variance 1, from very strong to very weak.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)
# Logit of a class without training texts.
_ABSENT = -20.0


# Reused for every penalty and layer, on training, validation and test texts.
@lru_cache(maxsize=3)
def pooled_states(split: Split) -> Float[Tensor, "pooling text layer width"]:
    """Mean and last token of each text, computed once and stored next to the texts' states."""
    cache = split.states
    path = cache.directory / f"{cache.key}-pooled.safetensors"
    if not path.exists():
        shape = (len(cache.lengths), cache.fingerprint.layers, cache.fingerprint.width)
        means, lasts = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
        with progress("Pooling", shape[0], unit="texts") as advance:
            for shard in map(cache.read, cache.shards):
                pooled = shard.pooled()
                means[shard.rows], lasts[shard.rows] = pooled[0], pooled[1].bfloat16()
                advance(len(shard.rows))
        write_tensors({"means": means, "lasts": lasts}, path)
    stored = load_file(path)
    return torch.stack([stored["means"], stored["lasts"].float()])


@dataclass(frozen=True)
class Linear:
    """Linear classifier: logits = inputs @ weight + bias."""

    weight: Float[np.ndarray, "feature output"]
    bias: Float[np.ndarray, " output"]

    @property
    def parameters(self) -> int:
        """Number of fitted parameters."""
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
    is_balanced: bool = True,
) -> Linear:
    """Fit a logistic regression on standardised inputs, one per label of a multi-label task.

    Minimises mean loss + penalty / 2 * |weight|^2.
    """

    def fit(scaled: np.ndarray, classes_of_rows: np.ndarray, classes: int) -> Linear:
        present = np.unique(classes_of_rows)
        weight, bias = np.zeros((scaled.shape[1], classes)), np.full(classes, _ABSENT)
        bias[present] = 0
        if len(present) > 1:
            strength = 1 / (penalty * len(scaled))
            weights = "balanced" if is_balanced else None
            model = LogisticRegression(C=strength, class_weight=weights, max_iter=iterations)
            with warnings.catch_warnings():
                # Penalties are compared at the same iteration limit, converged or not.
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(scaled, classes_of_rows)
            # For two classes, scikit-learn returns weights for the second only.
            weight[:, present[-len(model.coef_) :]] = model.coef_.T
            bias[present[-len(model.coef_) :]] = model.intercept_
        return Linear(weight, bias)

    return _fit_outputs(inputs, labels, task, fit)


def gaussian_discriminant(
    inputs: Float[np.ndarray, "text feature"], labels: Int[np.ndarray, "text ..."], task: Task
) -> Linear:
    """Fit Gaussian classes with a shared covariance, shrunk as in Ledoit and Wolf (2004).

    Inputs are standardised first, so that the covariance shrinks towards equal importance of all
    features.
    """

    def fit(scaled: np.ndarray, classes_of_rows: np.ndarray, classes: int) -> Linear:
        counts = np.bincount(classes_of_rows, minlength=classes)
        # A class without texts gets the overall mean, which is zero.
        means = (np.eye(classes, dtype=scaled.dtype)[classes_of_rows].T @ scaled) / np.maximum(
            counts, 1
        ).astype(scaled.dtype)[:, None]
        estimate = LedoitWolf(assume_centered=True, store_precision=False)
        covariance = estimate.fit(scaled - means[classes_of_rows]).covariance_
        # The floor keeps the covariance invertible when all texts are equal.
        floor = 1e-6 * np.eye(len(covariance))
        weight = np.linalg.solve(covariance + floor, means.T.astype(np.float64))
        # Add one text to each class, so that an absent class has a nonzero prior.
        prior = np.log((counts + 1) / (len(scaled) + classes))
        return Linear(weight, prior - (means.T * weight).sum(0) / 2)

    return _fit_outputs(inputs, labels, task, fit)


def _fit_outputs(
    inputs: Float[np.ndarray, "text feature"],
    labels: Int[np.ndarray, "text ..."],
    task: Task,
    fit: Callable[[np.ndarray, np.ndarray, int], Linear],
) -> Linear:
    """Fit to standardised inputs and fold the scaling into the result.

    Two classes are reduced to their log-odds.

    Args:
        inputs: Features before standardisation.
        labels: Labels of the texts.
        task: The classes.
        fit: Fits one logit per class, given standardised inputs, class indices and the number of
            classes.
    """
    scaler: Any = StandardScaler().fit(inputs)
    scaled = scaler.transform(inputs)
    if task.kind == "multiclass":
        fits = [fit(scaled, labels, task.outputs)]
    else:
        pairs = [fit(scaled, output, 2) for output in labels.reshape(len(labels), -1).T]
        fits = [Linear(np.diff(pair.weight), np.diff(pair.bias)) for pair in pairs]
    weight = np.concatenate([each.weight for each in fits], 1) / scaler.scale_[:, None]
    bias = np.concatenate([each.bias for each in fits]) - scaler.mean_ @ weight
    return Linear(weight.astype(np.float32), bias.astype(np.float32))


@dataclass(frozen=True)
class PooledRegression(Baseline):
    """A logistic regression on the mean or last token of a layer, before the final norm.

    Attributes:
        token: ``mean`` averages the tokens that probes read; ``last`` takes the last of them.
        layer: ``last`` reads the last layer, ``best`` the best one on the validation texts, and
            ``all`` concatenates all layers.
        penalties: L2 penalties per text; one is chosen on the validation texts.
        iterations: Maximum solver iterations per penalty; stopping early acts as regularisation.
    """

    token: ClassVar[Literal["mean", "last"]]
    layer: ClassVar[Literal["last", "best", "all"]]
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES
    iterations: int = 100

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Choose the penalty and the layer on the validation texts; deterministic."""
        training = dataset.training
        layers = range(dataset.reader.fingerprint.layers)
        layer_choices = {
            "last": [slice(layers[-1], len(layers))],
            "best": [slice(layer, layer + 1) for layer in layers],
            "all": [slice(len(layers))],
        }

        def fitted(layers: slice, penalty: float) -> FittedBaseline:
            linear = fit_logistic(
                self._features(training, layers),
                training.labels,
                dataset.task,
                penalty=penalty,
                iterations=self.iterations,
            )
            return FittedBaseline(
                lambda split: linear(self._features(split, layers)), linear.parameters
            )

        candidates = product(layer_choices[self.layer], self.penalties)
        return best_on_validation((fitted(*candidate) for candidate in candidates), dataset)

    def _features(self, split: Split, layers: slice) -> Float[np.ndarray, "text feature"]:
        means, lasts = pooled_states(split)
        vectors = means if self.token == "mean" else lasts
        return vectors[:, layers].flatten(1).numpy()


class MeanOfLastLayer(PooledRegression):
    title = "Mean token of the last layer, logistic regression"
    token, layer = "mean", "last"


class LastTokenOfLastLayer(PooledRegression):
    title = "Last token of the last layer, logistic regression"
    token, layer = "last", "last"


class MeanOfBestLayer(PooledRegression):
    title = "Mean token of the best layer, logistic regression"
    token, layer = "mean", "best"


class LastTokenOfBestLayer(PooledRegression):
    title = "Last token of the best layer, logistic regression"
    token, layer = "last", "best"


@dataclass(frozen=True)
class MeansOfAllLayers(PooledRegression):
    title: ClassVar[str] = "Mean tokens of all layers, logistic regression"
    token, layer = "mean", "all"
    iterations: int = 30


@dataclass(frozen=True)
class Mlpm(Baseline):
    """Multi-layer prototype moderator (ICML 2026).

    A logistic regression stacks one Gaussian discriminant per layer, which reads the last token. It
    is fitted to out-of-fold scores, so that it learns how far to trust each layer on unseen texts.

    Attributes:
        folds: Number of folds of the training texts; one is left out at a time.
        penalties: L2 penalties of the stacking regression; one is chosen on the validation texts.
    """

    title: ClassVar[str] = "MLPM: Gaussian discriminants of all layers, stacked"
    is_single_pass: ClassVar[bool] = True
    folds: int = 5
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Choose the stacking penalty on the validation texts; ``seed`` determines the folds."""
        task, labels = dataset.task, dataset.training.labels
        folds = dataset.training.examples.folds(self.folds, seed=seed)
        _, lasts = pooled_states(dataset.training)
        layers = [layer.numpy() for layer in lasts.unbind(1)]
        discriminants = [gaussian_discriminant(layer, labels, task) for layer in layers]

        def left_out(layer: np.ndarray) -> Float[np.ndarray, "text output"]:
            return out_of_fold(
                lambda rest, fold: gaussian_discriminant(layer[rest], labels[rest], task)(
                    layer[fold]
                ),
                folds,
                task,
            )

        stacked = np.hstack([left_out(layer) for layer in layers])

        def scores(split: Split) -> Float[np.ndarray, "text score"]:
            _, lasts = pooled_states(split)
            pairs = zip(discriminants, lasts.unbind(1), strict=True)
            return np.hstack([discriminant(layer.numpy()) for discriminant, layer in pairs])

        parameters = sum(linear.parameters for linear in discriminants)

        def fitted(penalty: float) -> FittedBaseline:
            stacker = fit_logistic(stacked, labels, task, penalty=penalty)
            return FittedBaseline(
                lambda split: stacker(scores(split)), parameters + stacker.parameters
            )

        return best_on_validation(map(fitted, self.penalties), dataset)


def out_of_fold(
    fit: Callable[[Int[np.ndarray, " rest"], Int[np.ndarray, " fold"]], np.ndarray],
    folds: Sequence[Int[np.ndarray, " fold"]],
    task: Task,
) -> Float[np.ndarray, "text output"]:
    """Out-of-fold logits: each text is scored by a fit to the other folds.

    Args:
        fit: Function of the rows of the other folds and the rows of the fold; returns the logits of
            the latter.
        folds: Rows of each fold; together, all texts.
        task: The classes.
    """
    texts = np.arange(sum(map(len, folds)))
    logits = np.empty((len(texts), task.outputs), dtype=np.float32)
    for fold in folds:
        logits[fold] = fit(np.setdiff1d(texts, fold), fold)
    return logits
