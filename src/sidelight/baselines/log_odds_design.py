"""Standardised log-odds of many texts as a matrix that never exists: 16,000 x 49,152 are 3 GB."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.baselines.first_token import FirstToken, text_chunks
from sidelight.baselines.linear import Scaling

# log(1 - p) of a less likely entry is taken as 0: an error of .001, far below bf16's rounding.
_LIKELY = 1e-3


@dataclass(frozen=True, eq=False)
class LogOddsDesign:
    """Log-odds are logit - log sum exp(logits) - log(1 - p): low rank, rank one, and sparse.

    Attributes:
        first: Final norm and head.
        directions: Of the texts; see ``FirstToken``.
        normaliser: log sum exp of each text's logits.
        likely: log(1 - p), sparse.
        scaling: Of the log-odds.
    """

    first: FirstToken
    directions: Float[Tensor, "text width"]
    normaliser: Float[Tensor, "text 1"]
    likely: Float[Tensor, "text entry"]
    scaling: Scaling

    @staticmethod
    def of(first: FirstToken, states: Float[Tensor, "text width"]) -> "LogOddsDesign":
        """Reads the texts once, a few hundred at a time.

        Args:
            first: Final norm and head.
            states: Of each text's last token, after the last block.
        """
        directions = first.directions(states)
        entries = len(first.weight)
        sums, squares = torch.zeros(2, entries, dtype=torch.float64)
        normalisers: list[Tensor] = []
        likely: list[Tensor] = []
        for chunk in directions.chunk(text_chunks(len(states), entries)):
            logits = first.logits(chunk)
            normaliser = logits.logsumexp(1, keepdim=True)
            odds = first.log_odds(chunk)
            sums += odds.sum(0)
            squares += odds.square().sum(0)
            chance = (logits - normaliser).exp_()
            normalisers.append(normaliser)
            likely.append(torch.where(chance > _LIKELY, logits - normaliser - odds, 0).to_sparse())
        mean = sums / len(states)
        scale = (squares / len(states) - mean.square()).clamp(min=0).sqrt()
        return LogOddsDesign(
            first,
            directions,
            torch.cat(normalisers),
            torch.cat(likely).coalesce(),
            Scaling(mean.float(), torch.where(scale > 1e-6, scale, 1.0).float()),
        )

    def __call__(self, weight: Float[Tensor, "entry output"]) -> Float[Tensor, "text output"]:
        """Standardised log-odds times weights."""
        raw = weight / self.scaling.scale[:, None]
        # In this order: the transposed head times a matrix takes ten times as long.
        low_rank = self.directions @ (raw.T @ self.first.weight).T
        rank_one = self.normaliser * raw.sum(0) + (self.scaling.mean - self.first.bias) @ raw
        return low_rank - rank_one - torch.sparse.mm(self.likely, raw)
