"""Scaling of hidden states before training: standardisation, and a weight for each layer.

Layers differ in how informative they are for a task. A layer's standardised states are multiplied
by its weight, which sets how fast its parameters are trained, because AdamW's steps do not depend
on the size of a gradient.

A layer's mean and its last token are two *poolings* of a text. The score of a pooling is the R^2,
on held-out texts, of a kernel ridge regression on it alone. The score of a layer is that of its
better pooling; its weight is this score, relative to the best layer's, to the eighth power. The
leave-one-out error of a ridge regression has a closed form (Allen 1974), so this costs a few
eigendecompositions and no validation texts.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sidelight.probes.mechanisms.base import Geometry
from sidelight.probes.standardisation import Standardisation, spread_and_mean
from sidelight.training.dataset import Split
from sidelight.training.settings import TrainingSettings
from sidelight.types import Task

# Enough tokens to estimate a mean to about a hundredth of a standard deviation.
_MOMENT_TOKENS = 8192
# Enough texts to rank poolings by, with a few texts of each of many classes; each pooling needs an
# eigendecomposition.
_TEXTS, _TEXTS_OF_A_CLASS = 300, 4
_MOST_TEXTS = 500
# Enough that a sufficient number is left without a fold.
SAMPLE_TEXTS = 625
# Ridge strengths, relative to the kernel's mean eigenvalue.
_STRENGTHS = tuple(10.0**k for k in np.arange(-2, 1.51, 0.5))
# A class with fewer texts reveals more about these texts than about layers.
_LEAST_OF_A_CLASS = 3
_POWER = 8
# Minimum share of the best layer's weight, so that training can still use any layer.
_LEAST = 0.01


class Scaling:
    """Measurements that probes of the same texts share.

    Args:
        training: All training texts.
        subsets: Texts of each part that probes are trained on.
    """

    def __init__(self, training: Split, subsets: Sequence[Bool[Tensor, " text"]]):
        self._training = training
        self._subsets = subsets
        self._moments = cache(self._measure_moments)
        self._sample = cache(self._draw_sample)
        self._layer_scores = cache(self._measure_layer_scores)

    def standardisation(self, settings: TrainingSettings, subset: int) -> Standardisation:
        """The standardisation for a probe trained on a part of the texts."""
        is_normalised = bool(settings.normalise)
        who = self._training.states.fingerprint
        who.first_layers(settings.layers)
        if not settings.standardise:
            geometry = Geometry(who.layers, who.width, 1)
            unscaled = Standardisation.identity(geometry, is_normalised=is_normalised)
            return unscaled.limited(settings.layers)
        moments = self._moments(is_normalised).deepened(who.layers).limited(settings.layers)
        if settings.layer_weights == "equal":
            return moments
        scores = self._layer_scores(subset, is_normalised)[:, : settings.layers]
        return moments.weighted(layer_weights(scores))

    def _measure_moments(self, is_normalised: bool) -> Standardisation:
        """Mean and scale of each layer's values, from the first shards: random samples of texts."""
        if (compression := self._training.states.compression) is not None:
            assert compression.moments.is_normalised == is_normalised
            return compression.moments
        hidden: list[Tensor] = []
        remaining = _MOMENT_TOKENS
        states = self._training.states
        for shard in map(states.read, states.shards):
            first = shard.hidden[:, :remaining]
            hidden.append(first)
            remaining -= first.shape[1]
            if not remaining:
                break
        # Layer by layer, because all layers in float32 would be large.
        layers = map(torch.cat, zip(*hidden, strict=True))
        return Standardisation.measured(layers, is_normalised=is_normalised)

    def _draw_sample(
        self, is_normalised: bool
    ) -> tuple[Float[Tensor, "view sample layer width"], Int[Tensor, " sample"]]:
        """The poolings of a few hundred distinct texts of the first shards, and the rows of these
        texts.
        """
        is_first = torch.zeros(len(self._training), dtype=torch.bool)
        is_first[self._training.first_rows] = True
        poolings: list[Tensor] = []
        rows: list[Tensor] = []
        states = self._training.states
        for shard in map(states.read, states.shards):
            sampled = is_first[shard.rows].nonzero()[:, 0]
            poolings.append(shard.pooled(is_normalised=is_normalised)[:, sampled])
            rows.append(shard.rows[sampled])
            if sum(map(len, rows)) >= SAMPLE_TEXTS:
                break
        return torch.cat(poolings, 1)[:, :SAMPLE_TEXTS], torch.cat(rows)[:SAMPLE_TEXTS]

    def _measure_layer_scores(
        self, subset: int, is_normalised: bool
    ) -> Float[Tensor, "pooling layer"]:
        """The score of each pooling of each layer for a part's texts."""
        poolings, rows = self._sample(is_normalised)
        if (compression := self._training.states.compression) is not None:
            poolings = compression.lifted(poolings)
        included = self._subsets[subset][rows].nonzero()[:, 0]
        labels = self._training.labels[rows[included].numpy()]
        return layer_scores(poolings[:, included], labels, self._training.task)


