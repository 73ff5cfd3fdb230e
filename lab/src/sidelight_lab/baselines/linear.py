"""A logistic regression on means and last tokens of all layers, at its optimum.

There are some ten thousand features and few texts, so the regression is solved in the space that
the texts span: their kernel's eigenvectors are the features (the representer theorem; Schölkopf,
Herbrich & Smola 2001), and an L2 penalty there is the same as on the weights. Of many texts, a
random part spans the space (Williams & Seeger 2000), which is exact up to ``_LANDMARKS`` texts.
Cross-validated log loss chooses the penalty, along the path from the strongest to the weakest.

Each view of a layer (its means, its last tokens) is weighed by how well it alone predicts left-out
texts, as ``training/scaling.py`` weighs layers for a readout. That matters most with few texts.
A fold that chooses the penalty has weights of its own, which its
labels did not make: a kernel is a weighted sum of the layers' kernels, so one pass over the layers
gives those of all folds.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sidelight.calibration import link
from sidelight.metrics import log_losses
from sidelight.standardisation import spread_and_mean
from sidelight.states.cache import Pooled
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.scaling import relative_weights, view_worths
from sidelight.training.validation import FOLDS
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.pooled import pooled_states

# Strengths are scikit-learn's C where a text's features have a mean square of 1 in all.
STRENGTHS = tuple(float(10**k) for k in np.arange(-1, 4.1, 0.5))
_LANDMARKS = 2048
# Of so many, one fold is enough to choose a strength by.
_MANY_TEXTS = 2048
_ITERATIONS = 100
# Of the solution, and of those that are only compared: the gradient where Newton's method stops, in
# multiples of the root of the penalty. The weaker the penalty, the farther a gradient may still go.
_PRECISION, _PATH_PRECISION = 1e-4, 1e-3
# Of a kernel in float32: smaller eigenvalues are rounding.
_LEAST_EIGENVALUE = 1e-6
# Texts that are added to each side of a label that all texts of a part have, or none.
_PRIOR = 0.5


@dataclass(frozen=True)
class LinearSolution:
    """logits = bias + sum_l (value_l . mean_l + last_l . last token_l), of the given states.

    Attributes:
        strength: The inverse of the penalty, that was given or chosen.
        losses: Cross-validated log loss by strength; empty if the strength was given.
        left_out: The logits of each text by the regression of the other folds, at that strength;
            None if it was given.
    """

    value: Float[Tensor, "layer width output"]
    last: Float[Tensor, "layer width output"]
    bias: Float[Tensor, " output"]
    strength: float
    losses: Mapping[float, float] = field(default_factory=dict[float, float])
    left_out: Float[np.ndarray, "text output"] | None = None

    def logits(self, pooled: Pooled) -> Float[np.ndarray, "text output"]:
        """Of texts' pooled states as they are."""
        pairs = ((pooled.means, self.value), (pooled.lasts, self.last))
        products = (torch.einsum("tld,ldc->tc", vectors, weight) for vectors, weight in pairs)
        return (sum(products) + self.bias).numpy()


@dataclass(frozen=True)
class KernelRegression(Baseline):
    title: ClassVar[str] = "Mean and last tokens of all layers, logistic regression"
    is_single_pass: ClassVar[bool] = True

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Folds of the training texts choose the penalty; nothing is random."""
        solution = solve_split(dataset.training)
        parameters = solution.value.numel() + solution.last.numel() + solution.bias.numel()
        return FittedBaseline(lambda split: solution.logits(views_of(split)), parameters)


def views_of(split: Split) -> Pooled:
    """Pooled states; unless there are several classes, of normalised states, as a probe's."""
    return pooled_states(split, is_normalised=split.task.kind != "multiclass")


def solve_split(split: Split) -> LinearSolution:
    """Fits the regression to a split; each text counts as in the training of a probe."""
    folds = split.folds(FOLDS)
    return solve_linear(
        views_of(split),
        split.labels,
        split.task,
        folds=folds[:1] if len(split) > _MANY_TEXTS else folds,
        weights=split.weights,
        counted=np.random.default_rng(0).permutation(split.first_rows),
    )


