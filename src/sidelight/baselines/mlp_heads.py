"""Attention heads on features that a small network makes of each token of the best layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from sidelight.baselines.attention_probe import AttentionHeads
from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.single_layer import fit_single_layer
from sidelight.ragged import Ragged
from sidelight.study import Study
from sidelight.training import TrainingSettings

_SETTINGS = TrainingSettings(learning_rate=1e-3, epochs=6, patience=2)


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
    settings: TrainingSettings = _SETTINGS

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the layer and the epoch on validation texts."""
        return fit_single_layer(
            study, self._network, layers=self.layers, settings=self.settings, seed=seed
        )

    def _network(self, width: int, outputs: int) -> nn.Module:
        heads = AttentionHeads(self.features, outputs, heads=self.heads)
        return nn.Sequential(TokenFeatures(width, self.features), heads)
