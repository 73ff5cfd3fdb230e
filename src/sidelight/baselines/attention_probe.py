"""Attention probe at the best single layer: learned queries weigh tokens, values are logits."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.single_layer import fit_single_layer
from sidelight.mechanisms import online_softmax
from sidelight.ragged import Ragged
from sidelight.study import Study
from sidelight.training import TrainingSettings

_SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=6, patience=2)


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
    settings: TrainingSettings = _SETTINGS

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the layer and the epoch on validation texts."""
        network = partial(AttentionHeads, heads=self.heads)
        return fit_single_layer(
            study, network, layers=self.layers, settings=self.settings, seed=seed
        )
