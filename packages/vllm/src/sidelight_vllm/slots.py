"""The probes' projections of every token, stored by KV slot.

Hooks on vLLM's decoder layers fill a staging buffer, layer by layer; after the last layer, its rows
move to the slots of their tokens. A slot has the keys and values of one token, and here its
projections. A request that shares or recomputes the slot shares or replaces both, so chunked
prefill, batching, preemption and shared prefixes need no bookkeeping.

The hooks are set before vLLM compiles the model, so they become part of the graph. They call two
opaque operations, which look up the current receiver in this file, so new probes do not need a new
graph. The staging buffer, store and weights never move, and nothing depends on a tensor's values,
so that the operations can be part of a captured CUDA graph (not yet tried on a GPU). A graph
contains their addresses, so new probes are copied into them as far as there is room.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sidelight.errors import SidelightError
from sidelight.probes.standardisation import Projection
from sidelight_vllm.settings import PROJECTIONS


class Receiver(Protocol):
    """Receives the residual stream after each layer of this worker, during the pass."""

    def receive(self, layer: int, stream: Float[Tensor, "token width"]) -> None: ...

    def end_pass(self, tokens: int) -> None:
        """Called after the last layer of this worker; ``tokens`` includes padding."""


_receiver: Receiver | None = None


def set_receiver(new: Receiver | None) -> None:
    """Set the receiver of the hidden states of this process's single model."""
    global _receiver
    _receiver = new


def receiver() -> Receiver | None:
    return _receiver


def _project(
    hidden: Float[Tensor, "token width"],
    residual: Float[Tensor, "token width"] | None,
    layer: int,
    order: Float[Tensor, ""],  # noqa: ARG001 - keeps the operation in its place
) -> None:
    if _receiver is not None:
        _receiver.receive(layer, hidden if residual is None else hidden + residual)


def _end_pass(hidden: Float[Tensor, "token width"], order: Float[Tensor, ""]) -> None:  # noqa: ARG001
    if _receiver is not None:
        _receiver.end_pass(len(hidden))


def _nothing(*_arguments: object) -> None:
    """The fake implementation that the compiler sees."""


