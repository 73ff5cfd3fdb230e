"""Baselines on every token: attention heads, rolling windows and a smoothed linear probe."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sidelight.probes.mechanisms.stages import finish_softmax, summarise_softmax
from sidelight.probes.ragged import Ragged
from sidelight.probes.standardisation import Standardisation
from sidelight.states.cache import Shard
from sidelight.training.optimisation import make_loss
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import TrainingSettings
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline, best_on_validation
from sidelight_lab.baselines.training import (
    TokenSource,
    class_targets,
    count_parameters,
    ranked_layers,
    token_logits,
    train_on_tokens,
)

_SETTINGS = TrainingSettings(learning_rate=1e-3, epochs=6, patience=2)
_ATTENTION_SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=6, patience=2)


class TokenHeads(nn.Module):
    """Sum of attention heads (k): logits = b + sum_k sum_t softmax_t(q_k . x_t) v_k . x_t.

    Each head has one value vector per output. With ``window``, softmax and sum run over each window
    of this many tokens, and each output of a head is its maximum over windows. With ``features``,
    x_t is a token after two linear layers, each followed by a ReLU.
    """

    def __init__(
        self, width: int, outputs: int, *, heads: int, features: int = 0, window: int | None = None
    ):
        super().__init__()
        self._features = nn.Sequential()
        if features:
            layers = [nn.Linear(width, features), nn.ReLU(), nn.Linear(features, features)]
            self._features, width = nn.Sequential(*layers, nn.ReLU()), features
        self.query = nn.Parameter(torch.randn(width, heads) / width)
        self.value = nn.Parameter(torch.randn(width, heads, outputs) / width)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self._window = window

    def forward(self, tokens: Ragged) -> Float[Tensor, "text output"]:
        heads, outputs = self.value.shape[1:]
        projection = torch.cat([self.query, self.value.flatten(1)], 1)
        projections = self._features(tokens.values) @ projection
        if self._window is None:
            scores, values = projections[:, None].tensor_split([heads], -1)
            state = summarise_softmax(scores, values.unflatten(-1, (heads, outputs)), tokens)
            return finish_softmax(state).sum((1, 2)) + self.bias
        maxima: list[Float[Tensor, "head output"]] = []
        for windows in windows_of(Ragged(projections, tokens.lengths), size=self._window):
            scores, values = windows.tensor_split([heads], 1)
            values = values.unflatten(1, (heads, outputs))
            maxima.append((scores.softmax(-1)[:, :, None] * values).sum(-1).amax(0))
        return torch.stack(maxima).sum(1) + self.bias


def windows_of(tokens: Ragged, *, size: int) -> list[Float[Tensor, "window column token"]]:
    """All windows of ``size`` consecutive tokens of each text, as tensor views.

    A text with fewer tokens is a single window.
    """
    return [text.values.unfold(0, min(size, len(text.values)), 1) for text in tokens.split()]


class OneLayer(nn.Module):
    """A network on the standardised tokens of one layer.

    Args:
        scaling: Mean and scale of the layer.
        network: Maps ragged float32 tokens to the logits of each text.
    """

    def __init__(self, scaling: Standardisation, network: nn.Module):
        super().__init__()
        self._scaling = scaling
        self._network = network

    def forward(self, batch: Shard) -> Float[Tensor, "text output"]:
        tokens = (batch.hidden[0].float() - self._scaling.mean[0]) / self._scaling.scale[0]
        return self._network(Ragged(tokens, batch.lengths))


class BestLayer(Baseline):
    """A network on the tokens of the best layer.

    Attributes:
        layers: Number of top-ranked layers (see ``ranked_layers``) to train on; the one with the
            best validation score is kept.
        settings: Optimisation settings.
    """

    is_single_pass: ClassVar[bool] = True
    layers: int
    settings: TrainingSettings

    @abstractmethod
    def network(self, width: int, outputs: int) -> nn.Module:
        """Untrained network that maps a layer's ragged tokens to logits."""

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Choose the layer and the epoch on the validation texts."""
        width, task, settings = dataset.reader.fingerprint.width, dataset.task, self.settings

        def fitted(layer: int) -> FittedBaseline:
            training = TokenSource.one_layer(dataset.training, layer)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = OneLayer(training.scaling(), self.network(width, task.outputs))
            loss = make_loss(task, training.labels, balanced=settings.class_weight == "balanced")
            train_on_tokens(
                model,
                lambda batch, labels: loss(model(batch), labels),
                task=task,
                training=training,
                validation=TokenSource.one_layer(dataset.validation, layer),
                settings=settings,
                seed=seed,
            )
            return FittedBaseline(
                lambda split: token_logits(model, TokenSource.one_layer(split, layer)),
                count_parameters(model),
            )

        return best_on_validation(map(fitted, ranked_layers(dataset)[: self.layers]), dataset)


@dataclass(frozen=True)
class AttentionProbe(BestLayer):
    """EleutherAI's attention probe (2025), without its optional position weight."""

    title: ClassVar[str] = "Attention probe, best layer"
    heads: int = 8
    layers: int = 3
    settings: TrainingSettings = _ATTENTION_SETTINGS

    def network(self, width: int, outputs: int) -> nn.Module:
        return TokenHeads(width, outputs, heads=self.heads)


