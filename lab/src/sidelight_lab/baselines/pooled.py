"""Which layers a single-layer probe should try: ridge regression on each layer's mean token.

Logistic regressions of one vector per text: mean or last token of one layer, or all means.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.objective import validation_score
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.linear import PENALTIES, Linear, Rows, class_targets, fit_logistic

# Of features of variance 1, relative to the mean over texts: from hardly any to mostly penalty.
_PENALTIES = (0.01, 0.1, 1.0, 10.0)


def ranked_layers(dataset: ProbeDataset) -> list[int]:
    """All layers, the best by validation score first; of equals the lower one.

    Closed form, so that all layers take seconds. Each layer is scored with the penalty that suits
    it best. A layer's means are a proxy: a probe that weighs tokens may do better on another layer
    near the top of the list, so train it on a few.
    """
    target = class_targets(torch.from_numpy(dataset.training.labels), dataset.task)
    train, held_out = dataset.training.pooled.means, dataset.validation.pooled.means
    scores = [
        _score(train[:, layer], target, held_out[:, layer], dataset.validation)
        for layer in range(train.shape[1])
    ]
    return sorted(range(len(scores)), key=lambda layer: -scores[layer])


def _score(
    train: Float[Tensor, "text width"],
    target: Float[Tensor, "text output"],
    held_out: Float[Tensor, "held_out width"],
    validation: Split,
) -> float:
    scale, mean = torch.std_mean(train, 0)
    inputs, unseen = ((part - mean) / scale.clamp(min=1e-6) for part in (train, held_out))
    gram = (inputs.T @ inputs / len(inputs)).double()
    moments = (inputs.T @ (target - target.mean(0)) / len(inputs)).double()
    eye = torch.eye(len(gram), dtype=gram.dtype)
    weights = [torch.linalg.solve(gram + penalty * eye, moments) for penalty in _PENALTIES]
    logits = [(unseen @ weight.float() + target.mean(0)).numpy() for weight in weights]
    return max(validation_score(validation.task, each, validation.labels) for each in logits)


Features = Callable[[Split], Float[Tensor, "text feature"]]


@dataclass(frozen=True)
class MeanOfLastLayer(Baseline):
    """Mean token after the last block, before the final norm.

    Attributes:
        penalties: Of the regression, strongest first; validation texts choose.
    """

    title: ClassVar[str] = "Mean token of the last layer, logistic regression"
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the penalty on validation texts; nothing is random."""
        return _best(dataset, [_mean(_last_layer(dataset))], self.penalties)


@dataclass(frozen=True)
class LastTokenOfLastLayer(Baseline):
    """Last token after the last block, before the final norm.

    Attributes:
        penalties: As in ``MeanOfLastLayer``.
    """

    title: ClassVar[str] = "Last token of the last layer, logistic regression"
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the penalty on validation texts; nothing is random."""
        return _best(dataset, [_last_token(_last_layer(dataset))], self.penalties)


@dataclass(frozen=True)
class MeanOfBestLayer(Baseline):
    """Mean token of the layer that does best.

    Attributes:
        penalties: As in ``MeanOfLastLayer``.
    """

    title: ClassVar[str] = "Mean token of the best layer, logistic regression"
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the layer with its penalty on validation texts; nothing is random."""
        return _best(dataset, [_mean(layer) for layer in _all_layers(dataset)], self.penalties)


@dataclass(frozen=True)
class LastTokenOfBestLayer(Baseline):
    """Last token of the layer that does best.

    Attributes:
        penalties: As in ``MeanOfLastLayer``.
    """

    title: ClassVar[str] = "Last token of the best layer, logistic regression"
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the layer with its penalty on validation texts; nothing is random."""
        return _best(
            dataset, [_last_token(layer) for layer in _all_layers(dataset)], self.penalties
        )


@dataclass(frozen=True)
class MeansOfAllLayers(Baseline):
    """Mean tokens of all layers, concatenated.

    Attributes:
        penalties: As in ``MeanOfLastLayer``.
        iterations: The most per penalty. A fit that stops early is a smoother one.
    """

    title: ClassVar[str] = "Mean tokens of all layers, logistic regression"
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES
    iterations: int = 30

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the penalty on validation texts; nothing is random."""
        return _best(dataset, [_all_means], self.penalties, iterations=self.iterations)


@dataclass(frozen=True)
class _Fitted(FittedBaseline):
    linear: Linear
    features: Features

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return self.linear(self.features(split)).numpy()


def _best(
    dataset: ProbeDataset,
    tried: Sequence[Features],
    penalties: tuple[float, ...],
    *,
    iterations: int = 100,
) -> FittedBaseline:
    """The regression on the features that do best; of equals the first."""
    fits = [
        fit_logistic(
            _rows(dataset.training, features),
            _rows(dataset.validation, features),
            dataset.task,
            penalties=penalties,
            iterations=iterations,
        )
        for features in tried
    ]
    best = max(range(len(fits)), key=lambda index: fits[index].score)
    linear = fits[best].linear
    return _Fitted(linear.parameters, linear, tried[best])


def _rows(split: Split, features: Features) -> Rows:
    return Rows(features(split), torch.from_numpy(split.labels))


def _mean(layer: int) -> Features:
    return lambda split: split.pooled.means[:, layer]


def _last_token(layer: int) -> Features:
    return lambda split: split.pooled.lasts[:, layer]


def _all_means(split: Split) -> Float[Tensor, "text feature"]:
    return split.pooled.means.flatten(1)


def _all_layers(dataset: ProbeDataset) -> range:
    return range(dataset.backbone.fingerprint.layers)


def _last_layer(dataset: ProbeDataset) -> int:
    return dataset.backbone.fingerprint.layers - 1
