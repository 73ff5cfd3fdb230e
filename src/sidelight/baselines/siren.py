"""SIREN: neurons that sparse probes select in every layer, read by a small network."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.linear import Linear, Rows, Scaling, best_linear
from sidelight.baselines.small_network import train_small_network
from sidelight.baselines.sparse_logistic import sparse_path
from sidelight.errors import SidelightError
from sidelight.study import Split, Study
from sidelight.training import TrainingSettings

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

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses penalties, layer weights and the network's epoch on validation texts.

        Raises:
            SidelightError: No neuron tells the classes apart.
        """
        probes = [self._probe(study, layer) for layer in range(study.backbone.fingerprint.layers)]
        neurons = _Neurons.of(probes, study.training)
        network = train_small_network(
            _rows(study.training, neurons),
            _rows(study.validation, neurons),
            study.task,
            hidden=self.hidden,
            settings=self.settings,
            seed=seed,
        )
        # The affine scaling folds into the first layer, so it does not count.
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return _Fitted(parameters, neurons, network)

    def _probe(self, study: Study, layer: int) -> "_Probe":
        inputs, unseen = (
            split.pooled.means[:, layer] for split in (study.training, study.validation)
        )
        scaling = Scaling.measured(inputs)
        labels = torch.from_numpy(study.training.labels)
        path = list(
            sparse_path(
                scaling(inputs).matmul,
                labels,
                study.task,
                features=inputs.shape[1],
                shares=self.shares,
                iterations=self.iterations,
            )
        )
        chosen = best_linear(
            [Linear.folded(sparse.weight, sparse.bias, scaling) for sparse in path],
            Rows(unseen, torch.from_numpy(study.validation.labels)),
            study.task,
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
class _Fitted(Rival):
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
