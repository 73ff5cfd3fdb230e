"""Gaussian discriminants: classes share one covariance, shrunk as the data require."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sidelight.baselines.linear import Linear, Scaling
from sidelight.types import Task


def gaussian_discriminant(
    inputs: Float[Tensor, "text feature"], labels: Int[Tensor, "text ..."], task: Task
) -> Linear:
    """Log posteriors up to a constant; the log-odds for a binary task, and per label otherwise.

    Features are standardised first, so that the covariance shrinks towards equal importance.

    Args:
        inputs: At least one text; a class may have none and is then put at the mean of all.
        labels: As in ``Examples.labels``.
        task: The classes; a multi-label task has a covariance per label.
    """
    scaling = Scaling.measured(inputs)
    scaled = scaling(inputs)
    if task.kind == "multiclass":
        fits = [_discriminant(scaled, labels, classes=task.outputs)]
    else:
        columns = labels.reshape(len(labels), -1).T
        fits = [_log_odds(_discriminant(scaled, column, classes=2)) for column in columns]
    weight = torch.cat([fit.weight for fit in fits], 1)
    return Linear.folded(weight, torch.cat([fit.shift for fit in fits]), scaling)


def shrunk_covariance(
    centred: Float[Tensor, "text feature"],
) -> Float[Tensor, "feature feature"]:
    """Ledoit & Wolf (2004): the covariance, shrunk towards a multiple of the identity, float64.

    Args:
        centred: Deviations from the mean, or from each class's mean.
    """
    texts, features = centred.shape
    covariance = (centred.T @ centred).double() / texts
    size = covariance.trace() / features
    eye = torch.eye(features, dtype=torch.float64)
    spread = (covariance - size * eye).square().sum()
    fourth = centred.square().sum(1).double().square().mean()
    noise = (fourth - covariance.square().sum()).clamp(min=0) / texts
    share = float((noise / spread).clamp(max=1)) if spread > 0 else 1.0
    # A floor, so that texts which are all equal do not make it singular.
    return (1 - share) * covariance + (share * size + 1e-6) * eye


def _discriminant(
    inputs: Float[Tensor, "text feature"], groups: Int[Tensor, " text"], *, classes: int
) -> Linear:
    members = functional.one_hot(groups, classes).float()
    counts = members.sum(0)
    means = (members.T @ inputs) / counts.clamp(min=1)[:, None]
    covariance = shrunk_covariance(inputs - means[groups])
    weight = torch.linalg.solve(covariance, means.T.double()).float()
    # One more text in each class, so that an absent class has a prior.
    prior = ((counts + 1) / (len(inputs) + classes)).log()
    return Linear(weight, prior - (means.T * weight).sum(0) / 2)


def _log_odds(pair: Linear) -> Linear:
    return Linear(pair.weight[:, 1:] - pair.weight[:, :1], pair.shift[1:] - pair.shift[:1])
