"""Average of the logits of a readout and of layer fusions, each trained with a separate loss."""

import math
from collections.abc import Iterable
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.probes.mechanisms.base import Geometry, Mechanism
from sidelight.probes.mechanisms.readout import Readout
from sidelight.probes.mechanisms.shares import Shares
from sidelight.probes.ragged import Ragged
from sidelight_lab.mechanisms.fusion import Fusion


class Blend(Mechanism):
    """The mean of its members' logits.

    A linear readout and a non-linear fusion err on different texts, so their mean is better than
    either. A single loss on their sum would undo that. The state of a blend is the concatenation of
    its members' states.

    Args:
        members: Mechanisms whose states have a fixed size.
    """

    def __init__(self, members: list[Mechanism]):
        super().__init__()
        # A ModuleList is not typed by its elements.
        self.members = cast(Iterable[Mechanism], nn.ModuleList(members))
        self._widths = [member.projections().shape[2] for member in members]

    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """Average the dense forms of the members."""
        return torch.stack([member(hidden, mask) for member in self.members]).mean(0)

    def projections(self) -> Float[Tensor, "layer width projection"]:
        """Concatenate the members' projections."""
        return torch.cat([member.projections() for member in self.members], 2)

    def summarise(self, tokens: Ragged) -> Ragged:
        """Concatenate the members' states, ``[segment, number]``."""
        split_values = tokens.values.split(self._widths, -1)
        return _joined(
            [
                member.summarise(Ragged(member_values, tokens.lengths))
                for member, member_values in zip(self.members, split_values, strict=True)
            ]
        )

    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """Merge the states member by member."""
        sides = zip(self.members, self._parted(left), self._parted(right), strict=True)
        return _joined([member.merge(*states) for member, *states in sides])

    def votes(self, state: Ragged) -> Float[Tensor, "segment voter output"]:
        """Return the logits of each member."""
        pairs = zip(self.members, self._parted(state), strict=True)
        return torch.stack([member.finish(member_state) for member, member_state in pairs], 1)

    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """Average the logits of the members."""
        return self.votes(state).mean(1)

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """Average the shares of the members."""
        split_values = tokens.values.split(self._widths, -1)
        shares = [
            member.shares(Ragged(member_values, tokens.lengths), targets)
            for member, member_values in zip(self.members, split_values, strict=True)
        ]
        return Shares(
            torch.stack([each.values for each in shares]).mean(0),
            torch.stack([each.baseline for each in shares]).mean(0),
            max(each.steps for each in shares),
        )

    def _parted(self, state: Ragged) -> list[Ragged]:
        sizes = [math.prod(shape) for shape in self._shapes]
        split_values = state.values.split(sizes, 1)
        return [
            Ragged.one_row_each(member_state.unflatten(1, shape))
            for member_state, shape in zip(split_values, self._shapes, strict=True)
        ]

    @cached_property
    def _shapes(self) -> list[torch.Size]:
        """Shapes of the members' states; computed lazily because the meta device has no values."""
        return [_state_shape(member) for member in self.members]


def _joined(states: list[Ragged]) -> Ragged:
    return Ragged.one_row_each(torch.cat([state.values.flatten(1) for state in states], 1))


def _state_shape(member: Mechanism) -> torch.Size:
    """Return the shape of one segment's state, which is the same without tokens."""
    projections = member.projections()
    nothing = projections.new_zeros(0, projections.shape[0], projections.shape[2])
    lengths = torch.zeros(1, dtype=torch.long, device=projections.device)
    return member.summarise(Ragged(nothing, lengths)).values.shape[1:]


def blend(
    geometry: Geometry,
    *,
    heads: int = 2,
    fusions: int = 1,
    rank: int = 64,
) -> Blend:
    """Build a blend of a readout and of fusions with different initial parameters.

    Args:
        geometry: Layers, width and outputs.
        heads: Gates per layer of the readout.
        fusions: Number of layer fusions.
        rank: Features per token in each fusion.
    """
    members = [Fusion(geometry, rank=rank) for _ in range(fusions)]
    return Blend([Readout(geometry, heads=heads), *members])
