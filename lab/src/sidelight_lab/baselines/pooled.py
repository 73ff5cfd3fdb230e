"""Baselines on one vector per text and layer: its mean token or its last one."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.optimisation import validation_score
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.linear import (
    PENALTIES,
    fit_logistic,
    gaussian_discriminant,
)


@dataclass(frozen=True)
class PooledRegression(Baseline):
    """A logistic regression on the mean or last token of a layer, before the final norm.

    Attributes:
        token: Whether it reads the mean of the tokens that probes read, or the last of them.
        layer: Whether it reads the last layer, the best one on validation texts, or all of them
            side by side.
        penalties: L2 penalties per text; validation texts choose one.
        iterations: Maximum solver iterations per penalty; stopping early acts as regularisation.
    """

    token: ClassVar[Literal["mean", "last"]]
    layer: ClassVar[Literal["last", "best", "all"]]
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES
    iterations: int = 100

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses penalty and layer on validation texts; nothing is random."""
        training, validation = dataset.training, dataset.validation
        layers = dataset.backbone.fingerprint.layers
        if self.layer == "last":
            tried = [slice(layers - 1, layers)]
        elif self.layer == "all":
            tried = [slice(layers)]
        else:
            tried = [slice(layer, layer + 1) for layer in range(layers)]
        best_score, best = -1.0, None
        for part in tried:
            unseen = self._features(validation, part)
            for penalty in self.penalties:
                linear = fit_logistic(
                    self._features(training, part),
                    training.labels,
                    dataset.task,
                    penalty=penalty,
                    iterations=self.iterations,
                )
                score = validation_score(dataset.task, linear(unseen), validation.labels)
                if score > best_score:
                    best_score, best = score, (linear, part)
        assert best is not None
        linear, part = best
        return FittedBaseline(lambda split: linear(self._features(split, part)), linear.parameters)

    def _features(self, split: Split, layers: slice) -> Float[np.ndarray, "text feature"]:
        pooled = split.pooled.means if self.token == "mean" else split.pooled.lasts
        return pooled[:, layers].flatten(1).numpy()


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

    A logistic regression stacks a Gaussian discriminant of each layer's last token. It is fitted to
    out-of-fold scores, so that it learns how far to trust each layer on texts that the layer has
    not seen.

    Attributes:
        folds: Number of parts of the training texts; one is left out at a time.
        penalties: L2 penalties of the stacking regression; validation texts choose one.
    """

    title: ClassVar[str] = "MLPM: Gaussian discriminants of all layers, stacked"
    is_single_pass: ClassVar[bool] = True
    folds: int = 5
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the stacking penalty on validation texts; the seed draws the folds."""
        task, labels = dataset.task, dataset.training.labels
        folds = _folds(labels, self.folds, seed=seed)
        layers = [part.numpy() for part in dataset.training.pooled.lasts.unbind(1)]
        discriminants = [gaussian_discriminant(layer, labels, task) for layer in layers]
        stacked = np.hstack([_out_of_fold(layer, labels, task, folds) for layer in layers])

        def scores(split: Split) -> Float[np.ndarray, "text score"]:
            parts = zip(discriminants, split.pooled.lasts.unbind(1), strict=True)
            return np.hstack([discriminant(part.numpy()) for discriminant, part in parts])

        unseen, unseen_labels = scores(dataset.validation), dataset.validation.labels
        stacker = max(
            (fit_logistic(stacked, labels, task, penalty=penalty) for penalty in self.penalties),
            key=lambda linear: validation_score(task, linear(unseen), unseen_labels),
        )
        parameters = sum(linear.parameters for linear in (*discriminants, stacker))
        return FittedBaseline(lambda split: stacker(scores(split)), parameters)


def _out_of_fold(
    inputs: Float[np.ndarray, "text width"],
    labels: Int[np.ndarray, "text ..."],
    task: Task,
    folds: Int[np.ndarray, " text"],
) -> Float[np.ndarray, "text output"]:
    """Each text's scores by a discriminant that was fitted without its fold."""
    scores = np.empty((len(inputs), task.outputs), dtype=np.float32)
    for fold in np.unique(folds):
        left_out = folds == fold
        linear = gaussian_discriminant(inputs[~left_out], labels[~left_out], task)
        scores[left_out] = linear(inputs[left_out])
    return scores


def _folds(
    labels: Int[np.ndarray, "text ..."], count: int, *, seed: int
) -> Int[np.ndarray, " text"]:
    """A random fold for each text; texts of the same labels are spread evenly."""
    kinds = np.unique(labels.reshape(len(labels), -1), axis=0, return_inverse=True)[1].ravel()
    order = np.lexsort((np.random.default_rng(seed).random(len(labels)), kinds))
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = np.arange(len(labels)) % count
    return folds
