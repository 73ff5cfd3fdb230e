"""The spans mechanism: logits of every token, whose maximum gives the logits of the text."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from sidelight.probes.mechanisms.base import Geometry, Mechanism, hide, register
from sidelight.probes.mechanisms.shares import Shares, integrated
from sidelight.probes.ragged import Ragged


@register("spans")
class Spans(Mechanism):
    """logits = max_t z_t, where z_t = b + V gelu(c + M_0 u_t + M_1 mean(u_t-k+1 ... u_t)
    + sum_j M_1+j u_t+j) and u_t = (1 / sqrt(L + 1)) sum_l A_l x_lt: r features of the token itself,
    their mean over the last k tokens, and those of the tokens after it.

    A causal model has not seen what follows a token, so the next few tokens add information about
    it. ``token_logits`` labels each token. A token costs r numbers, which the state keeps.

    Args:
        geometry: Sizes.
        rank: Number of features per token (r).
        window: Length of the mean (k); the first tokens of a text average over the tokens so far.
        lookahead: Number of following tokens that are used.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        rank: int = 64,
        window: int = 8,
        lookahead: Literal[0, 1, 2, 3, 4] = 1,
    ):
        super().__init__()
        layers, width, outputs = geometry.layers, geometry.width, geometry.outputs
        self.window = window
        self.lookahead: int = lookahead
        read = (2 + lookahead) * rank
        self.features = nn.Parameter(torch.randn(layers, width, rank) / math.sqrt(width))
        self.mixing = nn.Parameter(torch.randn(read, rank) / math.sqrt(read))
        self.threshold = nn.Parameter(torch.zeros(rank))
        self.value = nn.Parameter(torch.zeros(rank, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The equation above, literally, over the unmasked tokens."""
        order = (~mask).byte().argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        hidden = hide(hidden.take_along_dim(order[:, None, :, None], 2), mask)
        features = torch.einsum("bltd,ldr->btr", hidden, self.projections())
        starts = [max(0, end - self.window) for end in range(1, mask.shape[1] + 1)]
        means = [features[:, start : t + 1].mean(1) for t, start in enumerate(starts)]
        ahead = pad(features, (0, 0, 0, self.lookahead)).unfold(1, self.lookahead + 1, 1)
        read = torch.cat([features, torch.stack(means, 1), *ahead.unbind(-1)[1:]], -1)
        logits = self._network(read) + self.bias
        return torch.where(mask[..., None], logits, -torch.inf).amax(1)

    def projections(self) -> Float[Tensor, "layer width projection"]:
        """The contribution of each layer to the features."""
        return self.features / math.sqrt(len(self.features))

    def layer_parameters(self) -> tuple[Tensor, ...]:
        return (self.features,)

    def summarise(self, tokens: Ragged) -> Ragged:
        """The features of every token: ``[token, 1, feature]``."""
        return Ragged(tokens.values.float().sum(1, keepdim=True), tokens.lengths)

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        return left.joined(right)

    def token_logits(self, state: Ragged) -> Ragged:
        """The logits of each token, ``[token, output]``."""
        return Ragged(self._scores(state) + self.bias, state.lengths)

    def set_prior(self, logits: Float[Tensor, " output"]) -> None:
        self.bias.data.copy_(logits)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """The largest logits of each segment's tokens."""
        highest = Ragged(self._scores(state), state.lengths).without_ties().maxima()
        return torch.where((state.lengths == 0)[:, None], torch.nan, highest + self.bias)

    def _scores(self, state: Ragged) -> Float[Tensor, "token output"]:
        """The logits without their bias."""
        features, segments = state.values[:, 0], state.segments
        rows = torch.arange(len(features), device=features.device)
        position = rows - (state.lengths.cumsum(0) - state.lengths)[segments]

        def shifted(by: int) -> Tensor:
            """Each token's neighbour at this distance; 0 outside its segment."""
            neighbours = (rows + by).clamp(0, max(len(rows) - 1, 0))
            is_inside = (neighbours == rows + by) & (segments[neighbours] == segments)
            return torch.where(is_inside[:, None], features[neighbours], 0)

        sums = torch.stack([shifted(-i) for i in range(self.window)]).sum(0)
        means = sums / (position + 1).clamp(max=self.window)[:, None]
        ahead = [shifted(distance) for distance in range(1, self.lookahead + 1)]
        return self._network(torch.cat([features, means, *ahead], 1))

    def _network(self, read: Float[Tensor, "*token read"]) -> Float[Tensor, "*token output"]:
        return gelu(read @ self.mixing + self.threshold) @ self.value

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """By integrated gradients, for the logits of the deciding tokens."""
        # Inference-mode tensors cannot be differentiated.
        with torch.inference_mode(False), torch.no_grad():
            text = Ragged(tokens.values.clone(), tokens.lengths.clone())
            scores = Ragged(self._scores(self.summarise(text)), text.lengths).without_ties()
            decides = scores.values == scores.maxima()[scores.segments]

        def logits(projections: Ragged) -> Tensor:
            scores = self._scores(self.summarise(projections))
            decisive = scores * decides.repeat(len(scores) // max(1, len(decides)), 1)
            return Ragged(decisive, projections.lengths).sums() + self.bias

        return integrated(logits, tokens, targets, sums_layers=True)
