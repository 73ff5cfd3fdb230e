"""MLPM: a Gaussian discriminant on each layer's last token, stacked by a logistic regression."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.gaussian import gaussian_discriminant
from sidelight.baselines.linear import Linear, Rows
from sidelight.baselines.logistic import PENALTIES, fit_logistic
from sidelight.study import Split, Study
from sidelight.types import Task


@dataclass(frozen=True)
class Mlpm(Baseline):
    """Multi-layer prototype moderator (ICML 2026).

    The stacking regression is fitted to out-of-fold discriminants of the training texts, so that it
    learns how far to trust each layer on texts that the layer has not seen.

    Attributes:
        folds: Parts of the training texts; one is left out at a time.
        penalties: Of the stacking regression, strongest first; validation texts choose.
    """

    title: ClassVar[str] = "MLPM: Gaussian discriminants of all layers, stacked"
    is_single_pass: ClassVar[bool] = True
    folds: int = 5
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the stacking penalty on validation texts; the seed draws the folds."""
        training, task = study.training, study.task
        states, labels = training.pooled.lasts, torch.from_numpy(training.labels)
        layers = _fit_layers(states, labels, task)
        fold = _folds(labels, self.folds, seed=seed)
        stacker = fit_logistic(
            Rows(_out_of_fold(states, labels, task, fold), labels),
            Rows(
                _scores(layers, study.validation.pooled.lasts),
                torch.from_numpy(study.validation.labels),
            ),
            task,
            penalties=self.penalties,
        ).linear
        parameters = stacker.parameters + sum(layer.parameters for layer in layers)
        return _Fitted(parameters, tuple(layers), stacker)


@dataclass(frozen=True)
class _Fitted(Rival):
    layers: tuple[Linear, ...]
    stacker: Linear

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return self.stacker(_scores(self.layers, split.pooled.lasts)).numpy()


def _fit_layers(
    states: Float[Tensor, "text layer width"], labels: Int[Tensor, "text ..."], task: Task
) -> list[Linear]:
    return [gaussian_discriminant(layer, labels, task) for layer in states.unbind(1)]


def _scores(
    layers: Sequence[Linear], states: Float[Tensor, "text layer width"]
) -> Float[Tensor, "text score"]:
    """Every layer's discriminants side by side."""
    return torch.cat(
        [layer(inputs) for layer, inputs in zip(layers, states.unbind(1), strict=True)], 1
    )


def _out_of_fold(
    states: Float[Tensor, "text layer width"],
    labels: Int[Tensor, "text ..."],
    task: Task,
    folds: Int[Tensor, " text"],
) -> Float[Tensor, "text score"]:
    """Each text's scores from discriminants that were fitted without its fold."""
    scores = torch.empty(len(states), states.shape[1] * task.outputs)
    for fold in folds.unique():
        unseen = folds == fold
        layers = [
            gaussian_discriminant(layer[~unseen], labels[~unseen], task)
            for layer in states.unbind(1)
        ]
        scores[unseen] = _scores(layers, states[unseen])
    return scores


def _folds(labels: Int[Tensor, "text ..."], count: int, *, seed: int) -> Int[Tensor, " text"]:
    """A random fold for each text; texts of the same labels are spread evenly."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kinds = labels.reshape(len(labels), -1).unique(dim=0, return_inverse=True)[1]
    order = shuffled[kinds[shuffled].argsort(stable=True)]
    folds = torch.empty(len(labels), dtype=torch.long)
    folds[order] = torch.arange(len(labels)) % count
    return folds
