"""Many probes on one backbone, served by one thin matmul per layer.

The probes' projections are concatenated, so 1 or 50 probes run the same number of matmuls. The
bank holds no request: states are values that the caller keeps, splits, packs and merges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.probe import Probe, require_distinct_names
from sidelight.prompts import Reads
from sidelight.ragged import Ragged
from sidelight.standardisation import Projection
from sidelight.types import Verdict


@dataclass(frozen=True)
class BankState:
    """What all probes know so far of one or more requests.

    Attributes:
        states: One per probe, each with a segment per request.
    """

    states: tuple[Ragged, ...]

    def split(self) -> list["BankState"]:
        """Each request by itself."""
        return [BankState(parts) for parts in zip(*(s.split() for s in self.states), strict=True)]

    @staticmethod
    def pack(parts: Sequence["BankState"]) -> "BankState":
        """The requests of all parts, in order."""
        columns = zip(*(part.states for part in parts), strict=True)
        return BankState(tuple(Ragged.pack(column) for column in columns))


class BankTap:
    """Projects each hidden state while it exists and keeps only the columns."""

    def __init__(
        self, weight: Float[Tensor, "layer width column"], shift: Float[Tensor, "layer column"]
    ):
        self._weight = weight
        self._shift = shift
        self._columns: list[Float[Tensor, "batch token column"]] = []

    def __call__(self, layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
        """One matmul, in float32: a bf16 result would lose what standardisation subtracts."""
        flat = hidden.flatten(0, 1).float()
        columns = torch.addmm(self._shift[layer], flat, self._weight[layer])
        self._columns.append(columns.unflatten(0, hidden.shape[:2]))

    def projected(self) -> Float[Tensor, "batch token layer column"]:
        """The columns of the last forward pass; the tap is ready for the next."""
        projected = torch.stack(self._columns, 2)
        self._columns.clear()
        return projected


class Bank:
    """The probes that are served together.

    Args:
        probes: Probes of one backbone, with distinct names.
        device: Where the backbone's hidden states are.

    Raises:
        SidelightError: No probe, or two of the same name.
    """

    def __init__(self, probes: Sequence[Probe], *, device: torch.device | str = "cpu"):
        if not probes:
            raise SidelightError("A bank needs one or more probes, got none. Name one.")
        require_distinct_names(probes)
        self.probes = tuple(probes)
        projections = [probe.projection() for probe in probes]
        self._widths = [projection.weight.shape[2] for projection in projections]
        self._weight = torch.cat([p.weight.detach() for p in projections], 2).float().to(device)
        self._shift = torch.cat([p.shift.detach() for p in projections], 1).float().to(device)
        self._mechanisms = [probe.mechanism.to(device).eval() for probe in probes]

    @property
    def reads(self) -> frozenset[Reads]:
        """Every way of reading that some probe asks for."""
        return frozenset(probe.reads for probe in self.probes)

    @property
    def projection(self) -> Projection:
        """What a tap computes, for engines that project where their hidden states are."""
        return Projection(self._weight, self._shift)

    def tap(self) -> BankTap:
        """A tap for ``Backbone.tapped``."""
        return BankTap(self._weight, self._shift)

    @torch.inference_mode()
    def summarise(
        self,
        projected: Float[Tensor, "batch token layer column"],
        masks: Mapping[Reads, Bool[Tensor, "batch token"]],
    ) -> BankState:
        """The state of each request in the batch.

        Args:
            projected: What the tap collected.
            masks: For each way of reading, the tokens that count; padding never does.
        """
        states: list[Ragged] = []
        columns = projected.split(self._widths, -1)
        for probe, mechanism, own in zip(self.probes, self._mechanisms, columns, strict=True):
            mask = masks[probe.reads]
            states.append(mechanism.summarise(Ragged(own[mask], mask.sum(1))))
        return BankState(tuple(states))

    @torch.inference_mode()
    def merge(self, left: BankState, right: BankState) -> BankState:
        """The state of each request's two runs of tokens together."""
        pairs = zip(self._mechanisms, left.states, right.states, strict=True)
        return BankState(tuple(mechanism.merge(a, b) for mechanism, a, b in pairs))

    @torch.inference_mode()
    def logits(self, state: BankState) -> list[np.ndarray]:
        """For each probe ``[request, output]``, float64."""
        pairs = zip(self._mechanisms, state.states, strict=True)
        return [mechanism.finish(own).double().cpu().numpy() for mechanism, own in pairs]

    def verdicts(self, state: BankState) -> list[tuple[Verdict, ...]]:
        """For each request, the verdict of every probe.

        Raises:
            VerdictError: Some verdict cannot be computed; split the state to keep the others.
        """
        by_probe = self.logits(state)
        return [
            tuple(probe.verdict(row) for probe, row in zip(self.probes, rows, strict=True))
            for rows in zip(*by_probe, strict=True)
        ]
