"""Fits a probe's ``Distance``: what is familiar is what training has shown, but for disguises."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LinearRegression

from sidelight.mechanisms.base import Geometry
from sidelight.mechanisms.distance import Distance
from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.validation import FOLDS

# Of familiar texts that no fold has seen, so many are farther away than the limit.
UNFAMILIAR_RATE = 0.015
# Fewer say too little of a limit, and more no more of a mean and a precision.
_LEAST_TEXTS, _MOST_TEXTS = 50, 2000


@torch.inference_mode()
def fit_distance(dataset: ProbeDataset) -> Distance | None:
    """The distance from familiar texts, with a limit that few left-out ones exceed.

    None without background, since ordinary traffic would be unfamiliar, or with few texts.
    """
    chosen = np.random.default_rng(0).permutation(dataset.familiar)[:_MOST_TEXTS]
    if len(chosen) < _LEAST_TEXTS:
        return None
    part = dataset.training.select(chosen)
    folds = part.folds(FOLDS)
    if not folds:
        return None
    sizes = part.states.fingerprint
    distance = Distance(Geometry(sizes.layers, sizes.width, 1))
    state = _state(distance, part)
    means = distance.means(state)
    features = means.flatten(1).double().numpy()
    squares = np.empty(len(features))
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(features)), fold)
        squares[fold] = _gaussian(features[rest]).mahalanobis(features[fold])
    tokens = state.values[:, 0, 0].double().numpy()
    limit = _limit(squares, np.stack([np.ones_like(tokens), 1 / tokens], 1))
    gaussian = _gaussian(features)
    distance.centre.copy_(torch.from_numpy(gaussian.location_).view_as(distance.centre))
    distance.factor.copy_(torch.from_numpy(np.linalg.cholesky(gaussian.precision_)))
    distance.limit.copy_(torch.from_numpy(limit))
    return distance


def _state(distance: Distance, part: Split) -> Ragged:
    """Of each text."""
    states: list[Ragged] = []
    scaling = Standardisation.identity(distance.geometry, is_normalised=True)
    projection = scaling.fold(distance.columns())
    for row in part.rows.tolist():
        columns = projection.layers(part.states.text(row).float()).transpose(0, 1)
        states.append(distance.summarise(Ragged(columns, torch.tensor([len(columns)]))))
    return Ragged.pack(states)


def _gaussian(features: Float[np.ndarray, "text feature"]) -> Any:
    """Shrunk, since there are few texts for a covariance."""
    return LedoitWolf().fit(features)


def _limit(
    squares: Float[np.ndarray, " text"], terms: Float[np.ndarray, "text 2"]
) -> Float[np.ndarray, " 2"]:
    """a and b: their shares by the relative error, their size by the rate."""
    regression: Any = LinearRegression(positive=True, fit_intercept=False)
    shares = regression.fit(terms, squares, sample_weight=squares**-2).coef_
    return shares * np.quantile(squares / (terms @ shares), 1 - UNFAMILIAR_RATE)
