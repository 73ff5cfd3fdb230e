"""Attention probe at the best single layer: learned queries weigh tokens, values are logits.

Attention heads on features that a small network makes of each token of the best layer.

The strongest window of a text: attention within rolling windows, the maximum over them.

Linear probe on all layers of each token, its logits smoothed over a sliding window.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sidelight.mechanisms import stages as online_softmax
from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.states.cache import Shard
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.settings import TrainingSettings
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.linear import class_targets
from sidelight_lab.baselines.token_training import (
    TokenModel,
    TokenSource,
    Windows,
    fit_single_layer,
    token_logits,
    train_on_tokens,
)

_ATTENTION_PROBE_SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=6, patience=2)


class AttentionHeads(nn.Module):
    """Adds what each head reads: logits = b + sum_k sum_t softmax_t(q_k . x_t) v_k . x_t.

    Args:
        width: Size of a token.
        outputs: Logits; a head has a value vector for each.
        heads: Queries (k).
    """

    def __init__(self, width: int, outputs: int, *, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, heads) / width)
        self.value = nn.Parameter(torch.randn(width, heads, outputs) / width)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, tokens: Ragged) -> Float[Tensor, "text output"]:
        """The logits of each text."""
        heads = self.query.shape[1]
        columns = tokens.values @ torch.cat([self.query, self.value.flatten(1)], 1)
        scores, values = columns[:, None].tensor_split([heads], -1)
        values = values.unflatten(-1, (heads, -1))
        state = online_softmax.summarise(scores, values, tokens)
        return online_softmax.finish(state).sum((1, 2)) + self.bias


@dataclass(frozen=True)
class AttentionProbe(Baseline):
    """Attention heads on one layer's tokens (EleutherAI's attention probes, 2025).

    Without their optional weight for a token's position.

    Attributes:
        heads: Learned queries.
        layers: The most promising layers, by ridge regression on mean tokens, are trained on; the
            best of them by validation score is kept.
        settings: Of the optimisation.
    """

    title: ClassVar[str] = "Attention probe, best layer"
    is_single_pass: ClassVar[bool] = True
    heads: int = 8
    layers: int = 3
    settings: TrainingSettings = _ATTENTION_PROBE_SETTINGS

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the layer and the epoch on validation texts."""
        network = partial(AttentionHeads, heads=self.heads)
        return fit_single_layer(
            dataset, network, layers=self.layers, settings=self.settings, seed=seed
        )


_MLP_HEADS_SETTINGS = TrainingSettings(learning_rate=1e-3, epochs=6, patience=2)


