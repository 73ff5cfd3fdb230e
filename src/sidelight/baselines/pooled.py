"""Logistic regressions of one vector per text: mean or last token of one layer, or all means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.linear import Linear, Rows
from sidelight.baselines.logistic import PENALTIES, fit_logistic
from sidelight.study import Split, Study

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

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the penalty on validation texts; nothing is random."""
        return _best(study, [_mean(_last_layer(study))], self.penalties)


@dataclass(frozen=True)
class LastTokenOfLastLayer(Baseline):
    """Last token after the last block, before the final norm.

    Attributes:
        penalties: As in ``MeanOfLastLayer``.
    """

    title: ClassVar[str] = "Last token of the last layer, logistic regression"
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the penalty on validation texts; nothing is random."""
        return _best(study, [_last_token(_last_layer(study))], self.penalties)


@dataclass(frozen=True)
class MeanOfBestLayer(Baseline):
    """Mean token of the layer that does best.

    Attributes:
        penalties: As in ``MeanOfLastLayer``.
    """

    title: ClassVar[str] = "Mean token of the best layer, logistic regression"
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the layer with its penalty on validation texts; nothing is random."""
        return _best(study, [_mean(layer) for layer in _all_layers(study)], self.penalties)


@dataclass(frozen=True)
class LastTokenOfBestLayer(Baseline):
    """Last token of the layer that does best.

    Attributes:
        penalties: As in ``MeanOfLastLayer``.
    """

    title: ClassVar[str] = "Last token of the best layer, logistic regression"
    is_single_pass: ClassVar[bool] = True
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the layer with its penalty on validation texts; nothing is random."""
        return _best(study, [_last_token(layer) for layer in _all_layers(study)], self.penalties)


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

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the penalty on validation texts; nothing is random."""
        return _best(study, [_all_means], self.penalties, iterations=self.iterations)


@dataclass(frozen=True)
class _Fitted(Rival):
    linear: Linear
    features: Features

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return self.linear(self.features(split)).numpy()


def _best(
    study: Study, tried: Sequence[Features], penalties: tuple[float, ...], *, iterations: int = 100
) -> Rival:
    """The regression on the features that do best; of equals the first."""
    fits = [
        fit_logistic(
            _rows(study.training, features),
            _rows(study.validation, features),
            study.task,
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


def _all_layers(study: Study) -> range:
    return range(study.backbone.fingerprint.layers)


def _last_layer(study: Study) -> int:
    return study.backbone.fingerprint.layers - 1