@dataclass(frozen=True)
class MlpHeads(BestLayer):
    """The Gemini production probe with attention over all tokens (arXiv 2601.11516).

    Attributes:
        features: Number of features per token, computed by a small network.
        heads: Number of learned queries.
        window: Number of tokens that a head reads at once; None means all.
    """

    title: ClassVar[str] = "MLP and attention heads, best layer"
    features: int = 100
    heads: int = 10
    window: int | None = None
    layers: int = 3
    settings: TrainingSettings = _SETTINGS

    def network(self, width: int, outputs: int) -> nn.Module:
        return TokenHeads(
            width, outputs, heads=self.heads, features=self.features, window=self.window
        )


@dataclass(frozen=True)
class RollingMax(MlpHeads):
    """The Gemini production probe for long texts: max over rolling windows (arXiv 2601.11516)."""

    title: ClassVar[str] = "MLP and rolling attention, best layer"
    window: int | None = 10


class SmoothedLinear(nn.Module):
    """Largest sliding-window mean of a text's token logits, z_t = b + sum_l w_l . x_lt.

    The training loss is the cross-entropy of each window's mean, with the windows of a text
    weighted by a softmax of these means. Multi-class tasks are trained one-vs-rest.

    Args:
        scaling: Mean and scale of each layer.
        task: The classes.
        window: Tokens per window; a shorter text is a single window.
    """

    def __init__(self, scaling: Standardisation, task: Task, *, window: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*scaling.mean.shape, task.outputs))
        self.bias = nn.Parameter(torch.zeros(task.outputs))
        self._scaling = scaling
        self._task = task
        self._window = window

    def forward(self, batch: Shard) -> Float[Tensor, "text output"]:
        """Largest smoothed logit per output, in float32 like the scores of probes."""
        return self.smoothed(batch, dtype=torch.float32).maxima()

    def loss(self, batch: Shard, labels: Int[Tensor, "text ..."]) -> Float[Tensor, ""]:
        """Softmax-weighted loss over windows, with products computed in the states' dtype."""
        smoothed = self.smoothed(batch, dtype=batch.hidden.dtype)
        logits = smoothed.values
        target = class_targets(labels, self._task)[smoothed.segments]
        losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        state = summarise_softmax(logits[:, None], losses[:, None, :, None], smoothed)
        return finish_softmax(state).mean()

    def smoothed(self, batch: Shard, *, dtype: torch.dtype) -> Ragged:
        """Mean logit of each window, ``[window, output]``, with products computed in ``dtype``."""
        folded = self._scaling.fold(self.weight, dtype=dtype)
        # Layer by layer: on CPUs, a thin batched product of bf16 views is several times slower.
        smoothed_logits = [
            # Add the shift before rounding to bf16, because it cancels most of a large product.
            torch.addmm(shift.to(dtype), states.to(dtype), weight)
            for shift, states, weight in zip(folded.shift, batch.hidden, folded.weight, strict=True)
        ]
        logits = torch.stack(smoothed_logits).float().sum(0) + self.bias
        windows = windows_of(Ragged(logits, batch.lengths), size=self._window)
        means = [text.mean(-1) for text in windows]
        return Ragged(torch.cat(means), torch.tensor([len(text) for text in means]))


@dataclass(frozen=True)
class Concatenated(Baseline):
    """The probe of Constitutional Classifiers++ (arXiv 2601.04603), scored by its largest window.

    Attributes:
        window: Number of tokens over which logits are averaged.
        settings: Optimisation settings.
    """

    title: ClassVar[str] = "All layers concatenated, sliding mean"
    is_single_pass: ClassVar[bool] = True
    window: int = 16
    settings: TrainingSettings = _SETTINGS

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Choose the epoch on the validation texts; read the training states once per epoch."""
        training = TokenSource.all_layers(dataset.training)
        model = SmoothedLinear(training.scaling(), dataset.task, window=self.window)
        train_on_tokens(
            model,
            model.loss,
            task=dataset.task,
            training=training,
            validation=TokenSource.all_layers(dataset.validation),
            settings=self.settings,
            seed=seed,
        )
        return FittedBaseline(
            lambda split: token_logits(model, TokenSource.all_layers(split)),
            count_parameters(model),
        )
