"""Verdicts without some layers or tokens. Nothing is trained again.

An ablated layer stays at its standardisation mean (at zero for a probe that reads raw states).
An ablated token is not read at all.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.anatomy.pieces import Piece
from sidelight.anatomy.stages import judge_vectors, layer_vectors
from sidelight.anatomy.tokens import token_views
from sidelight.mechanisms import Mechanism
from sidelight.mechanisms.two_stage import TwoStage
from sidelight.ragged import Ragged

LayerJudge = Callable[[Bool[Tensor, " layer"]], Float[Tensor, "text output"]]


def layer_views(layers: int) -> dict[str, Bool[Tensor, "view layer"]]:
    """The layers that are kept: all but one, only one, or from one on; one view per layer."""
    one = torch.eye(layers, dtype=torch.bool)
    return {"drop": ~one, "only": one, "from": torch.ones_like(one).triu()}


@torch.no_grad()
def without_layers(
    mechanism: Mechanism, tokens: Ragged
) -> dict[str, Float[Tensor, "view text output"]]:
    """The logits in each of ``layer_views``."""
    # The token stage of two runs once: no layer's vector depends on another layer.
    judge = (
        _judge_vectors(mechanism, tokens)
        if isinstance(mechanism, TwoStage)
        else _judge_columns(mechanism, tokens)
    )
    return {
        name: torch.stack([judge(kept) for kept in views.to(tokens.values.device)])
        for name, views in layer_views(tokens.values.shape[1]).items()
    }


@torch.no_grad()
def without_tokens(mechanism: Mechanism, piece: Piece) -> dict[str, Float[Tensor, "text output"]]:
    """The logits in each of ``token_views``; a text left without tokens has one mean token."""
    return {
        name: mechanism.finish(mechanism.summarise(_only(piece.tokens, kept)))
        for name, kept in token_views(piece.marks).items()
    }


def _judge_columns(mechanism: Mechanism, tokens: Ragged) -> LayerJudge:
    def judge(kept: Bool[Tensor, " layer"]) -> Float[Tensor, "text output"]:
        own = Ragged(tokens.values * kept[:, None], tokens.lengths)
        return mechanism.finish(mechanism.summarise(own))

    return judge


def _judge_vectors(mechanism: TwoStage, tokens: Ragged) -> LayerJudge:
    whole = layer_vectors(mechanism, tokens)
    # Tokens that are all alike aggregate to any one of them.
    mean = layer_vectors(mechanism, Ragged.one_row_each(torch.zeros_like(tokens.values[:1])))
    return lambda kept: judge_vectors(mechanism, torch.where(kept[:, None], whole, mean))


def _only(tokens: Ragged, kept: Bool[Tensor, " token"]) -> Ragged:
    is_empty = Ragged(kept.float(), tokens.lengths).sums() == 0
    stand_ins = (tokens.lengths.cumsum(0) - 1)[is_empty]
    values, kept = tokens.values.clone(), kept.clone()
    values[stand_ins], kept[stand_ins] = 0.0, True
    return Ragged(values[kept], Ragged(kept.float(), tokens.lengths).sums().long())
