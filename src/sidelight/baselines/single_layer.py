"""A token model on one layer, which validation texts choose."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from sidelight.baselines.base import Rival
from sidelight.baselines.layer_ranking import ranked_layers
from sidelight.baselines.token_source import TokenSource
from sidelight.baselines.token_training import (
    TokenModel,
    TrainedModel,
    token_logits,
    train_on_tokens,
)
from sidelight.cache import Shard
from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.study import Split, Study
from sidelight.training import Loss, TrainingSettings, make_loss


class OneLayer(TokenModel):
    """Standardises a layer's tokens and hands them to a network.

    Args:
        scaling: Of the layer.
        network: From the ragged tokens, float32, to the logits of each text.
        loss: Of logits and labels.
    """

    def __init__(self, scaling: Standardisation, network: nn.Module, loss: Loss):
        super().__init__()
        self._scaling = scaling
        self._network = network
        self._loss = loss

    def forward(self, batch: Shard) -> Float[Tensor, "text output"]:
        """The network's logits."""
        tokens = (batch.hidden[0].float() - self._scaling.mean[0]) / self._scaling.scale[0]
        return self._network(Ragged(tokens, batch.lengths))

    def loss(self, batch: Shard, labels: Int[Tensor, "text ..."]) -> Float[Tensor, ""]:
        """The task's cross-entropy."""
        return self._loss(self(batch), labels)


@dataclass(frozen=True)
class SingleLayerRival(Rival):
    """A trained model of one layer's tokens.

    Attributes:
        layer: The one it reads.
        model: Trained.
    """

    layer: int
    model: OneLayer

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        """Reads the layer's states."""
        return token_logits(self.model, TokenSource.one_layer(split, self.layer))


def fit_single_layer(
    study: Study,
    network: Callable[[int, int], nn.Module],
    *,
    layers: int,
    settings: TrainingSettings,
    seed: int,
) -> SingleLayerRival:
    """Trains on each of the most promising layers and keeps the best by validation score.

    Args:
        study: The data.
        network: Makes an untrained network for a width and a number of outputs.
        layers: How many to train on; see ``ranked_layers``.
        settings: Of the optimisation.
        seed: Of everything random.
    """
    tried = {
        layer: _trained(study, layer, network, settings, seed)
        for layer in ranked_layers(study)[:layers]
    }
    layer = max(tried, key=lambda each: tried[each].score)
    return SingleLayerRival(tried[layer].parameters, layer, tried[layer].model)


def _trained(
    study: Study,
    layer: int,
    network: Callable[[int, int], nn.Module],
    settings: TrainingSettings,
    seed: int,
) -> TrainedModel[OneLayer]:
    training = TokenSource.one_layer(study.training, layer)
    width = study.backbone.fingerprint.width
    loss = make_loss(study.task, training.labels, balanced=settings.class_weight == "balanced")
    return train_on_tokens(
        lambda: OneLayer(training.scaling(), network(width, study.task.outputs), loss),
        task=study.task,
        training=training,
        validation=TokenSource.one_layer(study.validation, layer),
        settings=settings,
        seed=seed,
    )
