"""The paper's probe: a token stage, a layer stage of the same mechanism, a head."""

from collections.abc import Callable, Hashable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.mechanisms.base import Aggregator, Geometry, Mechanism
from sidelight.ragged import Ragged


class TwoStage(Mechanism):
    """v_l = A_l(h_l), v = A({v_l}), logits = W v + b (Meyoyan & Del Corro 2026, section 3).

    The streaming form never holds a vector of hidden-state width: the token stage carries only the
    projections that the layer stage and the head ask for.

    Args:
        stage: Builds a stage for a number of groups: one per layer, then one.
        geometry: Sizes.
    """

    def __init__(self, stage: Callable[[int], Aggregator], geometry: Geometry):
        super().__init__()
        self.token_stage = stage(geometry.layers)
        self.layer_stage = stage(1)
        self.head = nn.Linear(geometry.width, geometry.outputs)
        self._layers = geometry.layers

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The two stages and the head, one after the other."""
        vectors = self.token_stage(hidden, mask)  # (B, L, D)
        every_layer = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        return self.head(self.layer_stage(vectors[:, None], every_layer)[:, 0])

    def columns(self) -> Float[Tensor, "layer width column"]:
        """What the token stage needs to carry what the layer stage needs."""
        return self.token_stage.columns(self._carried())

    def summarise(self, tokens: Ragged) -> Ragged:
        """The token stage's state."""
        return self.token_stage.summarise(tokens)

    def summary_kind(self) -> Hashable | None:
        """The token stage's kind."""
        return self.token_stage.summary_kind()

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """The token stage's merge."""
        return self.token_stage.merge(left, right)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """Ends the token stage, then runs the layer stage on its carried projections."""
        vectors = self.token_stage.finish(state, self._carried())  # (S, L, K)
        segments, layers, _ = vectors.shape
        lengths = torch.full((segments,), layers, device=vectors.device)
        items = Ragged(vectors.flatten(0, 1)[:, None], lengths)  # (S * L, 1, K)
        vector = self.layer_stage.finish(
            self.layer_stage.summarise(items), self.head.weight.T[None]
        )  # (S, 1, C)
        return vector[:, 0] + self.head.bias

    def _carried(self) -> Float[Tensor, "layer width carry"]:
        columns = self.layer_stage.columns(self.head.weight.T[None])
        return columns.expand(self._layers, -1, -1)
