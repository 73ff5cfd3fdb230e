"""What a probe reads of each text and what it makes of it: contributions, weights, ablations.

Everything here starts from a probe's columns of cached texts; the backbone does not run, nothing is
trained, and each hidden state is projected once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sidelight.mechanisms.attention import DowncastAttention
from sidelight.mechanisms.base import Aggregator, Mechanism
from sidelight.mechanisms.gate import Gate
from sidelight.mechanisms.pooling import MaxPooling, MeanPooling
from sidelight.mechanisms.readout import Readout
from sidelight.mechanisms.shares import integrated_gradient
from sidelight.mechanisms.stages import TwoStage
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.ragged import Ragged
from sidelight.states.cache import Shard
from sidelight.training.dataset import Split
from sidelight.types import Task

# Columns of a token's marks; a token can have several.
FIRST, LAST, TEMPLATE, OPENING = range(4)
# A token is in the first of these that applies.
GROUPS = ("first", "last", "template", "content")


def mark_tokens(prompt: EncodedPrompt, reads: Reads) -> Bool[Tensor, "token mark"]:
    """The marks of the tokens that a probe reads.

    The first token is an attention sink if it opens the whole input. It does not after a system
    turn, which is not read.
    """
    at = prompt.mask(reads).nonzero()[:, 0]
    order = torch.arange(len(at))
    template = torch.tensor([part in Reads().parts - {Part.PROMPT} for part in prompt.parts])[at]
    return torch.stack([order == 0, order == len(at) - 1, template, at == 0], 1)


def grouped(marks: Bool[Tensor, "token mark"]) -> Bool[Tensor, "token group"]:
    """Each token in one of ``GROUPS``."""
    first, last, template, _ = marks.unbind(1)
    last = last & ~first
    template = template & ~first & ~last
    return torch.stack([first, last, template, ~(first | last | template)], 1)


def token_views(marks: Bool[Tensor, "token mark"]) -> dict[str, Bool[Tensor, " token"]]:
    """The tokens that are kept in each ablation."""
    first, last, template, _ = marks.unbind(1)
    return {
        "without template tokens": ~template,
        "without content": template,
        "without the first token": ~first,
        "without the last token": ~last,
        "the last token only": last,
    }


# Values of hidden states in one piece: 128 MiB in float32.
_PIECE_VALUES = 2**25


@dataclass(frozen=True)
class Piece:
    """Some texts as the probe sees them.

    Attributes:
        tokens: Columns, ``[token, layer, column]`` in float32. Columns have no constant term, so
            zeros stand for a layer at its standardisation mean (at zero for a probe that reads raw
            states).
        marks: The marks of each token; see ``mark_tokens``.
        texts: Position of each text in the split.
    """

    tokens: Ragged
    marks: Bool[Tensor, "token mark"]
    texts: Int[Tensor, " text"]


def read_pieces(probe: Probe, split: Split, *, device: torch.device | str) -> Iterator[Piece]:
    """All texts of a split, in the order of the cache."""
    projection = probe.projection().to(device)
    states = split.own_states()
    for index in range(len(states)):
        for part in _cut(states.read(index)):
            hidden = part.hidden.to(device).float()
            columns = projection.layers(hidden).transpose(0, 1)  # (T, L, M)
            marks = [mark_tokens(split.prompts[int(i)], probe.reads) for i in part.rows]
            tokens = Ragged(columns.contiguous(), part.lengths.to(device))
            yield Piece(tokens, torch.cat(marks).to(device), part.rows)


def _cut(shard: Shard) -> Iterator[Shard]:
    """The shard in runs of whole texts of about ``_PIECE_VALUES``."""
    layers, _, width = shard.hidden.shape
    ends = shard.lengths.cumsum(0)
    numbers = (ends - 1) // max(1, _PIECE_VALUES // (layers * width))
    cuts = torch.unique_consecutive(numbers, return_counts=True)[1].cumsum(0).tolist()
    for first, last in pairwise([0, *cuts]):
        begin = int(ends[first - 1]) if first else 0
        hidden = shard.hidden[:, begin : int(ends[last - 1])]
        yield Shard(hidden, shard.lengths[first:last], shard.rows[first:last])


_STEPS = 24


def true_targets(task: Task, labels: Int[np.ndarray, "text ..."]) -> Float[Tensor, "text output"]:
    """For each text the weights of its logits whose sum is the target.

    Binary: the logit. Multi-class: the logit of the true class less the mean of all, since a shift
    of all logits changes no verdict. Multi-label: the mean over the labels of the text, or over all
    labels if it has none.
    """
    if task.kind == "binary":
        return torch.ones(len(labels), 1)
    if task.kind == "multiclass":
        return torch.eye(task.outputs)[torch.from_numpy(labels)] - 1 / task.outputs
    held = torch.from_numpy(labels).float()
    held = torch.where(held.any(1, keepdim=True), held, 1.0)
    return held / held.sum(1, keepdim=True)


def contributions(
    mechanism: Mechanism, tokens: Ragged, targets: Float[Tensor, "text output"]
) -> Float[Tensor, "token layer"]:
    """What each token of each layer adds to its text's target: integrated gradients, always.

    ``Mechanism.shares`` holds a mechanism's weights instead, where it has any; here, what a token
    does to them counts too.

    c = x . integral_0^1 d target(a x) / dx da, from all layers at their mean (x = 0) to the text
    itself (Sundararajan, Taly & Yan 2017). Contributions and the target at x = 0 sum to the target
    whatever the mechanism. Where layers only add up, as in ``readout``, a layer's contribution is
    exactly what its ablation takes away, and the target at x = 0 is the bias.

    Args:
        mechanism: In evaluation mode.
        tokens: Its columns, ``[token, layer, column]``.
        targets: Weights of the logits; see ``true_targets``.
    """
    gradient = integrated_gradient(mechanism.logits, tokens, targets, steps=_STEPS)
    return (gradient * tokens.values).sum(-1)


# The column at which a stage's values begin, after its scores: by type of stage, from the stage and
# its number of columns. A type that is not listed has contributions only.
_FIRST_VALUE: dict[type[Any], Callable[[Any, int], int]] = {
    MeanPooling: lambda _stage, _columns: 0,
    MaxPooling: lambda _stage, _columns: 0,
    Gate: lambda _stage, _columns: 1,
    DowncastAttention: lambda _stage, columns: columns // 3 * 2,
    Readout: lambda readout, _columns: readout.gate.shape[2],
}


def token_weights(mechanism: Mechanism, tokens: Ragged) -> Float[Tensor, "token layer"] | None:
    """The weights that the token stage gives; those of a text sum to 1 in each layer.

    None for a mechanism without any; the mean over heads for one that has heads. A stage computes
    v = sum_i a_i x_i. The derivative of v by item i's *values* alone is a_i, so one backward pass
    reads the weights of any mechanism off its own streaming form: the softmax of a gate, 1 / N of
    a mean, the attention that an item receives averaged over heads and queries, the share of
    dimensions in which an item is the maximum. (Those of attention with a maximum over items are
    shares of that derivative.)
    """
    if isinstance(mechanism, TwoStage):
        return _stage_weights(mechanism.token_stage, tokens)
    return _shares(mechanism, tokens, lambda own: mechanism.finish(mechanism.summarise(own)))


def layer_weights(mechanism: Mechanism, tokens: Ragged) -> Float[Tensor, "text layer"] | None:
    """The weights that the layer stage gives; those of a text sum to 1. See ``token_weights``."""
    if not isinstance(mechanism, TwoStage):
        return None
    vectors = layer_vectors(mechanism, tokens)
    weights = _stage_weights(mechanism.layer_stage, _as_items(vectors))
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


def layer_vectors(mechanism: TwoStage, tokens: Ragged) -> Float[Tensor, "text layer carry"]:
    """What the token stage hands to the layer stage, from columns ``[token, layer, column]``.

    ``_judge_vectors`` is the other half of the mechanism.
    """
    carry = mechanism.layer_stage.columns(mechanism.head.weight.T[None])
    every_layer = carry.expand(tokens.values.shape[1], -1, -1)
    return mechanism.token_stage.finish(mechanism.token_stage.summarise(tokens), every_layer)


def _judge_vectors(
    mechanism: TwoStage, vectors: Float[Tensor, "text layer carry"]
) -> Float[Tensor, "text output"]:
    """The logits."""
    state = mechanism.layer_stage.summarise(_as_items(vectors))
    vector = mechanism.layer_stage.finish(state, mechanism.head.weight.T[None])
    return vector[:, 0] + mechanism.head.bias


def _as_items(vectors: Float[Tensor, "text layer carry"]) -> Ragged:
    """Layers as the items of one group, ``[text * layer, 1, carry]``."""
    texts, layers, _ = vectors.shape
    lengths = torch.full((texts,), layers, device=vectors.device)
    return Ragged(vectors.flatten(0, 1)[:, None], lengths)


def layer_views(layers: int) -> dict[str, Bool[Tensor, "view layer"]]:
    """Which layers are kept: all but one, only one, or all from one on; one view per layer."""
    one = torch.eye(layers, dtype=torch.bool)
    return {"drop": ~one, "only": one, "from": torch.ones_like(one).triu()}


@torch.no_grad()
def without_layers(
    mechanism: Mechanism, tokens: Ragged
) -> dict[str, Float[Tensor, "view text output"]]:
    """The logits in each of ``layer_views``; an ablated layer stays at its mean."""
    if isinstance(mechanism, TwoStage):
        # The token stage of two runs once: no layer's vector depends on another layer.
        whole = layer_vectors(mechanism, tokens)
        # Equal tokens aggregate to one of them, so a single mean token is enough.
        mean = layer_vectors(mechanism, Ragged.one_row_each(torch.zeros_like(tokens.values[:1])))

        def judge(kept: Bool[Tensor, " layer"]) -> Float[Tensor, "text output"]:
            return _judge_vectors(mechanism, torch.where(kept[:, None], whole, mean))

    else:

        def judge(kept: Bool[Tensor, " layer"]) -> Float[Tensor, "text output"]:
            own = Ragged(tokens.values * kept[:, None], tokens.lengths)
            return mechanism.finish(mechanism.summarise(own))

    return {
        name: torch.stack([judge(kept) for kept in views.to(tokens.values.device)])
        for name, views in layer_views(tokens.values.shape[1]).items()
    }


@torch.no_grad()
def without_tokens(mechanism: Mechanism, piece: Piece) -> dict[str, Float[Tensor, "text output"]]:
    """The logits in each of ``token_views``; a text without any token left gets one mean token."""
    return {
        name: mechanism.finish(mechanism.summarise(_only(piece.tokens, kept)))
        for name, kept in token_views(piece.marks).items()
    }


def _only(tokens: Ragged, kept: Bool[Tensor, " token"]) -> Ragged:
    is_empty = Ragged(kept.float(), tokens.lengths).sums() == 0
    stand_ins = (tokens.lengths.cumsum(0) - 1)[is_empty]
    values, kept = tokens.values.clone(), kept.clone()
    values[stand_ins], kept[stand_ins] = 0.0, True
    return Ragged(values[kept], Ragged(kept.float(), tokens.lengths).sums().long())