_library = torch.library.Library("sidelight", "FRAGMENT")
_library.define("project(Tensor hidden, Tensor? residual, int layer, Tensor(a!) order) -> ()")
_library.define("end_pass(Tensor hidden, Tensor(a!) order) -> ()")
for _name, _operation in {"project": _project, "end_pass": _end_pass}.items():
    _library.impl(_name, _operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sidelight::{_name}", _nothing, lib=_library)


def tap_layers(layers: Sequence[nn.Module], *, reads_embedding: bool, width: int) -> int:
    """Hook the layers of this worker; return the number of hidden states.

    Args:
        layers: The local decoder layers, in order.
        reads_embedding: Whether the first layer's input is the embedding, which is layer 0.
        width: Size of a hidden state.
    """
    # The compiler neither drops nor reorders operations that write to the same tensor.
    order = next(layers[0].parameters()).new_zeros((), dtype=torch.float32)

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = [value for value in (*args, *kwargs.values()) if _is_state(value, width)]
        if len(states) != 1:
            raise _unknown(module)
        torch.ops.sidelight.project(_rows(states[0]), None, 0, order)

    def ended(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        torch.ops.sidelight.end_pass(_rows(hidden), order)

    first = int(reads_embedding)
    if reads_embedding:
        layers[0].register_forward_pre_hook(entered, with_kwargs=True)
    for layer, module in enumerate(layers, start=first):
        module.register_forward_hook(_output_hook(layer, order, width))
    layers[-1].register_forward_hook(ended)
    return first + len(layers)


def _output_hook(layer: int, order: Tensor, width: int) -> Callable[..., None]:
    """vLLM's layers return the stream as two addends; the second is the residual."""

    def left(module: nn.Module, _args: Any, output: Any) -> None:
        hidden, residual = output if isinstance(output, tuple) else (output, None)
        if not _is_state(hidden, width) or not (residual is None or _is_state(residual, width)):
            raise _unknown(module)
        addend = None if residual is None else _rows(residual)
        torch.ops.sidelight.project(_rows(hidden), addend, layer, order)

    return left


def _is_state(value: Any, width: int) -> bool:
    # Models from transformers, which vLLM also runs, have a batch dimension of one.
    return (
        torch.is_tensor(value)
        and value.shape[-1] == width
        and (value.dim() == 2 or (value.dim() == 3 and len(value) == 1))
    )


def _rows(states: Tensor) -> Float[Tensor, "token width"]:
    return states[0] if states.dim() == 3 else states


def _unknown(module: nn.Module) -> SidelightError:
    return SidelightError(
        f"Sidelight does not know how to tap {type(module).__name__}. Serve this model with the "
        "transformers engine; docs/vllm.md lists the tested models."
    )


@dataclass(frozen=True)
class StagingBuffer:
    """Buffer for the projections of one forward pass. The last columns may be unused.

    Attributes:
        projection: Projection of the hidden states of the local layers, in float32, because
            standardisation would lose precision in bf16.
        rows: Projections; NaN where nothing was written, so that an untapped layer leads to a
            missing verdict, not a wrong one.
    """

    projection: Projection
    rows: Float[Tensor, "layer token column"]

    @staticmethod
    def empty(projection: Projection, *, tokens: int, width: int = 0) -> "StagingBuffer":
        """Create a buffer for passes over at most ``tokens`` tokens.

        Args:
            projection: Projection of the first probes.
            tokens: Length of the longest pass.
            width: Number of projections to keep room for, including those of normalised states; 0
                only fits these probes.
        """
        has_flags = width > 0 or projection.is_normalised is not None
        width = max(width, projection.shift.shape[1])
        rows = projection.weight.new_full((len(projection.weight), tokens, width), torch.nan)
        padded = projection.padded(width, has_flags=has_flags)
        # With contiguous columns, a matmul with few columns takes a quarter of the time.
        weight = padded.weight.mT.contiguous().mT.clone()
        flags = None if padded.is_normalised is None else padded.is_normalised.clone()
        return StagingBuffer(Projection(weight, padded.shift.clone(), flags), rows)

    def require_room(self, projection: Projection) -> None:
        """Check that these projections fit.

        Raises:
            SidelightError: There is no room for them.
        """
        room, needed = self.projections, projection.shift.shape[1]
        lacks_flags = projection.is_normalised is not None and self.projection.is_normalised is None
        if needed > room or lacks_flags:
            why = (
                "read hidden states with a different normalisation from that of the first probes"
                if lacks_flags
                else f"need {needed} projections per layer, but there is room for {room}"
            )
            raise SidelightError(
                f"The probes {why}. Start vLLM with {PROJECTIONS}={max(needed, room)}, which "
                "keeps room for these probes too."
            )

    def load(self, projection: Projection) -> None:
        """Replace the projection; there must be room for it."""
        has_flags = self.projection.is_normalised is not None
        padded = projection.padded(self.projections, has_flags=has_flags)
        self.projection.weight.copy_(padded.weight)
        self.projection.shift.copy_(padded.shift)
        if self.projection.is_normalised is not None and padded.is_normalised is not None:
            self.projection.is_normalised.copy_(padded.is_normalised)

    def receive(self, layer: int, stream: Float[Tensor, "token width"]) -> None:
        self.projection.layer(layer, stream.float(), out=self.rows[layer, : len(stream)])

    @property
    def projections(self) -> int:
        """Number of projections per layer that fit."""
        return self.rows.shape[2]


@dataclass(frozen=True)
class GatherPlan:
    """The tokens that a worker reads of a request after a pass.

    Attributes:
        blocks: The request's block table.
        start: Index of the first token to read; 0 starts over.
        token_roles: The ``TokenRole`` of each token from ``start`` on.
        ends_prompt: Whether the prompt is complete for the first time.
        is_plain: Whether the prompt is plain text.
        path: Path for hidden states, if they are written.
    """

    request_id: str
    blocks: tuple[int, ...]
    start: int
    token_roles: bytes
    ends_prompt: bool
    is_plain: bool
    path: str = ""


def slots_of(
    blocks: Sequence[int], tokens: Int[np.ndarray, " token"], block_size: int
) -> Int[np.ndarray, " token"]:
    """The KV slots of these tokens of a request with this block table."""
    table = np.asarray(blocks, dtype=np.int64)
    return table[tokens // block_size] * block_size + tokens % block_size


class SlotStore:
    """Projections by KV slot.

    Args:
        staging: Staging buffer, whose rows move here after each pass.
        blocks: Number of the engine's KV blocks.
        block_size: Slots per block.

    Attributes:
        rows: Projections of each slot; NaN where none were stored.
    """

    def __init__(self, staging: StagingBuffer, *, blocks: int, block_size: int):
        self.staging = staging
        self._block_size = block_size
        layers, _, width = staging.rows.shape
        # The last row takes vLLM's padding (slot -1).
        self.rows = staging.rows.new_full((blocks * block_size + 1, layers, width), torch.nan)
        self._is_stored = torch.zeros((), dtype=torch.bool, device=staging.rows.device)

    def keep(self, slots: Int[Tensor, " token"]) -> None:
        """Move the staged rows of a pass to the slots of its tokens."""
        rows = self.staging.rows[:, : len(slots)]
        slots = torch.where(slots < 0, len(self.rows) - 1, slots)
        self.rows.index_copy_(0, slots.long(), rows.transpose(0, 1))
        rows.fill_(torch.nan)
        self._is_stored.fill_(True)

    def clear(self) -> None:
        """Clear all rows; a request that reads an older row gets no verdict."""
        self.rows.fill_(torch.nan)

    def is_stored(self) -> Bool[Tensor, ""]:
        """Whether rows were moved since the last call; on the device, to avoid synchronisation."""
        is_stored = self._is_stored.clone()
        self._is_stored.fill_(False)
        return is_stored

    def slots(self, plans: Sequence[GatherPlan]) -> Int[Tensor, " token"]:
        """The slots of the plans' tokens, plan by plan."""
        slots = np.concatenate(
            [
                slots_of(
                    r.blocks, np.arange(r.start, r.start + len(r.token_roles)), self._block_size
                )
                for r in plans
            ]
        )
        index, device = torch.from_numpy(slots), self.rows.device
        if device.type != "cpu":
            # Only pinned memory can be copied asynchronously.
            index = index.pin_memory().to(device, non_blocking=True)
        return index

    def read(self, plans: Sequence[GatherPlan]) -> Float[Tensor, "token layer projection"]:
        """The projections of the plans' tokens, plan by plan, including unused columns."""
        return self.rows[self.slots(plans)]
