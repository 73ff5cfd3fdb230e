"""The weights that a mechanism itself gives to tokens and to layers, where it has any.

A stage computes v = sum_i a_i x_i. The derivative of v by item i's *values* alone is a_i, so one
backward pass reads the weights of any mechanism off its own streaming form: the softmax of a gate,
1 / N of a mean, the attention that an item receives averaged over heads and queries, the share of
dimensions in which an item is the maximum. Weights of the items of a group sum to 1. (Those of
attention with a maximum over items are shares of that derivative.)
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.anatomy.stages import as_items, layer_vectors
from sidelight.mechanisms import Aggregator, Mechanism
from sidelight.mechanisms.attention import DowncastAttention
from sidelight.mechanisms.gate import Gate
from sidelight.mechanisms.pooling import MaxPooling, MeanPooling
from sidelight.mechanisms.readout import Readout
from sidelight.mechanisms.two_stage import TwoStage
from sidelight.ragged import Ragged

# By type, from the object and its number of columns: the column at which its values begin, which
# is where its scores end. What is not here has contributions (``contributions.py``) only.
_FIRST_VALUE: dict[type[Any], Callable[[Any, int], int]] = {
    MeanPooling: lambda _stage, _columns: 0,
    MaxPooling: lambda _stage, _columns: 0,
    Gate: lambda _stage, _columns: 1,
    DowncastAttention: lambda _stage, columns: columns // 3 * 2,
    Readout: lambda readout, _columns: readout.gate.shape[2],
}


def token_weights(mechanism: Mechanism, tokens: Ragged) -> Float[Tensor, "token layer"] | None:
    """The token stage's weights, or None; a text's sum to 1 in each layer.

    Args:
        mechanism: In evaluation mode. The weights of one with heads are the mean over them.
        tokens: Its columns, ``[token, layer, column]``.
    """
    if isinstance(mechanism, TwoStage):
        return _stage_weights(mechanism.token_stage, tokens)
    return _shares(mechanism, tokens, lambda own: mechanism.finish(mechanism.summarise(own)))


def layer_weights(mechanism: Mechanism, tokens: Ragged) -> Float[Tensor, "text layer"] | None:
    """The layer stage's weights, or None; a text's sum to 1.

    Args:
        mechanism: In evaluation mode.
        tokens: Its columns, ``[token, layer, column]``.
    """
    if not isinstance(mechanism, TwoStage):
        return None
    vectors = layer_vectors(mechanism, tokens)
    weights = _stage_weights(mechanism.layer_stage, as_items(vectors))
    return None if weights is None else weights.unflatten(0, vectors.shape[:2])[..., 0]


def _stage_weights(stage: Aggregator, items: Ragged) -> Float[Tensor, "item group"] | None:
    carry = _adding_up(stage, items)
    return _shares(stage, items, lambda own: stage.finish(stage.summarise(own), carry))


def _adding_up(stage: Aggregator, items: Ragged) -> Float[Tensor, "group width carry"]:
    """A carry through which the sum of a stage's result adds up its aggregated values."""
    if isinstance(stage, DowncastAttention):
        # Undoes the way back to full width: out @ carry = 1 for every inner column.
        out = stage.out.detach()
        return torch.linalg.lstsq(out, torch.ones_like(out[..., :1])).solution
    _, groups, columns = items.values.shape
    values = columns - _FIRST_VALUE[type(stage)](stage, columns)
    return items.values.new_ones(groups, columns, values)


def _shares(
    owner: Mechanism | Aggregator, items: Ragged, aggregate: Callable[[Ragged], Tensor]
) -> Float[Tensor, "item group"] | None:
    if type(owner) not in _FIRST_VALUE:
        return None
    first = _FIRST_VALUE[type(owner)](owner, items.values.shape[2])
    with torch.enable_grad():
        columns = items.values.detach().clone().requires_grad_()
        total = aggregate(Ragged(columns, items.lengths)).sum()
        gradient = torch.autograd.grad(total, columns)[0]
    own = gradient[..., first:].abs().mean(-1)
    return own / Ragged(own, items.lengths).sums()[items.segments]
