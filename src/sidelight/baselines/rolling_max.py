"""The strongest window of a text: attention within rolling windows, the maximum over them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.mlp_heads import TokenFeatures
from sidelight.baselines.single_layer import fit_single_layer
from sidelight.baselines.windows import Windows
from sidelight.mechanisms import online_softmax
from sidelight.ragged import Ragged
from sidelight.study import Study
from sidelight.training import TrainingSettings

# Of the values of all tokens of some windows: 64 MiB in float32.
_CELLS = 2**24
_SETTINGS = TrainingSettings(learning_rate=1e-3, epochs=6, patience=2)


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
    settings: TrainingSettings = _SETTINGS

    def fit(self, study: Study, *, seed: int) -> Rival:
        """Chooses the layer and the epoch on validation texts."""
        return fit_single_layer(
            study, self._network, layers=self.layers, settings=self.settings, seed=seed
        )

    def _network(self, width: int, outputs: int) -> nn.Module:
        heads = RollingHeads(self.features, outputs, heads=self.heads, window=self.window)
        return nn.Sequential(TokenFeatures(width, self.features), heads)
