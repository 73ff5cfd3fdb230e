"""A two-stage mechanism in halves: the layers' vectors, and the verdict on them.

``judge_vectors(m, layer_vectors(m, tokens)) == m.finish(m.summarise(tokens))``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.mechanisms.two_stage import TwoStage
from sidelight.ragged import Ragged


def layer_vectors(mechanism: TwoStage, tokens: Ragged) -> Float[Tensor, "text layer carry"]:
    """What the token stage hands to the layer stage, from columns ``[token, layer, column]``."""
    carry = mechanism.layer_stage.columns(mechanism.head.weight.T[None])
    every_layer = carry.expand(tokens.values.shape[1], -1, -1)
    return mechanism.token_stage.finish(mechanism.token_stage.summarise(tokens), every_layer)


def judge_vectors(
    mechanism: TwoStage, vectors: Float[Tensor, "text layer carry"]
) -> Float[Tensor, "text output"]:
    """The logits."""
    state = mechanism.layer_stage.summarise(as_items(vectors))
    vector = mechanism.layer_stage.finish(state, mechanism.head.weight.T[None])
    return vector[:, 0] + mechanism.head.bias


def as_items(vectors: Float[Tensor, "text layer carry"]) -> Ragged:
    """Layers as the items of one group, ``[text * layer, 1, carry]``."""
    texts, layers, _ = vectors.shape
    lengths = torch.full((texts,), layers, device=vectors.device)
    return Ragged(vectors.flatten(0, 1)[:, None], lengths)