def solve_linear(
    pooled: Pooled,
    labels: Int[np.ndarray, "text ..."],
    task: Task,
    *,
    folds: Sequence[Int[np.ndarray, " _"]] = (),
    strength: float | None = None,
    worths: Float[Tensor, "view layer"] | None = None,
    weights: Float[np.ndarray, " text"] | None = None,
    counted: Int[np.ndarray, " _"] | None = None,
    balanced: bool = False,
) -> LinearSolution:
    """Fits the regression to texts.

    Args:
        pooled: Two vectors of each text and layer.
        labels: As in ``LabelledExamples.labels``.
        task: The classes.
        folds: Indices of the texts of each fold that choose the strength.
        strength: Scikit-learn's C; None lets the folds choose.
        worths: What each view of each layer is worth; None measures it (``view_worths``).
        weights: How much each text counts; None: all count the same.
        counted: The texts to measure ``worths`` on, in random order, for all texts and for those
            without a fold: texts of which none is a near-duplicate of another. None takes any.
        balanced: Whether each class is weighed by its inverse frequency.
    """
    texts = len(labels)
    landmarks = torch.randperm(texts, generator=torch.Generator().manual_seed(0))[:_LANDMARKS]
    counted = landmarks.numpy() if counted is None else counted
    folds = () if strength is not None else folds

    def weights_without(fold: Int[np.ndarray, " _"]) -> Float[Tensor, "view layer"]:
        kept = np.setdiff1d(counted, fold, assume_unique=True)
        return _weights(view_worths(pooled.chosen(torch.from_numpy(kept)), labels[kept], task))

    of_layers = weights_without(np.empty(0, np.int64)) if worths is None else _weights(worths)
    weights = np.ones(texts) if weights is None else weights
    views = [_View.of(vectors) for vectors in (pooled.means, pooled.lasts)]
    kernel, *kernels = _kernels(views, [of_layers, *map(weights_without, folds)], landmarks)
    losses: dict[float, float] = {}
    left_out = None
    if folds:
        coordinates = [
            _coordinates_without(fold, kernel_without, landmarks)
            for fold, kernel_without in zip(folds, kernels, strict=True)
        ]
        losses, left_out = _path(folds, coordinates, labels, task, weights, balanced=balanced)
        strength = min(losses, key=losses.__getitem__)
    elif strength is None:
        strength = 1.0
    whitening = _whitening(kernel[landmarks])
    coordinates = (kernel @ whitening).numpy()
    views = [view.weighted(own) for view, own in zip(views, of_layers, strict=True)]
    regression = _Regression(task, strength, balanced=balanced)
    weight, bias = regression.fit(coordinates, labels, weights)
    dual = whitening @ torch.from_numpy(weight)  # (landmark, output)
    bias = torch.from_numpy(bias)
    value, last = (view.weight(landmarks, dual) for view in views)
    for view, parameter in zip(views, (value, last), strict=True):
        bias = bias - torch.einsum("ld,ldc->c", view.center.double(), parameter.double())
    return LinearSolution(value, last, bias, strength, losses, left_out)


@dataclass(frozen=True)
class _View:
    """One vector of each text and layer, and what centres and scales it."""

    vectors: Float[Tensor, "text layer width"]
    center: Float[Tensor, "layer width"]
    inverse: Float[Tensor, "layer width"]

    @staticmethod
    def of(vectors: Float[Tensor, "text layer width"]) -> "_View":
        spread, center = spread_and_mean(vectors)
        size = spread.mean(1, keepdim=True)
        # Dimensions that hardly vary would be blown up. A view that is the same for all texts, such
        # as the template's last embedding, says nothing.
        inverse = 1 / (spread + 1e-2 * size)
        told = spread.amax(1) >= 1e-3 * vectors.abs().mean((0, 2)).clamp(min=1e-9)
        inverse = torch.where(told[:, None], inverse, 0.0)
        # A text's squares in a layer add up to 1 on average.
        norm = (spread * inverse).square().sum(1, keepdim=True).sqrt()
        return _View(vectors, center, inverse / norm.clamp(min=1e-9))

    def weighted(self, weights: Float[Tensor, " layer"]) -> "_View":
        """With each layer's kernel multiplied by its weight."""
        return replace(self, inverse=self.inverse * weights.float().sqrt()[:, None])

    def layer(
        self, layer: int, texts: Int[Tensor, " text"] | slice = slice(None)
    ) -> Float[Tensor, "text width"]:
        return (self.vectors[texts, layer] - self.center[layer]) * self.inverse[layer]

    def weight(
        self, landmarks: Int[Tensor, " landmark"], dual: Float[Tensor, "landmark output"]
    ) -> Float[Tensor, "layer width output"]:
        """The weights of the vectors as they are."""
        layers = range(self.vectors.shape[1])
        products = [self.layer(layer, landmarks).T @ dual.float() for layer in layers]
        return torch.stack(products) * self.inverse[..., None]


def _weights(worths: Float[Tensor, "view layer"]) -> Float[Tensor, "view layer"]:
    """Of the kernels that are summed; 1 in all."""
    weights = relative_weights(worths)
    return weights / weights.sum()


def _kernels(
    views: Sequence[_View],
    weights: Sequence[Float[Tensor, "view layer"]],
    landmarks: Int[Tensor, " landmark"],
) -> list[Float[Tensor, "text landmark"]]:
    """Each text's product with each landmark, over all layers, by each of the weights."""
    shape = (len(views[0].vectors), len(landmarks))
    # The first solves; the others are only compared, and would take much memory.
    kernels = [torch.zeros(shape, dtype=torch.float64)]
    kernels += [torch.zeros(shape) for _ in weights[1:]]
    for index, view in enumerate(views):
        for layer in range(view.vectors.shape[1]):
            features = view.layer(layer)
            products = features @ features[landmarks].T
            for kernel, of_views in zip(kernels, weights, strict=True):
                kernel.add_(products, alpha=float(of_views[index, layer]))
    return kernels


