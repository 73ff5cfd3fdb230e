"""What a probe uses on each text, and on the texts of a class."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sidelight.anatomy.pieces import Piece
from sidelight.anatomy.tokens import grouped
from sidelight.anatomy.weights import layer_weights
from sidelight.mechanisms import Mechanism
from sidelight.ragged import Ragged
from sidelight.types import Task


@dataclass(frozen=True)
class Use:
    """What a probe uses; per text, or the mean over texts.

    Attributes:
        layer_weights: The layer stage's weights; NaN for a mechanism without one.
        layer_shares: Each layer's share of the absolute contributions.
        layer_effects: Each layer's contribution, in logits; see ``contributions``.
        token_weights: The token stage's, by kind of token (``GROUPS``); NaN without them.
        token_shares: By kind of token, of the absolute contributions of all tokens and layers.
        tokens: By kind, the share of the tokens: what weighing all tokens alike would give.
    """

    layer_weights: Float[np.ndarray, "*text layer"]
    layer_shares: Float[np.ndarray, "*text layer"]
    layer_effects: Float[np.ndarray, "*text layer"]
    token_weights: Float[np.ndarray, "*text group layer"]
    token_shares: Float[np.ndarray, "*text group"]
    tokens: Float[np.ndarray, "*text group"]

    @staticmethod
    def pack(parts: "list[Use]") -> "Use":
        """All texts of all parts, in order."""
        names = [field.name for field in fields(Use)]
        return Use(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})

    def mean(self, chosen: Bool[np.ndarray, " text"]) -> "Use":
        """Over these texts."""
        return Use(**{f.name: getattr(self, f.name)[chosen].mean(0) for f in fields(Use)})


def use_of(
    mechanism: Mechanism,
    piece: Piece,
    parts: Float[Tensor, "token layer"],
    weights: Float[Tensor, "token layer"] | None,
) -> Use:
    """Per text.

    Args:
        mechanism: In evaluation mode.
        piece: The texts.
        parts: Contributions of its tokens.
        weights: Of the token stage.
    """
    lengths, groups = piece.tokens.lengths, grouped(piece.marks).float()

    def by_group(amounts: Float[Tensor, "token layer"]) -> Float[Tensor, "text group layer"]:
        return Ragged(groups[:, :, None] * amounts[:, None], lengths).sums()

    effects = Ragged(parts, lengths).sums()
    own = layer_weights(mechanism, piece.tokens)
    missing = torch.full_like(parts, torch.nan)
    return Use(
        layer_weights=array(missing[: len(lengths)] if own is None else own),
        layer_shares=array(_shares(effects)),
        layer_effects=array(effects),
        token_weights=array(by_group(missing if weights is None else weights)),
        token_shares=array(_shares(by_group(parts.abs()).sum(2))),
        tokens=array(_shares(Ragged(groups, lengths).sums())),
    )


def members(
    task: Task, labels: Int[np.ndarray, "text ..."]
) -> dict[str, Bool[np.ndarray, " text"]]:
    """The texts of each true class that has any; a multi-label text may be in several."""
    if task.kind == "multilabel":
        held = {name: labels[:, i] == 1 for i, name in enumerate(task.labels)}
        held["(none)"] = ~labels.any(1)
    else:
        held = {name: labels == i for i, name in enumerate(task.labels)}
    return {name: own for name, own in held.items() if own.any()}


def array(values: Tensor) -> Float[np.ndarray, "..."]:
    """In float64, on the CPU."""
    return values.detach().double().cpu().numpy()


def _shares(amounts: Float[Tensor, "text part"]) -> Float[Tensor, "text part"]:
    """Of the absolute sum; zeros where all are zero."""
    sizes = amounts.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
