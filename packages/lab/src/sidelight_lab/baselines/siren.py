"""SIREN: a small network on the neurons that sparse probes select in each layer."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sidelight.errors import SidelightError
from sidelight.training.dataset import Split
from sidelight.training.optimisation import make_loss, validation_score
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import TrainingSettings
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.pooled import pooled_states
from sidelight_lab.baselines.training import count_parameters, train


def sparse_path(
    design: Callable[[Float[Tensor, "feature output"]], Float[Tensor, "text output"]],
    labels: Int[Tensor, "text ..."],
    task: Task,
    *,
    features: int,
    shares: tuple[float, ...],
    iterations: int,
) -> Iterator[tuple[Float[Tensor, "feature output"], Float[Tensor, " output"]]]:
    """Weights and bias of a sparse logistic regression for each L1 penalty.

    Minimises mean loss + penalty * |weight|_1, with classes weighted by inverse frequency. The
    solver is accelerated proximal gradient descent (Beck & Teboulle 2009), which resets its
    momentum when it points uphill (O'Donoghue & Candes 2015). Each penalty is warm-started from the
    previous solution.

    Args:
        design: Multiplies the standardised features of the training texts by weights. It is a
            function, so that MULI's wide matrix is never materialised.
        labels: Labels of the same texts.
        task: The classes; all labels of a multi-label task share one penalty.
        features: Number of features.
        shares: Penalties, largest first, as shares of the smallest penalty for which all weights
            are zero.
        iterations: Steps per penalty.

    Raises:
        SidelightError: A feature is not finite.
    """
    loss = make_loss(task, labels, balanced=True)

    def smooth(point: Float[Tensor, "row output"]) -> Float[Tensor, ""]:
        return loss(design(point[:-1]) + point[-1], labels)

    def slope(at: Float[Tensor, "row output"]) -> tuple[Tensor, Tensor]:
        leaf = at.detach().requires_grad_()
        value = smooth(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    point = torch.zeros(features + 1, task.outputs)  # The last row is the bias.
    strongest = float(slope(point)[1][:-1].abs().max())
    if not math.isfinite(strongest):
        raise SidelightError(
            "The sparse regression cannot be fitted, because a feature is not finite. Load the "
            "backbone with --dtype float32."
        )
    step = 1.0
    for share in shares:
        ahead, momentum = point, 1.0
        for _ in range(iterations):
            value, gradient = slope(ahead)
            while True:
                new = _shrunk(ahead - step * gradient, by=step * share * strongest)
                move = new - ahead
                bound = value + (gradient * move).sum() + move.square().sum() / (2 * step)
                # Closer losses are indistinguishable in float32.
                if smooth(new) <= bound + 1e-6 * value.abs():
                    break
                step /= 2
            if ((ahead - new) * (new - point)).sum() > 0:
                ahead, momentum = new, 1.0
            else:
                before, momentum = momentum, (1 + (1 + 4 * momentum**2) ** 0.5) / 2
                ahead = new + (before - 1) / momentum * (new - point)
            point = new
        yield point[:-1], point[-1]


def _shrunk(point: Float[Tensor, "row output"], *, by: float) -> Float[Tensor, "row output"]:
    """Proximal step, which shrinks the weights towards zero but not the bias."""
    weight = point[:-1]
    return torch.cat([weight.sign() * (weight.abs() - by).clamp(min=0), point[-1:]])


_SETTINGS = TrainingSettings(epochs=20, patience=4, batch_size=64, class_weight="balanced")


@dataclass(frozen=True)
class Siren(Baseline):
    """Safeguard with internal representations (Jiao et al., ACL 2026, arXiv 2604.18519).

    An L1 probe on each layer's mean token selects neurons: the smallest set that accounts for a
    given share of the probe's absolute weight. The selected neurons of all layers are standardised
    and multiplied by their layer's validation score, relative to the best layer's. They are the
    input of a network with one hidden layer.

    Attributes:
        shares: Penalties of the probes; see ``sparse_path``. One is chosen for each layer on the
            validation texts.
        iterations: Steps per penalty.
        coverage: Share of a probe's absolute weight in the selected neurons.
        hidden: Number of units in the hidden layer.
        settings: Training settings of the network.
    """

    title: ClassVar[str] = "SIREN: selected neurons of all layers, small network"
    is_single_pass: ClassVar[bool] = True
    shares: tuple[float, ...] = (0.1, 0.03)
    iterations: int = 40
    coverage: float = 0.9
    hidden: int = 256
    settings: TrainingSettings = _SETTINGS

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Choose penalties, layer weights and the network's epoch on the validation texts.

        Raises:
            SidelightError: No neuron separates the classes.
        """
        layers = range(dataset.reader.fingerprint.layers)
        probes = [self._probe(dataset, layer) for layer in layers]
        selected = torch.stack([neurons for neurons, _ in probes])
        if not selected.any():
            raise SidelightError(
                "SIREN found no neuron that separates the classes. Check that the training texts "
                "have two or more classes."
            )
        scores = torch.tensor([score for _, score in probes])
        # The divisor is positive even if every score is zero.
        strengths = scores / scores.max().clamp(min=1e-9)
        weights = strengths[:, None].expand_as(selected)[selected]
        mean, scale = moments(pooled_states(dataset.training)[0][:, selected])

        def neurons(split: Split) -> Float[Tensor, "text neuron"]:
            return (pooled_states(split)[0][:, selected] - mean) / scale * weights

        network = self._network(dataset, neurons, seed=seed)
        # The affine scaling can be folded into the first layer, so it is not counted.
        return FittedBaseline(
            lambda split: network(neurons(split)).numpy(), count_parameters(network)
        )

    def _probe(self, dataset: ProbeDataset, layer: int) -> tuple[Bool[Tensor, " width"], float]:
        """Neurons selected in a layer, and the validation score of its probe."""
        inputs, unseen = (
            pooled_states(split)[0][:, layer] for split in (dataset.training, dataset.validation)
        )
        mean, scale = moments(inputs)
        unseen = (unseen - mean) / scale
        path = sparse_path(
            ((inputs - mean) / scale).matmul,
            torch.from_numpy(dataset.training.labels),
            dataset.task,
            features=inputs.shape[1],
            shares=self.shares,
            iterations=self.iterations,
        )
        labels = dataset.validation.labels
        scored = [
            (validation_score(dataset.task, (unseen @ weight + bias).numpy(), labels), weight)
            for weight, bias in path
        ]
        score, weight = max(scored, key=lambda pair: pair[0])
        return _heaviest(weight.abs().sum(1), share=self.coverage), score

    def _network(
        self, dataset: ProbeDataset, neurons: Callable[[Split], Tensor], *, seed: int
    ) -> nn.Module:
        inputs, unseen = neurons(dataset.training), neurons(dataset.validation)
        labels = torch.from_numpy(dataset.training.labels)
        settings, task = self.settings, dataset.task
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Linear(inputs.shape[1], self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, task.outputs),
            )
        loss = make_loss(task, labels, balanced=settings.class_weight == "balanced")
        train(
            network,
            _shuffled(len(labels), size=settings.batch_size, seed=seed),
            lambda batch: loss(network(inputs[batch]), labels[batch]),
            lambda: network(unseen).numpy(),
            task=task,
            labels=dataset.validation.labels,
            steps=math.ceil(len(labels) / settings.batch_size),
            settings=settings,
        )
        return network


def moments(
    inputs: Float[Tensor, "text feature"],
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Mean and standard deviation over texts; constant features get a scale of 1."""
    scale, mean = torch.std_mean(inputs, 0, correction=0)
    return mean, torch.where(scale > 1e-6, scale, 1.0)


def _heaviest(weight: Float[Tensor, " width"], *, share: float) -> Bool[Tensor, " width"]:
    """Smallest set of neurons with a share of the total weight; empty if the total is zero."""
    ordered = weight.sort(descending=True)
    before = ordered.values.cumsum(0) - ordered.values
    needed = before < share * weight.sum()
    return torch.zeros_like(needed).scatter(0, ordered.indices, needed)


def _shuffled(texts: int, *, size: int, seed: int) -> Iterator[Int[Tensor, " batch"]]:
    """Endless batches of texts, reshuffled after each pass over all texts."""
    shuffle = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(texts, generator=shuffle).split(size)
