"""Logistic regression with an L1 penalty, which keeps few features. Knows no hidden states.

SIREN: neurons that sparse probes select in every layer, read by a small network.

MLPM: a Gaussian discriminant on each layer's last token, stacked by a logistic regression.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sidelight.errors import SidelightError
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.objective import make_loss
from sidelight.training.settings import TrainingSettings
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.linear import (
    PENALTIES,
    Linear,
    Rows,
    Scaling,
    best_linear,
    fit_logistic,
    gaussian_discriminant,
    train_small_network,
)

# Standardised features times weights; a closure, since a wide matrix need not exist for it.
Design = Callable[[Float[Tensor, "feature output"]], Float[Tensor, "text output"]]
_Smooth = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sparse:
    """Weights of standardised features, most of them zero.

    Attributes:
        weight: Per feature.
        bias: Not penalised.
    """

    weight: Float[Tensor, "feature output"]
    bias: Float[Tensor, " output"]


def sparse_path(
    design: Design,
    labels: Int[Tensor, "text ..."],
    task: Task,
    *,
    features: int,
    shares: tuple[float, ...],
    iterations: int,
) -> Iterator[Sparse]:
    """One classifier per penalty, each started from the one before.

    Minimises mean loss + penalty * |weight|_1, classes weighted by inverse frequency, by
    accelerated proximal gradient steps (Beck & Teboulle 2009) that forget their momentum when it
    points uphill (O'Donoghue & Candes 2015).

    Args:
        design: Of the training texts.
        labels: Of the same texts, as in ``Examples.labels``.
        task: The classes; the penalty of a multi-label task is the same for all labels.
        features: Number of them.
        shares: Penalties as shares of the weakest one under which all weights are zero; largest
            first.
        iterations: Steps per penalty.

    Raises:
        SidelightError: Some feature is not finite.
    """
    loss = make_loss(task, labels, balanced=True)

    def smooth(point: Float[Tensor, "row output"]) -> Float[Tensor, ""]:
        return loss(design(point[:-1]) + point[-1], labels)

    start = torch.zeros(features + 1, task.outputs)  # the last row is the bias
    strongest = float(_slope(smooth, start).gradient[:-1].abs().max())
    if not math.isfinite(strongest):
        raise SidelightError(
            "A sparse regression cannot be fitted: some feature is not finite. Load the backbone "
            "with --dtype float32."
        )
    state = _State(start, start, 1.0, 1.0)
    for share in shares:
        state = _State(state.point, state.point, 1.0, state.step)
        shrink = partial(_shrink, penalty=share * strongest)
        for _ in range(iterations):
            state = _advance(state, smooth, shrink)
        yield Sparse(state.point[:-1], state.point[-1])


@dataclass(frozen=True)
class _State:
    """``ahead`` is the point plus its momentum; ``step`` is the size that was last accepted."""

    point: Float[Tensor, "row output"]
    ahead: Float[Tensor, "row output"]
    momentum: float
    step: float


def _advance(state: _State, smooth: _Smooth, shrink: Callable[..., Tensor]) -> _State:
    slope, step = _slope(smooth, state.ahead), state.step
    while True:
        point = shrink(state.ahead - step * slope.gradient, step=step)
        move = point - state.ahead
        bound = slope.value + (slope.gradient * move).sum() + move.square().sum() / (2 * step)
        # Float32 cannot tell apart losses closer than this.
        if smooth(point) <= bound + 1e-6 * slope.value.abs():
            break
        step /= 2
    if ((state.ahead - point) * (point - state.point)).sum() > 0:
        return _State(point, point, 1.0, step)
    momentum = (1 + (1 + 4 * state.momentum**2) ** 0.5) / 2
    push = (state.momentum - 1) / momentum
    return _State(point, point + push * (point - state.point), momentum, step)


@dataclass(frozen=True)
class _Slope:
    value: Float[Tensor, ""]
    gradient: Float[Tensor, "row output"]


def _slope(smooth: _Smooth, point: Float[Tensor, "row output"]) -> _Slope:
    leaf = point.detach().requires_grad_()
    value = smooth(leaf)
    return _Slope(value.detach(), torch.autograd.grad(value, leaf)[0])


def _shrink(point: Tensor, *, step: float, penalty: float) -> Tensor:
    """The proximal step: weights move towards zero, the bias does not."""
    weight = point[:-1]
    small = (weight.abs() - step * penalty).clamp(min=0)
    return torch.cat([weight.sign() * small, point[-1:]])


_SETTINGS = TrainingSettings(epochs=20, patience=4, batch_size=64, class_weight="balanced")


@dataclass(frozen=True)
class Siren(Baseline):
    """Safeguard with internal representations (Jiao et al., ACL 2026, arXiv 2604.18519).

    An L1 probe on each layer's mean token selects that layer's neurons: the fewest that hold a
    share of the probe's absolute weight. The selected neurons of all layers, standardised and
    multiplied by their layer's validation score relative to the best one's, are the input of a
    network with one hidden layer.

    Attributes:
        shares: Penalties of the probes; see ``sparse_path``. Validation texts choose, per layer.
        iterations: Steps per penalty.
        kept: Share of a probe's absolute weight that the selected neurons hold.
        hidden: Units of the hidden layer.
        settings: Of the network's training.
    """

    title: ClassVar[str] = "SIREN: selected neurons of all layers, small network"
    is_single_pass: ClassVar[bool] = True
    shares: tuple[float, ...] = (0.1, 0.03)
    iterations: int = 40
    kept: float = 0.9
    hidden: int = 256
    settings: TrainingSettings = _SETTINGS

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses penalties, layer weights and the network's epoch on validation texts.

        Raises:
            SidelightError: No neuron tells the classes apart.
        """
        probes = [
            self._probe(dataset, layer) for layer in range(dataset.backbone.fingerprint.layers)
        ]
        neurons = _Neurons.of(probes, dataset.training)
        network = train_small_network(
            _rows(dataset.training, neurons),
            _rows(dataset.validation, neurons),
            dataset.task,
            hidden=self.hidden,
            settings=self.settings,
            seed=seed,
        )
        # The affine scaling folds into the first layer, so it does not count.
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return _SirenFitted(parameters, neurons, network)

    def _probe(self, dataset: ProbeDataset, layer: int) -> "_Probe":
        inputs, unseen = (
            split.pooled.means[:, layer] for split in (dataset.training, dataset.validation)
        )
        scaling = Scaling.measured(inputs)
        labels = torch.from_numpy(dataset.training.labels)
        path = list(
            sparse_path(
                scaling(inputs).matmul,
                labels,
                dataset.task,
                features=inputs.shape[1],
                shares=self.shares,
                iterations=self.iterations,
            )
        )
        chosen = best_linear(
            [Linear.folded(sparse.weight, sparse.bias, scaling) for sparse in path],
            Rows(unseen, torch.from_numpy(dataset.validation.labels)),
            dataset.task,
        )
        # Back to the weights of standardised neurons, which are comparable.
        weight = chosen.linear.weight.abs().sum(1) * scaling.scale
        return _Probe(_heaviest(weight, share=self.kept), chosen.score)


@dataclass(frozen=True)
class _Probe:
    selected: Bool[Tensor, " width"]
    score: float


@dataclass(frozen=True, eq=False)
class _Neurons:
    """The selected neurons of all layers, standardised and weighted."""

    selected: Bool[Tensor, "layer width"]
    scaling: Scaling

    @staticmethod
    def of(probes: list[_Probe], training: Split) -> "_Neurons":
        selected = torch.stack([probe.selected for probe in probes])
        if not selected.any():
            raise SidelightError(
                "SIREN found no neuron that tells the classes apart. Are all training texts of one "
                "class? Add texts of another."
            )
        # Above zero, should no probe name a single class right.
        best = max(1e-9, *(probe.score for probe in probes))
        strengths = torch.tensor([probe.score / best for probe in probes])
        weights = strengths[:, None].expand_as(selected)[selected]
        measured = Scaling.measured(training.pooled.means[:, selected])
        return _Neurons(selected, Scaling(measured.mean, measured.scale / weights))

    def __call__(self, split: Split) -> Float[Tensor, "text neuron"]:
        return self.scaling(split.pooled.means[:, self.selected])


@dataclass(frozen=True)
class _SirenFitted(FittedBaseline):
    neurons: _Neurons
    network: nn.Module

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return self.network(self.neurons(split)).numpy()


def _rows(split: Split, neurons: _Neurons) -> Rows:
    return Rows(neurons(split), torch.from_numpy(split.labels))


def _heaviest(weight: Float[Tensor, " width"], *, share: float) -> Bool[Tensor, " width"]:
    """The fewest neurons that hold a share of the total weight; none if that is zero."""
    ordered = weight.sort(descending=True)
    before = ordered.values.cumsum(0) - ordered.values
    needed = before < share * weight.sum()
    return torch.zeros_like(needed).scatter(0, ordered.indices, needed)


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

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the stacking penalty on validation texts; the seed draws the folds."""
        training, task = dataset.training, dataset.task
        states, labels = training.pooled.lasts, torch.from_numpy(training.labels)
        layers = _fit_layers(states, labels, task)
        fold = _folds(labels, self.folds, seed=seed)
        stacker = fit_logistic(
            Rows(_out_of_fold(states, labels, task, fold), labels),
            Rows(
                _scores(layers, dataset.validation.pooled.lasts),
                torch.from_numpy(dataset.validation.labels),
            ),
            task,
            penalties=self.penalties,
        ).linear
        parameters = stacker.parameters + sum(layer.parameters for layer in layers)
        return _MlpmFitted(parameters, tuple(layers), stacker)


@dataclass(frozen=True)
class _MlpmFitted(FittedBaseline):
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