def layer_scores(
    poolings: Float[Tensor, "pooling text layer width"],
    labels: Int[np.ndarray, "text ..."],
    task: Task,
) -> Float[Tensor, "pooling layer"]:
    """The score of each layer's means, and of its last tokens; 0 or more.

    Args:
        poolings: Poolings of distinct training texts in random order, of which only the first few
            hundred are used. A duplicate would predict itself.
        labels: Their labels, as in ``LabelledExamples.labels``.
        task: The classes.
    """
    texts = min(_MOST_TEXTS, max(_TEXTS, _TEXTS_OF_A_CLASS * task.outputs))
    target = _centred_targets(labels[:texts], task)
    scores = [
        [max(0.0, _layer_score(layer.contiguous(), target)) for layer in pooling[:texts].unbind(1)]
        for pooling in poolings
    ]
    return torch.tensor(scores, dtype=torch.float64)


def layer_weights(scores: Float[Tensor, "pooling layer"]) -> Float[Tensor, " layer"]:
    """A weight for each layer from its better pooling; the mean square of the weights is 1."""
    weights = relative_weights(scores.amax(0))
    return (weights / weights.square().mean().sqrt()).float()


def _layer_score(
    pooling: Float[Tensor, "text width"], target: Float[Tensor, "text output"]
) -> float:
    """The R^2 of predicting each text from the others; below 0 is worse than the mean."""
    spread, center = spread_and_mean(pooling)
    # A pooling that is constant over texts, such as the template's last embedding; or a single
    # class.
    if spread.max() < 1e-3 * pooling.abs().mean().clamp(min=1e-9) or not target.any():
        return 0.0
    # Dimensions with almost no variance would be amplified.
    inputs = (pooling - center) / (spread + 1e-2 * spread.mean())
    return 1 - _left_out_error(inputs @ inputs.T, target) / float(target.square().sum())


def relative_weights(scores: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Scores relative to the best, to the eighth power; all 1 if no score is positive."""
    if not scores.any():
        return torch.ones_like(scores)
    return ((scores / scores.max()) ** _POWER).clamp(min=_LEAST)


def _centred_targets(labels: np.ndarray, task: Task) -> Float[Tensor, "text output"]:
    """1 if a text has the label, else -1, centred; 0 for a label too rare to distinguish layers."""
    signs = torch.from_numpy(task.targets(labels)).double() * 2 - 1
    rarer = torch.minimum((signs > 0).sum(0), (signs < 0).sum(0))
    return (signs - signs.mean(0)) * (rarer >= _LEAST_OF_A_CLASS)


def _left_out_error(
    kernel: Float[Tensor, "text text"], target: Float[Tensor, "text output"]
) -> float:
    """Squared error of predicting each text from the others, with the best ridge strength."""
    # The ridge is at least a hundredth of the mean eigenvalue, so the faster float32 suffices.
    values, vectors = torch.linalg.eigh(kernel.float())
    target = target.float()
    turned = vectors.T @ target
    # Without the direction of ones, which an intercept fits, because centred features and targets
    # depend on the left-out text.
    squares = (vectors - vectors.mean(0)).square()
    errors: list[float] = []
    for strength in _STRENGTHS:
        inverse = 1 / (values.clamp(min=0) + strength * values.mean().clamp(min=1e-12))
        dual = vectors @ (inverse[:, None] * turned)
        residual = dual / (squares @ inverse)[:, None]
        errors.append(float(residual.square().sum()))
    return min(errors)