class TokenFeatures(nn.Module):
    """Two linear layers with a ReLU after each, token by token.

    Args:
        width: Size of a token.
        features: Size of both layers.
    """

    def __init__(self, width: int, features: int):
        super().__init__()
        self._layers = nn.Sequential(
            nn.Linear(width, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU()
        )

    def forward(self, tokens: Ragged) -> Ragged:
        """The features of each token."""
        return Ragged(self._layers(tokens.values), tokens.lengths)


@dataclass(frozen=True)
class MlpHeads(Baseline):
    """The Gemini production probe with attention over all tokens (arXiv 2601.11516).

    Attributes:
        features: Per token.
        heads: Learned queries.
        layers: As in ``AttentionProbe``.
        settings: Of the optimisation.
    """

    title: ClassVar[str] = "MLP and attention heads, best layer"
    is_single_pass: ClassVar[bool] = True
    features: int = 100
    heads: int = 10
    layers: int = 3
    settings: TrainingSettings = _MLP_HEADS_SETTINGS

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the layer and the epoch on validation texts."""
        return fit_single_layer(
            dataset, self._network, layers=self.layers, settings=self.settings, seed=seed
        )

    def _network(self, width: int, outputs: int) -> nn.Module:
        heads = AttentionHeads(self.features, outputs, heads=self.heads)
        return nn.Sequential(TokenFeatures(width, self.features), heads)


# Of the values of all tokens of some windows: 64 MiB in float32.
_CELLS = 2**24
_ROLLING_MAX_SETTINGS = TrainingSettings(learning_rate=1e-3, epochs=6, patience=2)


class RollingHeads(nn.Module):
    """Adds each head's maximum over windows: logits = b + sum_k max_w sum_(t in w) a_kwt v_k . x_t.

    The weights a are a softmax of q_k . x_t over the tokens of window w.

    Args:
        width: Size of a token.
        outputs: Logits; each takes its own maximum.
        heads: Queries (k).
        window: Tokens of a window; a shorter text is one window.
    """

    def __init__(self, width: int, outputs: int, *, heads: int, window: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, heads) / width)
        self.value = nn.Parameter(torch.randn(width, heads, outputs) / width)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self._window = window

    def forward(self, tokens: Ragged) -> Float[Tensor, "text output"]:
        """The logits of each text."""
        windows = Windows.of(tokens.lengths, size=self._window)
        scores = tokens.values @ self.query
        values = (tokens.values @ self.value.flatten(1)).unflatten(-1, self.value.shape[1:])
        size = self._window * self.value[0].numel()
        parts = windows.split(max(1, _CELLS // size))
        means = torch.cat(
            [_means(part, scores, values) for part in parts]
            if len(parts) == 1
            # What a part gathers is a window's length times the values: it is gathered once more
            # for the backward pass rather than kept.
            else [checkpoint(_means, part, scores, values, use_reentrant=False) for part in parts]
        )
        return Ragged(means, windows.counts).maxima().sum(1) + self.bias


def _means(
    windows: Windows,
    scores: Float[Tensor, "token head"],
    values: Float[Tensor, "token head output"],
) -> Float[Tensor, "window head output"]:
    weights = online_softmax.masked_softmax(windows.gather(scores), windows.mask[..., None])
    return (weights[..., None] * windows.gather(values)).sum(1)


@dataclass(frozen=True)
class RollingMax(Baseline):
    """The Gemini production probe for long texts: max of rolling windows (arXiv 2601.11516).

    Attributes:
        features: Per token, as in ``MlpHeads``.
        heads: Learned queries.
        window: Tokens.
        layers: As in ``AttentionProbe``.
        settings: Of the optimisation.
    """

    title: ClassVar[str] = "MLP and rolling attention, best layer"
    is_single_pass: ClassVar[bool] = True
    features: int = 100
    heads: int = 10
    window: int = 10
    layers: int = 3
    settings: TrainingSettings = _ROLLING_MAX_SETTINGS

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the layer and the epoch on validation texts."""
        return fit_single_layer(
            dataset, self._network, layers=self.layers, settings=self.settings, seed=seed
        )

    def _network(self, width: int, outputs: int) -> nn.Module:
        heads = RollingHeads(self.features, outputs, heads=self.heads, window=self.window)
        return nn.Sequential(TokenFeatures(width, self.features), heads)


_CONCATENATED_SETTINGS = TrainingSettings(learning_rate=1e-3, epochs=6, patience=2)


class SmoothedLinear(TokenModel):
    """The largest sliding-window mean of a text's token logits, z_t = b + sum_l w_l . x_lt.

    Trained by the cross-entropy of every window's mean, the windows of a text weighted by a softmax
    of those means. Classes of a multi-class task are trained one against the rest.

    Args:
        scaling: Of all layers.
        task: The classes.
        window: Tokens of a window; a shorter text is one window.
    """

    def __init__(self, scaling: Standardisation, task: Task, *, window: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*scaling.mean.shape, task.outputs))
        self.bias = nn.Parameter(torch.zeros(task.outputs))
        self._scaling = scaling
        self._task = task
        self._window = window

    def forward(self, batch: Shard) -> Float[Tensor, "text output"]:
        """The largest smoothed logit, per output; in float32, as probes are scored."""
        return self.smoothed(batch, dtype=torch.float32).maxima()

    def loss(self, batch: Shard, labels: Int[Tensor, "text ..."]) -> Float[Tensor, ""]:
        """The softmax-weighted loss over windows, from products in the states' own dtype."""
        smoothed = self.smoothed(batch, dtype=batch.hidden.dtype)
        logits = smoothed.values
        target = class_targets(labels, self._task)[smoothed.segments]
        losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        state = online_softmax.summarise(logits[:, None], losses[:, None, :, None], smoothed)
        return online_softmax.finish(state).mean()

    def smoothed(self, batch: Shard, *, dtype: torch.dtype) -> Ragged:
        """``[window, output]``: the mean logit of each window.

        Args:
            batch: The texts.
            dtype: Of the products of states and weights.
        """
        folded = self._scaling.fold(self.weight, dtype=dtype)
        # Layer by layer: a thin batched product of bf16 views is several times slower on a CPU.
        parts = [
            # The shift before the rounding to bf16: it takes away most of a large product.
            torch.addmm(shift.to(dtype), states.to(dtype), weight)
            for shift, states, weight in zip(folded.shift, batch.hidden, folded.weight, strict=True)
        ]
        logits = torch.stack(parts).float().sum(0) + self.bias
        return Windows.of(batch.lengths, size=self._window).means(logits)


@dataclass(frozen=True)
class Concatenated(Baseline):
    """The probe of Constitutional Classifiers++ (arXiv 2601.04603), scored by its largest window.

    Attributes:
        window: Tokens over which logits are averaged.
        settings: Of the optimisation.
    """

    title: ClassVar[str] = "All layers concatenated, sliding mean"
    is_single_pass: ClassVar[bool] = True
    window: int = 16
    settings: TrainingSettings = _CONCATENATED_SETTINGS

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Chooses the epoch on validation texts; reads the training states once per epoch."""
        training = TokenSource.all_layers(dataset.training)
        scaling = training.scaling()
        trained = train_on_tokens(
            lambda: SmoothedLinear(scaling, dataset.task, window=self.window),
            task=dataset.task,
            training=training,
            validation=TokenSource.all_layers(dataset.validation),
            settings=self.settings,
            seed=seed,
        )
        return _Fitted(trained.parameters, trained.model)


@dataclass(frozen=True)
class _Fitted(FittedBaseline):
    model: SmoothedLinear

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        return token_logits(self.model, TokenSource.all_layers(split))
