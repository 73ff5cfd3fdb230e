"""The probes' columns of every token that vLLM has keys and values of, kept by KV slot.

A forward pass fills a staging buffer, layer by layer; after it, the rows move to the slots of
their tokens. A slot holds the keys and values of one token, and here its columns: whoever shares
the slot, or computes it again, shares or replaces both. Knows slots, not requests or probes.

The staging buffer and the weights stay where they are, and nothing depends on a tensor's values, so
that ``Stage.receive`` can be part of a captured CUDA graph (never run: no GPU has been at hand). A
graph holds their addresses: where graphs are captured, no other stage may take their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.standardisation import Projection


@dataclass(frozen=True)
class Stage:
    """Where one forward pass leaves its columns.

    Attributes:
        projection: From the hidden states of the local layers to columns.
        rows: ``[layer, token, column]``; NaN where nothing was written, so that a layer that is not
            tapped is a failed verdict, not a wrong one.
    """

    projection: Projection
    rows: Float[Tensor, "layer token column"]

    @staticmethod
    def empty(projection: Projection, *, tokens: int) -> "Stage":
        """Room for a pass over ``tokens`` tokens."""
        layers, _, columns = projection.weight.shape
        # A column's numbers side by side: with few columns the matmul takes a quarter of the time.
        weight = projection.weight.mT.contiguous().mT
        rows = weight.new_full((layers, tokens, columns), torch.nan)
        return Stage(Projection(weight, projection.shift), rows)

    def receive(self, layer: int, hidden: Float[Tensor, "token width"]) -> None:
        """One matmul, in float32: a bf16 result would lose what standardisation subtracts."""
        shift, weight, rows = self._layers[layer]
        torch.addmm(shift, hidden.float(), weight, out=rows[: len(hidden)])

    @cached_property
    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Views, made once: a pass calls for every layer, and a step may have one token."""
        shift, weight = self.projection.shift, self.projection.weight
        return list(zip(shift.unbind(), weight.unbind(), self.rows.unbind(), strict=True))


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of a request.

    Attributes:
        blocks: The request's block table.
        start: First token.
        stop: End of the tokens.
    """

    blocks: Sequence[int]
    start: int
    stop: int

    def slots(self, block_size: int) -> Int[np.ndarray, " token"]:
        """Where the tokens' columns are."""
        tokens = np.arange(self.start, self.stop)
        table = np.asarray(self.blocks, dtype=np.int64)
        return table[tokens // block_size] * block_size + tokens % block_size


class Pages:
    """Columns by KV slot.

    Args:
        stage: What is moved here after each pass.
        blocks: KV blocks of the engine.
        block_size: Slots of a block.
    """

    def __init__(self, stage: Stage, *, blocks: int, block_size: int):
        self.stage = stage
        self._block_size = block_size
        layers, _, columns = stage.rows.shape
        # The last row takes what vLLM pads a batch with (slot -1).
        self._rows = stage.rows.new_full((blocks * block_size + 1, layers, columns), torch.nan)

    @property
    def size_bytes(self) -> int:
        """Of the columns of all slots and of the staging buffer."""
        return sum(t.numel() * t.element_size() for t in (self._rows, self.stage.rows))

    @property
    def numbers_per_token(self) -> int:
        """Columns of all layers."""
        return self._rows[0].numel()

    def keep(self, slots: Int[Tensor, " token"]) -> None:
        """Moves the staged rows of a pass to the slots of its tokens."""
        staged = self.stage.rows[:, : len(slots)]
        slots = torch.where(slots < 0, len(self._rows) - 1, slots)
        self._rows.index_copy_(0, slots.long(), staged.transpose(0, 1))
        staged.fill_(torch.nan)

    def forget(self) -> None:
        """Makes every slot one whose verdict fails, until it is computed again."""
        self._rows.fill_(torch.nan)

    def read(self, runs: Sequence[Run]) -> Float[Tensor, "token layer column"]:
        """The columns of some requests' tokens, one run after the other."""
        slots = np.concatenate([run.slots(self._block_size) for run in runs])
        return self._rows[torch.from_numpy(slots).to(self._rows.device)]
