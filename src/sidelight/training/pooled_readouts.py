"""Readouts in training: their logits from one weighted mean of whole states for each text and gate.

In serving, a readout takes a value of each token for each gate and class, and no vector of a
state's width is ever held. The mean of values is the value of the mean, so training can take means
of states first: the same logits and gradients, for far fewer multiplications where there are many
classes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.mechanisms.readout import Readout
from sidelight.mechanisms.stages import segment_softmax
from sidelight.ragged import Ragged, weighted_sums
from sidelight.standardisation import Standardisation, inverse_rms


def readout_logits(
    readouts: Sequence[Readout],
    tokens: Sequence[Ragged],
    standardisations: Sequence[Standardisation],
    hidden: Float[Tensor, "layer token width"],
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Float[Tensor, "text output"]]:
    """The logits of each text by each readout, as from ``Mechanism.logits``; float32.

    Args:
        readouts: They may differ in sizes.
        tokens: For each readout its ``token_columns`` of each token.
        standardisations: For each readout how its states are scaled.
        hidden: The states as they are.
        dtype: Of the matmuls with values.
    """
    lengths = tokens[0].lengths
    last = lengths.cumsum(0) - 1
    ends = hidden[:, last].float()
    inverse = torch.stack([inverse_rms(layer) for layer in hidden])  # (L, T, 1)
    weights: list[Tensor] = []
    for readout, own, standardisation in zip(readouts, tokens, standardisations, strict=True):
        scores = own.values[..., : readout.gate.shape[2]].float()
        weight = segment_softmax(scores, own).transpose(0, 1)  # (L, T, H)
        weights.append(weight * inverse if standardisation.is_normalised else weight)
    # Together: a product of a few columns alone would take twice as long.
    sums = weighted_sums(hidden, torch.cat(weights, 2), lengths)
    parts = sums.split([weight.shape[2] for weight in weights], 3)
    found: list[Tensor] = []
    for readout, own, standardisation, means in zip(
        readouts, tokens, standardisations, parts, strict=True
    ):
        scale = 1 / standardisation.scale[..., None]
        shift = -standardisation.mean[..., None] * scale
        own_ends = ends * inverse[:, last] if standardisation.is_normalised else ends
        own_ends = own_ends.transpose(0, 1)[..., None]  # (B, L, D, 1)
        means, own_ends = (
            torch.addcmul(shift, states, scale).to(dtype) for states in (means, own_ends)
        )
        found.append(readout.logits_of_means(own, means, own_ends[..., 0]))
    return found
