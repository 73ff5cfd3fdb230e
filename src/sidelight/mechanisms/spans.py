"""The spans mechanism: logits of every token, the largest of which are those of the text."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from sidelight.mechanisms.base import Geometry, Mechanism, hide, register
from sidelight.mechanisms.shares import Shares, read_off
from sidelight.ragged import Ragged


class Spans(Mechanism):
    """logits = max_t z_t, where z_t = b + sum_l (v_l . x_lt + m_l . mean(x_l,t-k+1 ... x_lt)
    + sum_j a_lj . x_l,t+j): the token itself, the mean of the last k tokens, and those after it.

    A causal model has not read on where it reads a token, so the next few tokens say more of it.
    ``token_logits`` is what labels each token. A token costs (2 + lookahead) C numbers, which the
    state keeps.

    Args:
        geometry: Sizes.
        window: k, of the mean; a text's first tokens have the mean of those before them.
        lookahead: How many tokens after it count.
    """

    def __init__(self, geometry: Geometry, *, window: int, lookahead: int):
        super().__init__()
        layers, width, outputs = geometry.layers, geometry.width, geometry.outputs
        self.window = window
        self.lookahead = lookahead
        self.own = nn.Parameter(torch.zeros(layers, width, outputs))
        self.mean = nn.Parameter(torch.zeros(layers, width, outputs))
        self.ahead = nn.Parameter(torch.zeros(layers, width, lookahead, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The equation above, literally, over the tokens that the mask keeps."""
        order = (~mask).byte().argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        hidden = hide(hidden.take_along_dim(order[:, None, :, None], 2), mask)
        starts = [max(0, end - self.window) for end in range(1, mask.shape[1] + 1)]
        means = [hidden[:, :, start : t + 1].mean(2) for t, start in enumerate(starts)]
        ahead = pad(hidden, (0, 0, 0, self.lookahead)).unfold(2, self.lookahead + 1, 1)[..., 1:]
        logits = (
            torch.einsum("bltd,ldc->btc", hidden, self.own)
            + torch.einsum("bltd,ldc->btc", torch.stack(means, 2), self.mean)
            + torch.einsum("bltdj,ldjc->btc", ahead, self.ahead)
            + self.bias
        )
        return torch.where(mask[..., None], logits, -torch.inf).amax(1)

    def columns(self) -> Float[Tensor, "layer width column"]:
        """C numbers of the token itself, C whose mean is taken, and C for each token before it."""
        return torch.cat([self.own, self.mean, self.ahead.flatten(2)], 2)

    def summarise(self, tokens: Ragged) -> Ragged:
        """The columns of every token, added over the layers: ``[token, 1, column]``."""
        return Ragged(tokens.values.float().sum(1, keepdim=True), tokens.lengths)

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        return left.joined(right)

    def token_logits(self, state: Ragged) -> Ragged:
        """The logits of each token, ``[token, output]``."""
        return Ragged(self._scores(state) + self.bias, state.lengths)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """The largest logits of each segment's tokens."""
        highest = Ragged(self._scores(state), state.lengths).untied().maxima()
        return torch.where((state.lengths == 0)[:, None], torch.nan, highest + self.bias)

    def _scores(self, state: Ragged) -> Float[Tensor, "token output"]:
        """The logits without their bias."""
        own, mean, *ahead = state.values[:, 0].split(len(self.bias), 1)
        segments = state.segments
        rows = torch.arange(len(own), device=own.device)
        position = rows - (state.lengths.cumsum(0) - state.lengths)[segments]

        def shifted(values: Tensor, by: int) -> Tensor:
            """Each token's neighbour at this distance; 0 outside of its segment."""
            neighbours = (rows + by).clamp(0, max(len(rows) - 1, 0))
            is_inside = (neighbours == rows + by) & (segments[neighbours] == segments)
            return torch.where(is_inside[:, None], values[neighbours], 0)

        sums = torch.stack([shifted(mean, -i) for i in range(self.window)]).sum(0)
        scores = own + sums / (position + 1).clamp(max=self.window)[:, None]
        for distance, values in enumerate(ahead, start=1):
            scores = scores + shifted(values, distance)
        return scores

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """Exact: the terms of the token that decides."""
        return read_off(self.logits, tokens, targets)


@dataclass(frozen=True)
class SpansOptions:
    """Options of ``spans``.

    Attributes:
        window: Tokens whose mean is read, the token itself among them.
        lookahead: Tokens after it that are read.
    """

    window: int = 8
    lookahead: Literal[0, 1, 2, 3, 4] = 1


@register("spans", SpansOptions)
def _build(geometry: Geometry, options: SpansOptions) -> Spans:
    return Spans(geometry, window=options.window, lookahead=options.lookahead)