def _whitening(
    kernel: Float[Tensor, "landmark landmark"],
) -> Float[Tensor, "landmark coordinate"]:
    """From products with landmarks to coordinates whose products are the kernel."""
    values, vectors = torch.linalg.eigh(kernel)
    # In rising order; none if a fold has all texts.
    kept = values > _LEAST_EIGENVALUE * values[-1:].clamp(min=1e-9)
    return vectors[:, kept] / values[kept].sqrt()


def _coordinates_without(
    fold: Int[np.ndarray, " _"],
    kernel: Float[Tensor, "text landmark"],
    landmarks: Int[Tensor, " landmark"],
) -> Float[np.ndarray, "text coordinate"]:
    """The coordinates of all texts in the space that those outside a fold span."""
    spans = torch.from_numpy(~np.isin(landmarks.numpy(), fold))
    products = kernel[:, spans]
    return (products @ _whitening(products[landmarks[spans]])).numpy()


def _path(
    folds: Sequence[Int[np.ndarray, " _"]],
    coordinates: Sequence[Float[np.ndarray, "text _"]],
    labels: Int[np.ndarray, "text ..."],
    task: Task,
    weights: Float[np.ndarray, " text"],
    *,
    balanced: bool,
) -> tuple[dict[float, float], Float[np.ndarray, "text output"]]:
    """The log loss of left-out texts by strength, until it rises, and the logits of the best."""
    covered = np.concatenate(folds)
    losses: dict[float, float] = {}
    best = np.zeros((len(labels), task.outputs))
    regressions = [
        _Regression(task, STRENGTHS[0], balanced=balanced, precision=_PATH_PRECISION) for _ in folds
    ]
    for strength in STRENGTHS:
        logits = np.empty((len(labels), task.outputs))
        for regression, fold, inputs in zip(regressions, folds, coordinates, strict=True):
            regression.strength = strength
            rest = np.setdiff1d(np.arange(len(labels)), fold)
            weight, bias = regression.fit(inputs[rest], labels[rest], weights[rest])
            logits[fold] = inputs[fold] @ weight + bias
        chance = link(task.kind, logits[covered])
        each = log_losses(task, chance, labels[covered])
        losses[strength] = float(np.average(each, weights=weights[covered]))
        least = min(losses.values())
        if losses[strength] == least:
            best = logits
        if losses[strength] > 1.1 * least:
            break
    return losses, best


class _Regression:
    """A logistic regression of a task; one for each label of a multi-label task."""

    def __init__(
        self, task: Task, strength: float, *, balanced: bool, precision: float = _PRECISION
    ):
        self.task = task
        self.strength = strength
        self._precision = precision
        self._models: list[Any] = [
            LogisticRegression(
                class_weight="balanced" if balanced else None,
                solver="newton-cg",
                max_iter=_ITERATIONS,
                warm_start=True,
            )
            for _ in range(task.outputs if task.kind == "multilabel" else 1)
        ]

    def fit(
        self,
        inputs: Float[np.ndarray, "text coordinate"],
        labels: Int[np.ndarray, "text ..."],
        weights: Float[np.ndarray, " text"],
    ) -> tuple[Float[np.ndarray, "coordinate output"], Float[np.ndarray, " output"]]:
        """Weights and biases; the next fit begins where this one ended."""
        targets = labels.T if self.task.kind == "multilabel" else labels[None]
        pairs = zip(self._models, targets, strict=True)
        matrices, biases = zip(*(self._fit(*pair, inputs, weights) for pair in pairs), strict=True)
        return np.concatenate(matrices, 1), np.concatenate(biases)

    def _fit(
        self, model: Any, target: np.ndarray, inputs: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        outputs = self.task.outputs if self.task.kind == "multiclass" else 1
        counts = np.bincount(target, minlength=max(outputs, 2))
        weight = np.zeros((inputs.shape[1], outputs))
        # What is left where there is nothing to tell apart: the shares of the classes.
        bias = np.log(counts + _PRIOR)
        bias = bias - bias.mean() if outputs > 1 else np.diff(bias)
        present = np.flatnonzero(counts)
        if len(present) < 2 or not inputs.shape[1]:
            return weight, bias
        with warnings.catch_warnings():
            # In float32, rounding can end a fit of the path before the tolerance does.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "Line Search failed")
            tolerance = self._precision / math.sqrt(self.strength * len(target))
            model.set_params(C=self.strength, tol=tolerance).fit(inputs, target, weights)
        if outputs == 1:
            return model.coef_.T, model.intercept_
        if len(present) == 2:
            # scikit-learn gives the second of two classes' log-odds.
            weight[:, present] = model.coef_.T * [[-0.5, 0.5]]
            bias[present] = model.intercept_ * [-0.5, 0.5]
        else:
            weight[:, present] = model.coef_.T
            bias[present] = model.intercept_
        absent = counts == 0
        if absent.any():
            bias[absent] = bias[present].min() + np.log(_PRIOR / len(target))
        return weight, bias
